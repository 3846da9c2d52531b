from dataclasses import replace
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.core.hardware import ACCELERATORS, accelerator
from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig
from llamero.plan.cluster import Cluster, Group
from llamero.plan.known import config_of
from llamero.plan.published import FITTED, RUNS, fit
from llamero.plan.time import Efficiency, Layout, Work, layer_weights, step_time

H100, A100 = ACCELERATORS["h100"], ACCELERATORS["a100-80gb"]


# -- against published runs


def test_the_constants_are_fitted_to_the_runs_of_8b_models_and_nothing_else():
    used = [run for run in RUNS if run.use == "fit"]
    assert all(run.model == "llama-3.1-8b" and run.layout.ring == 1 and run.sequence == 8192 for run in used)
    fitted, stated = fit(), Efficiency()
    for name in FITTED:
        assert getattr(stated, name) == pytest.approx(getattr(fitted, name), rel=5e-3), name


@pytest.mark.parametrize("run", [run for run in RUNS if run.use == "fit"], ids=lambda run: run.name)
def test_the_fit_is_close(run):
    assert run.predicted() == pytest.approx(run.measured, rel=0.02)


@pytest.mark.parametrize("run", [run for run in RUNS if run.use == "check"], ids=lambda run: run.name)
def test_runs_that_nothing_was_fitted_to_are_foretold_within_a_quarter(run):
    assert run.predicted() == pytest.approx(run.measured, rel=0.25)


def test_all_published_runs_are_there():
    named = {run.measured for run in RUNS if run.use == "check"}
    assert named == {829, 876, 597, 652, 810, 942, 3890, 2540, 1071, 548}


def test_the_page_says_what_the_plan_foretells():
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()
    for run in RUNS:
        foretold = run.predicted()
        row = f"| {run.name} | {run.use} | {run.measured:,g} | {foretold:,.0f} | {foretold / run.measured - 1:+.1%} |"
        assert row in page, f"docs/plan.md lacks: {row}"


# -- by hand


def test_operations_of_a_step():
    llama = config_of("llama-3.1-8b")
    assert layer_weights(llama) * 32 == 6_979_321_856  # 8,030,261,248 less embedding, head and norms
    work = Work(llama, 8192)
    weights = 6_979_321_856 + 128_256 * 4096
    assert work.flops(1) == 6 * weights + 12 * 32 * 4096 * 8193 / 2
    assert replace(work, learned=0.5).flops(1) == work.flops(1) - 3 * 128_256 * 4096
    assert replace(work, frozen=True).flops(1) == work.flops(1) - 2 * weights


