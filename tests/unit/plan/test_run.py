import json

import pytest

from llamero.cli import main
from llamero.core.errors import LlameroError
from llamero.core.hardware import ACCELERATORS
from llamero.parallel.config import ParallelConfig
from llamero.plan import run
from llamero.plan.base import parameters
from llamero.plan.cluster import Cluster
from llamero.plan.data import Said
from llamero.plan.memory import Memory, Parameters
from llamero.plan.run import Planning, resize
from llamero.plan.search import ROOM, rough_bytes
from llamero.plan.time import Work
from llamero.recipe.load import load

RECIPE = """
name: small
base:
  shape: {hidden: 64, layers: 4, heads: 4, kv_heads: 2, mlp: 128, context: 512, tied: false}
  vocabulary: {size: 512, mixture: chat}
template: chatml
data:
  mixtures:
    chat: {sources: [{source: a, path: a.jsonl}]}
train:
  - {name: first, mixture: chat, sequence: 64, batch: 16, steps: 100, precision: bfloat16}
  - {name: second, mixture: chat, sequence: 64, batch: 16, epochs: 2, precision: bfloat16}
parallel: {gpus: 4, tensor: 2, pipeline: 2, recompute: selective, micro_batch: 2}
"""


@pytest.fixture
def counted(monkeypatch):
    """A count in place of the weighing, which takes seconds."""

    def memory(config, stage, parallel, *, pieces):
        whole = rough_bytes(Work(config, stage.sequence), parallel, stage.batch)
        return [Memory(activations=round(whole / (1 + place))) for place in range(parallel.pipeline)]

    def numbers(config, stage, parallel, *, pieces):
        whole, trained = parameters(config, stage)
        return Parameters(whole, trained, whole // parallel.gpus)

    monkeypatch.setattr(run, "memory", memory)
    monkeypatch.setattr(run, "parameters", numbers)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def planned(path, *overrides, device="a100-80gb", gpus=4, **keys):
    cluster = Cluster(ACCELERATORS[device], gpus)
    return made_of(load(path, overrides), path, cluster, **keys)


def made_of(recipe, path, cluster, **keys):
    planning = Planning(recipe, root=path.parent, out=path.parent / "run", cluster=cluster, **keys)
    return planning.whole([planning.stage(stage) for stage in recipe.train])


def test_every_stage_is_planned(recipe, counted):
    made = planned(recipe, best=2, said={"second": Said(16_000)})
    first, second = made.stages
    assert (first.parameters, first.trained) == (213_568, 213_568)  # by hand
    assert first.own is not None
    assert first.own.fits
    assert not first.ways
    assert len(first.own.memory) == 2
    assert (first.data.steps, second.data.steps) == (100, 32)
    figures = first.own.figures
    assert figures.step_seconds == first.own.parts.total
    assert figures.tokens_per_second_per_gpu == pytest.approx(16 * 64 / figures.step_seconds / 4)
    assert figures.gpu_hours == pytest.approx(4 * 100 * figures.step_seconds / 3600)
    assert 0 < figures.mfu < 1
    for stage in made.stages:
        assert len(stage.best) == 2
        assert all(one.fits for one in stage.best)
    json.dumps(made.to_json())


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_recipes_layout_is_weighed(recipe):
    own = planned(recipe, best=0).stages[0].own
    assert own is not None
    assert own.fits
    first, second = own.memory
    assert first.weights == 4 * (512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 2 * 2 * 64) / 2
    assert first.activations > second.activations  # it holds two micro-batches, the other one
    assert second.logits > first.logits == 0


def test_steps_that_are_not_known_leave_hours_unknown(recipe, counted):
    second = planned(recipe, best=1).stages[1]
    assert second.own is not None
    assert second.own.figures.hours is None
    assert second.own.figures.step_seconds > 0
    assert second.best[0].figures.gpu_hours is None


def test_what_does_not_fit_says_what_would(recipe, counted):
    """A layout of rows so long that only their recomputation leaves room."""
    small = planned(recipe, "parallel.recompute=none", "parallel.micro_batch=8", best=0).stages[0].own
    less = planned(recipe, "parallel.recompute=full", "parallel.micro_batch=1", best=0).stages[0].own
    assert small is not None
    assert less is not None
    most, least = (max(one.total for one in own.memory) for own in (small, less))
    assert least < most
    device = ACCELERATORS["a100-80gb"]
    between = type(device)(**{**vars(device), "memory_gib": (most + least) / 2 / ROOM / 2**30})
    parsed = load(recipe, ["parallel.recompute=none", "parallel.micro_batch=8"])
    made = made_of(parsed, recipe, Cluster(between, 4), best=0)
    own, ways = made.stages[0].own, made.stages[0].ways
    assert own is not None
    assert not own.fits
    assert len(ways) == 1
    assert ways[0].fits
    assert (ways[0].parallel.tensor, ways[0].parallel.pipeline) == (2, 2)


def test_a_layout_that_cannot_be_is_told_and_others_are_found(recipe, counted):
    stage = planned(recipe, gpus=6, best=1).stages[0]
    assert stage.own is None
    assert "does not divide `gpus: 6`" in stage.refused
    assert stage.best[0].parallel.gpus == 6
    heads = planned(recipe, "parallel={gpus: 4, tensor: 4}", best=0).stages[0]
    assert "key/value heads" in heads.refused


def test_a_layout_that_cuts_codes_is_told_and_none_that_does_is_suggested(recipe, counted):
    base = "base.shape={hidden: 256, layers: 4, heads: 8, kv_heads: 8, mlp: 544, context: 512, tied: false}"
    stages = (
        "train=[{name: a, mixture: chat, sequence: 64, batch: 16, steps: 9, adapter: {lora: 8, base: rtn-4bit-32g}}]"
    )
    made = planned(recipe, base, stages, "parallel={gpus: 8, tensor: 8}", gpus=8, best=9)
    (stage,) = made.stages
    assert stage.own is None
    assert "544 outputs of `mlp.gate_proj` within a word" in stage.refused
    assert stage.best
    assert max(one.parallel.tensor for one in stage.best) < 8
    plain = stages.replace(", base: rtn-4bit-32g", "")
    (other,) = planned(recipe, base, plain, "parallel={gpus: 8, tensor: 8}", gpus=8, best=9).stages
    assert other.own is not None
    assert stage.found.legal < other.found.legal


def test_more_gpus_than_the_recipe_has_are_more_shards(recipe, counted):
    stage = planned(recipe, gpus=8, best=0).stages[0]
    assert stage.own is not None
    parallel = stage.own.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.sharded, parallel.replicate) == (2, 2, 2, 1)
    assert stage.resized == "it is for 4 GPUs; on 8 `shard` becomes 2 instead of 1"
    assert not planned(recipe, best=0).stages[0].resized


