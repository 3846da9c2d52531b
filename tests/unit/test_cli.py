"""The command line answers at once, and a mistake is one message and exit code 2."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llamero import pipeline
from llamero.cli import app, data, display, main
from llamero.core import artifact
from llamero.core.artifact import Identity
from llamero.corpus.megatron import Writer
from llamero.data import stats
from llamero.data.stats import SourceStats
from llamero.pipeline import Outcome, Row
from llamero.text.render import render
from llamero.text.tokenizer import train_bpe

COMMANDS = (
    "run", "check", "evaluate", "quantize", "generate", "chat", "watch",
    "data", "data tokenize", "data inspect", "data import", "launch", "convert", "plan",
)  # fmt: skip
RECIPE = """
name: tiny
base: owner/name
data: {mixtures: {chat: {sources: [{source: a, path: a.json}]}, top: {sources: [{source: b, path: b.json}]}}}
train: [{name: sft, mixture: chat, sequence: 64, batch: 1, steps: 1, lr: 1.0e-4}]
"""


def test_help_never_imports_torch():
    code = f"""
import sys
from llamero.cli import app
for command in {COMMANDS!r}:
    app([*command.split(), "--help"], result_action="return_value")
app(["--help"], result_action="return_value")
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_described(command, capsys):
    app([*command.split(), "--help"], result_action="return_value")
    said = capsys.readouterr().out
    assert "Usage: llamero" in said


@pytest.mark.parametrize(
    ("given", "meant"), [(["rn"], '"run"'), (["run", "x.yaml", "--ot", "y"], "--out"), (["chta", "m"], '"chat"')]
)
def test_a_mistyped_command_or_option_is_answered_with_the_nearest(given, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code != 0
    said = capsys.readouterr()
    assert f"Did you mean {meant}?" in said.out + said.err


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["run", "none.yaml"], "no such recipe"),
        (["chat", "no/such/model/here"], "no such model directory"),
        (["evaluate", ".", "--tasks", "perplexty"], "did you mean `perplexity`?"),
        (["evaluate", ".", "--tasks", "perplexity"], "give --text FILE"),
        (["evaluate", ".", "--tasks", "samples"], "give --prompt TEXT"),
        (["evaluate", ".", "--tasks", "h4"], "give --data DIR"),
        (["evaluate", ".", "--tasks", "toy_world", "--window", "9"], "window"),
        (["quantize", ".", "out", "--text", "x.txt", "--variant", "gptq-9bit"], "gptq-9bit"),
        (["quantize", "."], "no directory to write to is named"),
        (["quantize", ".", "out", "--text", "none.txt"], "no such text"),
        (["quantize", ".", "out", "--text", "wikitext-2-v"], "did you mean `wikitext_2_v1`?"),
        (["quantize", ".", "out", "--json"], "--json is for --plan"),
        (["quantize", ".", "--plan", "--variant", "awq-4bit-128"], "one of: awq-4bit-128g"),
        (["quantize", ".", "--plan"], "no config.json"),
        (["watch", "nowhere"], "no such run directory"),
        (["data", "tokenize", "none.yaml"], "no such recipe"),
        (["data", "inspect", "nowhere"], "no such directory"),
        (["data", "inspect", "."], "no tokenized dataset"),
        (["data", "inspect", ".", "--samples", "-1"], "--samples must be at least 0"),
        (["data", "import", "none.yaml", "x"], "No such file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(given, problem, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert problem in said
    assert "Traceback" not in said


def test_debug_shows_where_an_error_came_from(tmp_path):
    from llamero.core.errors import LlameroError

    with pytest.raises(LlameroError):
        main(["run", str(tmp_path / "none.yaml"), "--debug"])


def call(arguments):
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The artifact of a mixture of two sources, with its tokenizer beside it."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(iter(["the cat sat on the mat\n"]), vocab_size=262).with_tokens(
        ["<|im_start|>", "<|im_end|>"]
    )
    made = Identity("tokenizer", "tokenizer", {}, {})
    with artifact.build(root, made) as build:
        tokenizer.save(build.path)
    data = Identity("data", "data-chat", {}, {"tokenizer": made.digest})
    parts = [SourceStats("cats", "pair"), SourceStats("dogs", "pair")]
    with artifact.build(root, data) as build:
        with Writer(build.path / "train-text", np.uint16) as text, Writer(build.path / "train-role", np.uint16) as role:
            for part in parts:
                for number in range(3):
                    chat = [
                        {"role": "user", "content": "who?"},
                        {"role": "assistant", "content": f"{part.name} {number}"},
                    ]
                    said = render(chat, "chatml", tokenizer)
                    text.add(said.ids)
                    role.add(said.roles)
                    part.add(len(said.ids), sum(said.learned), turns=1, language="en")
                part.skip("too long")
                part.samples = part.processed
        train = {"sources": [part.to_json() for part in parts], "total": stats.total(parts).to_json()}
        build.summary = {"mixture": "chat", "train": train}
    return data.path(root)


def test_inspect_shows_numbers_lengths_and_samples(dataset, capsys):
    assert call(["data", "inspect", str(dataset), "--samples", "2", "--lengths", "16"]) == 0
    said = capsys.readouterr().out
    assert "chat, train" in said
    assert "skipped: too long (2)" in said
    assert "languages: en (6)" in said
    assert "at a sequence length of 16: 6 documents of the split are longer" in said
    assert said.count("dogs, document") == said.count("cats, document") == 2
    assert "⟦cats " in said  # what is learned, where there is no colour
    assert "<|im_end|>⟧ ↵" in said or "<|im_end|>⟧↵" in said


