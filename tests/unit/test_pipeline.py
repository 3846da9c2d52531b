"""What names a stage: everything that decides its content, and nothing else. No stage is run here."""

from pathlib import Path

import pytest

from llamero import pipeline
from llamero.core.errors import LlameroError
from llamero.pipeline import Plan
from llamero.recipe.load import load

RECIPE = """\
name: small
base:
  shape: {hidden: 32, layers: 1, heads: 2, mlp: 32, context: 64}
  vocabulary: {size: 300, mixture: world}
template: plain
data:
  mixtures:
    world: {sources: [{toy_world: documents, count: 10, val_split: 0.1}]}
    chat: {sources: [{source: mine, path: chat.jsonl}]}
train:
  - {name: lm, objective: lm, mixture: world, sequence: 32, steps: 2}
  - {name: sft, mixture: chat, sequence: 32, steps: 2}
quantize:
  calibration: {mixture: world, sequence: 16, tokens: 64}
  variants: [gptq-4bit-16g-actorder_True, rtn-4bit-16g]
evaluate:
  - {tasks: toy_world}
  - {tasks: perplexity, texts: {page: page.txt}, models: [final], window: 32, stride: 16}
publish: {license: apache-2.0}
"""


class Digests:
    """Plans the recipe in a directory and returns the digest of every stage."""

    def __init__(self, root):
        self.root = root

    def __call__(self, *overrides):
        plan = Plan(load(self.root / "recipe.yaml", overrides), self.root, self.root / "run")
        return {name: i.digest for stage in plan.stages for name, i in stage.identities.items()}


@pytest.fixture
def digests(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "page.txt").write_text("a page")

    return Digests(tmp_path)


def changed(before, after):
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_whole_way_is_known_before_anything_runs(digests):
    assert list(digests()) == [
        "tokenizer",
        "data-world",
        "data-chat",
        "train-lm",
        "train-sft",
        "gptq-4bit-16g-actorder_True",
        "rtn-4bit-16g",
        "measure-sft",
        "measure-gptq-4bit-16g-actorder_True",
        "measure-rtn-4bit-16g",
        "evaluate-toy_world-lm",
        "evaluate-toy_world-sft",
        "evaluate-toy_world-gptq-4bit-16g-actorder_True",
        "evaluate-toy_world-rtn-4bit-16g",
        "evaluate-perplexity-sft",
        "release",
    ]


@pytest.mark.parametrize(
    "override", ["parallel.device=cpu", "parallel.micro_batch=1", "train.sft.save_every=1", "train.lm.eval_every=1"]
)
def test_what_does_not_decide_the_result_changes_no_name(digests, override):
    before, after = digests(), digests(override)
    assert changed(before, after) == set()


def test_a_later_stage_changes_only_what_comes_after(digests):
    touched = changed(digests(), digests("train.sft.lr=1e-3"))
    after = ("train-sft", "gptq", "rtn", "measure", "evaluate", "release")
    assert touched == {name for name in digests() if name.startswith(after)} - {"evaluate-toy_world-lm"}


def test_one_variant_more_leaves_the_others(digests):
    more = "quantize.variants=[gptq-4bit-16g-actorder_True, rtn-4bit-16g, rtn-3bit-16g]"
    new = {"rtn-3bit-16g", "measure-rtn-3bit-16g", "evaluate-toy_world-rtn-3bit-16g", "release"}
    assert changed(digests(), digests(more)) == new


@pytest.mark.parametrize("override", ["quantize.max_kl=0.1", "quantize.publish_anyway=[rtn-4bit-16g]"])
def test_another_gate_makes_another_release_and_nothing_else(digests, override):
    assert changed(digests(), digests(override)) == {"release"}


@pytest.mark.parametrize("override", ["quantize.measure.tokens=100", "quantize.measure.texts={page: page.txt}"])
def test_another_measurement_leaves_the_variants(digests, override):
    touched = changed(digests(), digests(override))
    assert touched == {name for name in digests() if name.startswith("measure-")} | {"release"}


