from dataclasses import replace

import pytest

from llamero.core.hardware import ACCELERATORS
from llamero.parallel.config import ParallelConfig
from llamero.parallel.layout import refuse_impossible
from llamero.plan.cluster import Cluster
from llamero.plan.known import config_of
from llamero.plan.memory import Memory
from llamero.plan.search import ROOM, brief, less, possible, rough_bytes, search
from llamero.plan.time import Layout, Work, step_time

A100 = ACCELERATORS["a100-80gb"]
SMALL, LARGE = config_of("tinyllama-1.1b"), config_of("llama-2-70b")


@pytest.mark.parametrize(("config", "gpus", "batch"), [(SMALL, 8, 16), (LARGE, 32, 8), (LARGE, 24, 24)])
def test_every_layout_that_is_looked_at_is_legal(config, gpus, batch):
    found = list(possible(config, Cluster(A100, gpus), batch=batch, like=ParallelConfig(gpus=gpus, compile=True)))
    assert found
    assert len({parallel.model_dump_json() for parallel in found}) == len(found)
    for parallel in found:
        assert parallel.gpus == gpus
        assert parallel.compile  # as the recipe has it
        refuse_impossible(parallel, config, batch=batch)  # raises where it is impossible
        assert parallel.tensor <= 8


def test_tensor_parallelism_stays_inside_a_node():
    found = possible(LARGE, Cluster(A100, 8, per_node=2), batch=8, like=ParallelConfig(gpus=8))
    assert max(parallel.tensor for parallel in found) == 2


def found(weigh, *, count=3, most=10, batch=16, config=SMALL, gpus=8):
    work, cluster = Work(config, 2048), Cluster(A100, gpus)
    like = ParallelConfig(gpus=gpus)
    return search(work, cluster, batch=batch, like=like, weigh=weigh, count=count, most=most)


def test_the_fastest_that_fit_come_first():
    def weigh(parallel):  # whatever has no tensor parallelism is too large
        return Memory(weights=0 if parallel.tensor > 1 else 10**12)

    best = found(weigh, most=1000).best
    assert len(best) == 3
    assert all(one.parallel.tensor > 1 for one in best)
    times = [one.parts.total for one in best]
    assert times == sorted(times)
    work = Work(SMALL, 2048)
    for parallel in possible(SMALL, Cluster(A100, 8), batch=16, like=ParallelConfig(gpus=8)):
        if parallel.tensor > 1:
            assert step_time(work, Layout.of(parallel, 16), Cluster(A100, 8)).total >= times[0]


def test_a_layout_that_just_fits_fits_and_one_byte_more_does_not():
    room = int(ROOM * A100.memory_gib * 2**30)
    assert len(found(lambda parallel: Memory(weights=room)).best) == 3
    nothing = found(lambda parallel: Memory(weights=room + 1))
    assert not nothing.best
    assert nothing.weighed <= 30


def test_what_needs_more_than_one_that_does_not_fit_is_not_weighed():
    seen = []

    def weigh(parallel):
        seen.append(parallel)
        return Memory(weights=10**12)

    found(weigh, most=1000)
    recomputed = {"none": 0, "selective": 1, "full": 2}
    for number, parallel in enumerate(seen):
        for before in seen[:number]:
            same = all(
                getattr(parallel, key) == getattr(before, key)
                for key in ("replicate", "sharded", "tensor", "pipeline", "schedule")
            )
            more = parallel.micro_batch >= before.micro_batch and parallel.zero_stage <= before.zero_stage
            assert not (same and more and recomputed[parallel.recompute] <= recomputed[before.recompute])


def test_hopeless_layouts_are_counted():
    told = found(lambda parallel: Memory(), config=LARGE, batch=8, gpus=32)
    assert told.hopeless > 0
    work = Work(LARGE, 2048)
    for one in told.best:
        assert rough_bytes(work, one.parallel, 8) <= ROOM * A100.memory_gib * 2**30
    assert found(lambda parallel: Memory(), config=LARGE, gpus=1).best == []  # 70 B do not train on one


def test_ways_to_need_less_are_legal_and_need_less():
    start = ParallelConfig(gpus=32, tensor=8, pipeline=2, recompute="selective", micro_batch=4)
    ways = list(less(start, micro=4))
    assert [(way.recompute, way.micro_batch) for way in ways[:3]] == [("selective", 1), ("full", 4), ("full", 1)]
    assert ways[-1].offload
    assert all((way.tensor, way.pipeline, way.sharded) == (8, 2, 2) for way in ways)
    already = ParallelConfig(gpus=2, recompute="full", micro_batch=1, zero=3, offload=True)
    assert list(less(already, micro=1)) == []


def test_the_rough_count_of_what_rests_is_exact_in_its_largest_part():
    parallel = ParallelConfig(gpus=64, recompute="full", micro_batch=1)
    numbers = 68_976_648_192  # Llama-2-70B
    resting = 16 * numbers / 64
    kept = 80 * 2048 * 4 * 8192
    assert rough_bytes(Work(LARGE, 2048), parallel, 64) == pytest.approx(resting + kept, rel=0.001)


def test_a_layout_in_a_few_words():
    parallel = ParallelConfig(gpus=64, tensor=8, pipeline=4, recompute="selective", micro_batch=2)
    assert brief(parallel) == "tensor 8, pipeline 4, shard 2, 1f1b, recompute selective, micro_batch 2"
    assert brief(ParallelConfig()) == ""


def test_more_memory_never_makes_the_best_slower():
    small = found(lambda parallel: Memory(), config=LARGE, batch=8, gpus=32).best[0]
    large = search(
        Work(LARGE, 2048),
        Cluster(replace(A100, memory_gib=160), 32),
        batch=8,
        like=ParallelConfig(gpus=32),
        weigh=lambda parallel: Memory(),
    ).best[0]
    assert large.parts.total <= small.parts.total
