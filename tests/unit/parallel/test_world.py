from types import SimpleNamespace
from typing import Any

from llamero.parallel.world import World


def test_a_barrier_sums_something_because_of_nothing_gloo_makes_no_sum():
    summed: list[list[float]] = []
    world: Any = SimpleNamespace(sum=summed.append)
    World.barrier(world)
    assert [len(values) for values in summed] == [1]