def test_nothing_is_measured_where_nothing_is_to_be(digests):
    gone = {name for name in digests() if name.startswith("measure-")}
    assert changed(digests(), digests("quantize.measure=null")) == gone | {"release"}


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["quantize.measure={texts: {page: page.txt}}"], "quantize.measure"),
        (["quantize.measure={validation: [world]}", "evaluate.1.models=[variants]"], "evaluate: perplexity"),
    ],
)
def test_a_text_that_is_calibrated_on_is_no_text_to_measure_on(digests, overrides, where):
    (digests.root / "copy.txt").write_text("a page")
    calibration = "quantize.calibration={text: copy.txt, sequence: 16, tokens: 64}"
    with pytest.raises(LlameroError, match="`page` is calibrated on") as caught:
        digests(calibration, *overrides)
    assert caught.value.where == where


def test_the_seed_changes_all_that_is_drawn(digests):
    untouched = digests().keys() - changed(digests(), digests("seed=7"))
    assert untouched == {"tokenizer"}


def test_files_count_by_content_and_not_by_place_or_time(digests):
    before = digests()
    (digests.root / "elsewhere").mkdir()
    (digests.root / "chat.jsonl").rename(digests.root / "elsewhere" / "chat.jsonl")
    assert changed(before, digests("data.mixtures.chat.sources.mine.path=elsewhere/chat.jsonl")) == set()
    (digests.root / "chat.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert "data-chat" in changed(before, digests())
    assert "data-world" not in changed(before, digests())


def test_a_missing_file_is_named_before_anything_runs(digests):
    (digests.root / "page.txt").unlink()
    with pytest.raises(LlameroError, match="no such file") as caught:
        digests()
    assert caught.value.where == str(digests.root / "page.txt")


def test_a_base_that_is_nowhere_is_refused(digests):
    with pytest.raises(LlameroError, match="no such model directory"):
        digests("base=./no/model")


def test_models_are_called_by_their_stage(digests):
    plan = Plan(load(digests.root / "recipe.yaml"), digests.root, digests.root / "run")
    assert plan.path("final") == plan.path("sft")
    assert plan.path("base") == plan.path("lm")  # a release from scratch is measured against its first stage
    assert isinstance(plan.path("rtn-4bit-16g"), Path)


def test_data_is_made_by_one_process_or_by_the_first_of_any_number(digests, monkeypatch, tmp_path):
    recipe = load(tmp_path / "recipe.yaml", ["parallel={gpus: 4}", "data.mixtures.world.sources.0.count=300"])
    for processes in ("1", "4", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        made = pipeline.run(recipe, root=tmp_path, out=tmp_path / "run", datasets=["world"])
        assert [row.stage for row in made.rows] == ["tokenizer", "data-world"]
    with pytest.raises(LlameroError, match="2 processes were started, and the recipe says `gpus: 4`"):
        pipeline.run(recipe, root=tmp_path, out=tmp_path / "run")


def test_a_judge_without_a_key_is_said_before_anything_is_made(digests, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recipe = load(tmp_path / "recipe.yaml", ["evaluate=[{tasks: mt_bench}]"])
    with pytest.raises(LlameroError, match="OPENAI_API_KEY is empty"):
        pipeline.run(recipe, root=tmp_path, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("data-*"))
    assert "evaluate-mt_bench-sft" in digests("evaluate=[{tasks: mt_bench}]")


def test_how_a_judge_is_reached_does_not_name_a_stage(digests):
    judge = "evaluate=[{tasks: mt_bench, judge: 'http://h/v1', judge_model: j"
    assert changed(digests(judge + "}]"), digests(judge + ", judge_threads: 2, judge_key_variable: KEY}]")) == set()
    assert "evaluate-mt_bench-sft" in changed(digests(judge + "}]"), digests(judge + ", votes: 2}]"))