def test_inspect_shows_one_source(dataset, capsys):
    assert call(["data", "inspect", str(dataset), "--source", "dogs"]) == 0
    said = capsys.readouterr().out
    assert said.count("dogs, document") == 3
    assert "cats" not in said
    assert call(["data", "inspect", str(dataset), "--source", "dgos"]) == 2
    assert "did you mean `dogs`?" in capsys.readouterr().err
    assert call(["data", "inspect", str(dataset), "--split", "val"]) == 2
    assert "no split `val`" in capsys.readouterr().err


def test_inspect_opens_a_foreign_dataset(tmp_path, dataset, capsys):
    with Writer(tmp_path / "wiki_text_document", np.uint16) as writer:
        writer.add([50, 51, 52])
    assert call(["data", "inspect", str(tmp_path)]) == 0
    assert "--tokenizer DIR" in capsys.readouterr().out
    assert call(["data", "inspect", str(tmp_path), "--tokenizer", str(next(dataset.parent.glob("tokenizer-*")))]) == 0
    assert "wiki_text_document, document 0: 3 tokens, 3 learned" in capsys.readouterr().out


def test_on_a_terminal_learned_tokens_are_coloured_and_underlined(dataset, capsys, monkeypatch):
    monkeypatch.setattr(data, "out", display.Console(force_terminal=True, color_system="standard", width=200))
    assert call(["data", "inspect", str(dataset), "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[4;32m" in said
    assert "⟦" not in said


@pytest.mark.parametrize(
    ("options", "mixtures"),
    [([], ["chat", "top"]), (["--mixture", "chat"], ["chat"])],
)
def test_tokenize_makes_the_mixtures_and_nothing_else(tmp_path, dataset, monkeypatch, capsys, options, mixtures):
    asked = {}

    def run(recipe, **how):
        asked.update(how, workers=recipe.parallel.workers)
        return Outcome([Row("data-chat", "made", 1.0, dataset)], None, None, [])

    monkeypatch.setattr(pipeline, "run", run)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert (
        call(
            [
                "data",
                "tokenize",
                str(tmp_path / "recipe.yaml"),
                "--out",
                str(tmp_path / "run"),
                "--workers",
                "2",
                *options,
            ]
        )
        == 0
    )
    assert ([*asked["datasets"]], asked["out"], asked["workers"]) == (mixtures, tmp_path / "run", 2)
    said = capsys.readouterr().out
    assert "chat, train" in said
    assert f"made: {dataset}" in said


def test_tokenize_names_the_nearest_mixture(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert call(["data", "tokenize", str(tmp_path / "recipe.yaml"), "--mixture", "caht"]) == 2
    assert "did you mean `chat`?" in capsys.readouterr().err


def test_import_writes_the_yaml_and_says_the_rest_on_standard_error(tmp_path, monkeypatch, capsys):
    def convert(text, section, *, where):
        assert (text, section, where) == ("published: {}", "published", str(tmp_path / "oa.yaml"))
        return SimpleNamespace(yaml="data: [x]\n", notes=["a [b] note"], unmapped=["cache_dir"])

    monkeypatch.setattr("llamero.recipe.openassistant.convert", convert)
    (tmp_path / "oa.yaml").write_text("published: {}")
    assert call(["data", "import", str(tmp_path / "oa.yaml"), "published"]) == 0
    said = capsys.readouterr()
    assert said.out == "data: [x]\n"
    assert said.err == "note: a [b] note\nnot taken over: cache_dir\n"
    assert call(["data", "import", str(tmp_path / "oa.yaml"), "published", "--out", str(tmp_path / "ours.yaml")]) == 0
    assert (tmp_path / "ours.yaml").read_text() == "data: [x]\n"
    assert call(["data", "import", str(tmp_path / "oa.yaml"), "published", "--out", str(tmp_path / "ours.yaml")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, ""), (1e-9, "▏"), (0.5, "█" * 5), (0.5625, "█" * 5 + "▋"), (1, "█" * 10)]
)
def test_bars_are_drawn_in_eighths(share, drawn):
    assert display.block(share, 10) == drawn


def test_the_remaining_time_is_shown_where_the_total_is_known(capsys, monkeypatch):
    monkeypatch.setattr(display, "err", display.Console(force_terminal=True, width=120))
    for total, left in ((4, True), (None, False)):
        bars = display.Bars()
        with bars:
            line = bars.start("tokenize chat", total=total, unit="rows", done=0)
            bars.advance(line, 2, "1.20 M tokens/s")
            bars._progress.refresh()
        said = capsys.readouterr().out
        assert "1.20 M tokens/s" in said
        assert (" left" in said) == left


def test_what_was_found_in_a_mixture_is_said():
    summary = {
        "decontamination": {"statement": "None of 3 shares a thing."},
        "duplicates": {"within_sources": 1, "across_sources": 1, "samples": 3, "dropped": True},
        "lengthen": {"warning": "little is kept"},
    }
    assert list(data._found(summary)) == [
        "test sets: None of 3 shares a thing.",
        "near-duplicates: 2 of 3 samples, left out",
        "lengthen: little is kept",
    ]
    assert list(data._found({"mixture": "chat"})) == []