@pytest.mark.parametrize("gpus", [4, 32])
def test_the_gradients_of_a_tied_table_cross_a_pipeline_once_a_step(gpus):
    tied = config_of("llama-3.2-1b")
    untied = replace(tied, tie_word_embeddings=False)
    layout, cluster = Layout(pipeline=4, pieces=4, micros=8, shard=gpus // 4), Cluster(H100, gpus)
    both = [step_time(Work(config, 4096), layout, cluster) for config in (tied, untied)]
    more = both[0].data - both[1].data
    rate = Group(2, 3 * gpus // 4).rate(cluster, link=Efficiency().link, network=Efficiency().network)
    assert more == pytest.approx(4 * 128_256 * 2048 / (gpus // 4) / rate + 4e-5)
    frozen = [step_time(Work(config, 4096, frozen=True), layout, cluster) for config in (tied, untied)]
    assert frozen[0] == frozen[1]


def test_a_step_cannot_be_faster_than_its_operations():
    llama = config_of("llama-3.1-8b")
    work = Work(llama, 8192)
    for layout in (Layout(shard=8), Layout(tensor=8), Layout(shard=2, ring=4), Layout(pipeline=8, pieces=8, micros=16)):
        tokens = layout.micros * layout.rows * 8192 * layout.shard
        peak = 8 * H100.tflops["bf16"] * 1e12
        assert step_time(work, layout, Cluster(H100, 8)).total > work.flops(tokens) / peak


def test_what_is_recomputed_is_one_more_forward_pass():
    work = Work(config_of("llama-3.1-8b"), 8192)
    none, selective, full = (
        step_time(work, Layout(shard=8, recompute=how), Cluster(H100, 8)) for how in ("none", "selective", "full")
    )
    assert none.recomputed == 0 < selective.recomputed < full.recomputed
    forward = none.products / 3 + none.attention / (1 + 2.5 / 0.86)
    assert full.recomputed - selective.recomputed == pytest.approx(forward)


def test_groups_use_the_network_where_they_leave_the_node():
    cluster = Cluster(A100, 32)  # 300 GB/s inside, 200 Gbit/s for each outside
    shares = {"link": 1.0, "network": 1.0}
    assert Group(8, 1).rate(cluster, **shares) == 300e9
    assert Group(4, 2).rate(cluster, **shares) == 300e9
    assert Group(4, 8).rate(cluster, **shares) == 25e9  # one of each node
    assert Group(16, 2).rate(cluster, **shares) == 100e9  # four of each node, each with a card of its own
    assert Group(32, 1).rate(cluster, **shares) == 200e9


def test_tensor_parallelism_over_nodes_is_slow():
    work, cluster = Work(config_of("llama-2-70b"), 4096), Cluster(A100, 16)
    inside, outside = step_time(work, Layout(tensor=8, shard=2), cluster), step_time(work, Layout(tensor=16), cluster)
    assert outside.tensor > 3 * inside.tensor


def test_hidden_exchanges_cost_little_and_others_all_they_take():
    work = Work(config_of("llama-2-70b"), 4096)
    fast, slow = (
        step_time(work, Layout(shard=16, rows=4), Cluster(A100, 16, network_gbit_s=gbit)) for gbit in (400, 4)
    )
    assert fast.data < 0.1 * fast.total
    assert slow.data > 0.5 * slow.total
    assert replace(fast, data=0.0) == replace(slow, data=0.0)


def test_a_recipes_layout_is_taken_over_key_by_key():
    parallel = ParallelConfig(
        gpus=64, replicate=2, tensor=4, pipeline=2, schedule="interleaved", micro_batch=2, recompute="full",
        sequence_parallel=False, reduce_dtype="bfloat16",
    )  # fmt: skip
    layout = Layout.of(parallel, 64)
    assert layout.gpus == 64
    assert (layout.replicate, layout.shard, layout.tensor, layout.pipeline, layout.pieces) == (2, 4, 4, 2, 4)
    assert (layout.micros, layout.rows, layout.reduce_bytes, layout.recompute) == (4, 2, 2, "full")
    assert not layout.sequence_parallel


def test_a_layout_needs_as_many_devices_as_the_cluster_has():
    with pytest.raises(LlameroError, match="the layout is for 8 devices, the cluster has 16"):
        step_time(Work(config_of("llama-2-7b"), 4096), Layout(shard=8), Cluster(A100, 16))


def test_a_device_computes_only_in_what_it_has():
    with pytest.raises(LlameroError, match="does not compute in fp8"):
        step_time(Work(config_of("llama-2-7b"), 4096, precision="fp8"), Layout(), Cluster(A100, 1))
    with pytest.raises(LlameroError, match="does not compute in bf16"):
        step_time(Work(config_of("llama-2-7b"), 4096), Layout(), Cluster(accelerator("v100-32gb"), 1))


def test_slower_clocks_where_power_is_held():
    cluster = Cluster(H100, 8).at_power(350, of=700)
    assert cluster.accelerator.tflops["bf16"] == pytest.approx(H100.tflops["bf16"] / 2 ** (1 / 3))
    assert cluster.accelerator.memory_gib == H100.memory_gib


# -- totals of published recipes


def test_the_tokens_of_the_long_context_ladder():
    """The card of Llama-3-70B-Instruct-Gradient-524k and -1048k: rows of a step are rings times accumulation."""
    stated = [(16, 64, 1, 20, 83_886_080), (18, 16, 1, 25, 104_857_600), (19, 8, 2, 25, 209_715_200)]
    stated.append((20, 1, 4, 8, 33_554_432))
    for power, rings, accumulated, steps, tokens in stated:
        keys = {"name": "long", "mixture": "x", "objective": "lm", "sequence": 2**power, "steps": steps, "lr": 2e-5}
        stage = StageConfig.model_validate({**keys, "batch": rings * accumulated})
        assert stage.steps is not None
        assert stage.steps * stage.batch * stage.sequence == tokens
