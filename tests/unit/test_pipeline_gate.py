"""From quantizing to a release that holds back what is not good enough; the models are random, the files are real."""

import json
import random
from pathlib import Path

import pytest

from llamero import pipeline
from llamero.cli import main
from llamero.corpus.rows import Raw
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.quantize import measure
from llamero.recipe.load import load
from llamero.text.tokenizer import train_bpe

FINE, POOR = "gptq-8bit-32g-actorder_True", "rtn-2bit--1g"
RECIPE = f"""\
name: small
base: base
quantize:
  calibration: {{text: calibration.txt, sequence: 32, tokens: 640}}
  variants: [{FINE}, {POOR}]
  measure: {{texts: {{"one, test": one.txt, "two, test": two.txt}}, tokens: 200}}
  max_kl: 0.3
evaluate:
  - {{tasks: perplexity, texts: {{three: three.txt}}, models: [variants], window: 32, stride: 16, tokens: 100}}
publish: {{license: apache-2.0}}
"""
NAMES = ("calibration", "one", "two", "three")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    words = ["cat", "mat", "sat", "the", "on", "of", "moon", "a", "ship", "red"]
    for seed, name in enumerate(NAMES):
        draw = random.Random(seed)
        (root / f"{name}.txt").write_text(" ".join(draw.choice(words) for _ in range(1500)))
    tokenizer = train_bpe(iter(["the cat sat on the mat of a red moon ship\n"] * 3), vocab_size=280)
    model = Llama(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope=Default(10000.0, 16),
            max_position_embeddings=64,
        )
    )
    initialize(model, seed=1, std=0.3)
    (root / "base").mkdir()
    save_model(model, root / "base")
    tokenizer.save(root / "base")
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def run(root, *overrides):
    recipe = load(root / "recipe.yaml", overrides)
    outcome = pipeline.run(recipe, root=root, out=root / "run")
    made = [row.stage for row in outcome.rows if row.state == "made"]
    assert outcome.release is not None
    branches = sorted(path.name for path in (outcome.release / "small-GPTQ").glob("*/"))
    return outcome, made, branches


def card(root, name):
    return (root / "run/release" / name / "README.md").read_text()


def test_what_is_too_far_from_the_original_stays_at_home(root):
    outcome, made, branches = run(root)
    assert made == [
        "tokenizer", FINE, POOR, "measure-base", f"measure-{FINE}", f"measure-{POOR}", f"evaluate-perplexity-{FINE}",
        "release",
    ]  # fmt: skip
    assert branches == [FINE]
    assert list(outcome.faults) == [POOR]
    assert not outcome.faults[POOR].published
    numbers = {(r.model, r.task, r.inputs["text"]): r for r in outcome.results}
    kl = {(model, text): r.metrics["kl"] for (model, task, text), r in numbers.items() if task == "agreement"}
    assert 0 < kl[FINE, "one, test"] < 0.3 < max(kl[POOR, f"{n}, test"] for n in ("one", "two"))
    assert ("base", "perplexity", "two, test") in numbers
    assert "window 64, stride 32" in numbers[FINE, "agreement", "one, test"].protocol
    (report,) = (root / "run").glob(f"measure-{POOR}-*")
    assert json.loads((report / "artifact.json").read_text())["summary"]["texts"][1]["top1"] < 1
    assert json.loads((report / "seconds.json").read_text())["seconds"] > 0
    told = card(root, "small-GPTQ")
    assert f"- **{POOR}**" in told
    assert "more than 0.3" in told

    outcome, made, _ = run(root)
    assert made == []

    outcome, made, branches = run(root, f"quantize.publish_anyway=[{POOR}]")
    assert made == [f"evaluate-perplexity-{POOR}", "release"]
    assert branches == sorted([FINE, POOR])
    assert outcome.faults[POOR].published
    assert "published all the same" in card(root, "small-GPTQ")

    outcome, made, branches = run(root, "quantize.max_kl=100")
    assert made == ["release"]
    assert branches == sorted([FINE, POOR])
    assert not outcome.faults

    outcome, made, branches = run(root, "quantize.max_kl=0.0000001")
    assert made == ["release"]
    assert branches == []
    told = card(root, "small")
    assert FINE in told
    assert "more than 1e-07" in told


def test_what_calibrates_under_another_form_is_found_by_its_tokens(root):
    (root / "other.txt").write_text((root / "calibration.txt").read_text()[:1400] + " the end")
    with pytest.raises(measure.LlameroError, match="% of it was calibrated on"):
        run(root, "quantize.measure={texts: {other: other.txt}, tokens: 200}")


def quantize(root, out, *arguments):
    """Run the command; return its exit code, what stands in its directory, and its report."""
    how = ["--text", str(root / "calibration.txt"), "--sequence", "32", "--tokens", "640", "--variant", FINE]
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(root / "base"), str(out), *how, "--variant", POOR, *arguments])
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}
    return stopped.value.code, sorted(path.name for path in out.glob("*/")), report


def texts(root, *names):
    return [part for name in names for part in ("--measure-text", str(root / f"{name}.txt"))]