def test_where_there_are_copies_other_gpus_are_other_copies():
    copies = ParallelConfig(gpus=16, tensor=2, shard=4, replicate=2)
    for gpus, replicate, sharded in ((32, 4, 4), (8, 1, 4), (24, 3, 4), (20, 2, 5)):
        made, said = resize(copies, gpus)
        assert (made.gpus, made.tensor, made.replicate, made.sharded) == (gpus, 2, replicate, sharded)
        assert f"on {gpus}" in said
    with pytest.raises(LlameroError, match="does not divide `gpus: 6`"):
        resize(copies, 6)


def test_a_device_that_lacks_the_precision_is_refused(recipe):
    with pytest.raises(LlameroError, match="V100 SXM2 32 GB does not compute in bf16"):
        planned(recipe, device="v100-32gb")


def test_a_base_that_nobody_has_is_refused_with_the_shapes_that_are_known(recipe):
    keys = "base=nowhere/nothing-70b"
    with pytest.raises(LlameroError) as error:
        planned(recipe, keys)
    assert "llama-2-70b" in str(error.value.fix)


def test_a_base_that_is_not_at_hand_has_a_published_shape(recipe):
    made = planned(recipe, "base=./Llama-2-7b-hf", "train=[]")
    assert "llama-2-7b" in made.known_from
    assert made.config.hidden_size == 4096


def test_what_the_release_needs_to_run(recipe, counted):
    """The cards: 70B in 4 bits on one GPU of 48 GB, in 16 bits on two of 80 GB."""
    variants = "quantize={calibration: {mixture: chat}, variants: [gptq-4bit-128g-actorder_True]}"
    made = planned(recipe, "base=./Llama-2-70b-hf", "train=[]", "template=auto", variants)
    plain, packed = made.served
    assert made.context == 4096
    assert (plain.form, packed.form) == ("bfloat16", "gptq-4bit-128g-actorder_True")
    assert packed.least["RTX A6000"] == 1
    assert plain.least["A100 SXM 80 GB"] == 2
    told = made.to_json()["to_run"]
    assert told["forms"][1]["least"]["RTX A6000"] == 1


def test_the_command_prints_what_a_terminal_of_80_columns_shows(recipe, counted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    variants = "quantize={calibration: {mixture: chat}, variants: [gptq-4bit-32g-actorder_True]}"
    arguments = ["--on", "h100", "--best", "2", "--tokens", "second=16000", "--set", variants]
    with pytest.raises(SystemExit) as end:
        main(["plan", str(recipe), *arguments])
    assert not end.value.code
    captured = capsys.readouterr()
    said = captured.out
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["first", "second"]  # no terminal, one each
    assert max(map(len, said.splitlines())) <= 80
    for part in (
        "4 × H100 SXM",
        "first",
        "second",
        "fits",
        "tokens/s/GPU",
        "GPU-hours",
        "the best layouts",
        "1 of 2",
        "to run it",
    ):
        assert part in said


def test_the_command_prints_json(recipe, counted, capsys):
    with pytest.raises(SystemExit):
        main(["plan", str(recipe), "--on", "h100", "--best", "1", "--json"])
    told = json.loads(capsys.readouterr().out)
    first, second = told["stages"]
    assert told["cluster"]["accelerator"] == "H100 SXM"
    assert first["own"]["fits"]
    assert first["own"]["memory_bytes"][0]["total"] > 0
    assert second["own"]["hours"] is None
    assert second["data"]["notes"]
    assert first["best"][0]["seconds"]["products"] > 0


def test_mistakes_are_told(recipe, capsys):
    for arguments, problem in (
        (["--on", "h1000"], "no accelerator `h1000` is known"),
        (["--on", "h100", "--tokens", "third=5"], "there is no stage `third`"),
        (["--on", "h100", "--gpus", "-1"], "gpus is -1"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", str(recipe), *arguments])
        assert problem in capsys.readouterr().err