def test_the_command_measures_and_holds_back(root, tmp_path, capsys):
    code, made, report = quantize(root, tmp_path / "a", *texts(root, "one", "two"), "--max-kl", "0.3")
    said = capsys.readouterr().out
    assert code == 1
    assert made == [FINE, f"{POOR}.rejected"]
    assert f"not published: {POOR}: KL" in said
    fine, poor = report["variants"]
    assert [fine["held_back"], poor["held_back"]] == [False, True]
    assert "more than 0.3" in poor["wrong"]
    assert [text["text"] for text in fine["measured"]["texts"]] == ["one.txt", "two.txt"]
    assert report["original"]["texts"][0]["perplexity"] > 1
    assert fine["seconds"] > 0
    kl = fine["measured"]["texts"][0]["kl"]
    assert f"{kl:.3g}" in said
    assert "window 64, stride 32" in said

    code, made, report = quantize(
        root, tmp_path / "b", *texts(root, "one"), "--max-kl", "0.3", "--publish-anyway", POOR
    )
    assert (code, made) == (0, [FINE, POOR])
    assert "published all the same" in capsys.readouterr().out
    assert report["variants"][1]["wrong"] is not None


def test_the_command_says_that_nothing_was_measured(root, tmp_path, capsys):
    code, made, report = quantize(root, tmp_path / "a", "--no-measure")
    assert (code, made) == (0, [FINE, POOR])
    assert "not measured: how far" in capsys.readouterr().out
    assert report["variants"][0]["measured"] is None


def test_default_texts_that_cannot_be_read_are_said(root, tmp_path, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise measure.LlameroError("no hub today")

    monkeypatch.setattr("llamero.corpus.hub.read", unreachable)
    code, _, report = quantize(root, tmp_path / "a")
    said = capsys.readouterr().out
    assert code == 0
    assert "not measured on wikitext-2-raw-v1, test: no hub today" in said
    assert "not measured on slimpajama, validation: no hub today" in said
    assert "--measure-text FILE" in said
    assert report["original"] is None


def test_default_texts_are_read_from_the_hub(root, tmp_path, capsys, monkeypatch):
    def read(name, split, **_):
        seed = 10 if name == "Salesforce/wikitext" else 11
        draw = random.Random(f"{seed}{split}")
        for number in range(90):
            yield Raw(f"row {number}", {"text": " ".join(draw.choice(("red", "moon", "cat")) for _ in range(40))})

    monkeypatch.setattr("llamero.corpus.hub.read", read)
    code, _, report = quantize(root, tmp_path / "a", "--max-kl", "9")
    assert code == 0
    assert [text["text"] for text in report["original"]["texts"]] == [
        "wikitext-2-raw-v1, test",
        "slimpajama, validation",
    ]
    assert "sample after sample" in report["original"]["texts"][0]["protocol"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-measure", "--max-kl", "1"], "without a measurement nothing is held back"),
        (["--measure-text", "none.txt"], "no such text"),
        (["--publish-anyway", "awq-4bit-32g"], "no variant `awq-4bit-32g`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(root, tmp_path, capsys, arguments, says):
    code, made, _ = quantize(root, tmp_path / "a", *arguments)
    assert (code, made) == (2, [])
    assert says in capsys.readouterr().err


def test_what_was_calibrated_on_is_refused_before_any_work(root, tmp_path, capsys):
    code, made, _ = quantize(root, tmp_path / "a", *texts(root, "one", "calibration"))
    assert (code, made) == (2, [])
    assert "% of it was calibrated on" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["measuring", "placing"])
def test_a_command_that_was_cut_off_ends_as_if_it_had_not_been(root, tmp_path, capsys, monkeypatch, moment):
    how = [*texts(root, "one"), "--max-kl", "0.3"]
    assert quantize(root, tmp_path / "whole", *how)[:2] == (1, [FINE, f"{POOR}.rejected"])
    cut = tmp_path / "cut"
    rename = Path.rename
    with monkeypatch.context() as patch:
        if moment == "measuring":
            patch.setattr(measure, "measure_together", stop)
        else:
            patch.setattr(Path, "rename", lambda path, to: stop() if path.name == POOR else rename(path, to))
        with pytest.raises(RuntimeError, match="cut off"):
            quantize(root, cut, *how)
    assert len(list(cut.glob("*.progress"))) == 1
    capsys.readouterr()
    assert quantize(root, cut, *how)[:2] == (1, [FINE, f"{POOR}.rejected"])
    assert "going on with what" in capsys.readouterr().out
    whole = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert len(whole) == 2
    assert all((cut / name).read_bytes() == path.read_bytes() for name, path in whole.items())


def stop(*_, **__):
    raise RuntimeError("cut off")


def test_a_changed_command_leaves_what_another_has_begun(root, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure_together", stop)
        with pytest.raises(RuntimeError, match="cut off"):
            quantize(root, tmp_path / "out")
    (left,) = (tmp_path / "out").glob("*.progress")
    quantize(root, tmp_path / "out", "--damp", "0.02", "--max-kl", "100")
    assert f"{left} is what another command has left unfinished" in capsys.readouterr().out
    assert list((tmp_path / "out").glob("*.progress")) == [left]
    assert (left / FINE / "config.json").exists()


def test_the_template_decides_what_is_calibrated_on(root):
    def digests(*overrides):
        plan = pipeline.Plan(load(root / "recipe.yaml", ["publish=null", *overrides]), root, root / "run")
        return {name: identity.digest for stage in plan.stages for name, identity in stage.identities.items()}

    rendered = digests("template=plain")
    assert all(rendered[name] != digest for name, digest in digests().items() if name in (FINE, POOR))
