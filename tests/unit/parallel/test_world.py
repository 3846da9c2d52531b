from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from llamero.parallel import world as worlds
from llamero.parallel.world import World


@pytest.fixture
def watch(monkeypatch):
    """The first of two processes; `at` lets it look around at a time and returns whom it then ends with, and why."""
    watch: Any = worlds._Watch(HashStore(), 0, 2, timeout=100)
    watch._store.set("host1", "there")

    def at(time: float, said: str) -> list[tuple[int, str]]:
        ended: list[tuple[int, str]] = []
        monkeypatch.setattr(worlds.time, "monotonic", lambda: time)
        monkeypatch.setattr(watch, "_end", lambda other, problem: ended.append((other, problem)))
        watch._store.set("beat1", said)
        watch._look_around(1)
        return ended

    watch.at = at
    return watch


def test_a_process_that_ends_by_itself_ends_those_that_need_it(watch):
    watch.needs_all = True
    assert not watch.at(0, "1 0 3")
    assert not watch.at(50, "2 0 3")
    assert not watch.at(55, "left")
    assert not watch.at(110, "left")
    assert watch.at(120, "left") == [(1, "has ended, and the others cannot go on without it")]


def test_a_process_that_is_no_longer_needed_may_end(watch):
    assert not watch.at(0, "1 0 3")
    assert not watch.at(1, "left")
    assert not watch.at(1000, "left")


def test_a_silent_process_is_named_with_its_last_step(watch):
    assert not watch.at(0, "1 0 3")
    assert not watch.at(100, "1 0 3")
    assert watch.at(101, "1 0 3") == [(1, "has been silent for 101 s, since step 3")]
    assert not watch.at(102, "2 0 3")


def test_one_that_works_on_may_keep_the_others_waiting_as_long_as_it_is_given(watch):
    watch.longest, watch.waiting_since, watch.meetings = 1000, 0, 5
    assert not watch.at(101, "1 4 3")
    assert not watch.at(999, "2 4 3")
    assert watch.at(1001, "3 4 3") == [(1, "keeps the others waiting for 1001 s, at step 3")]
    assert not watch.at(1002, "4 5 3")


def test_a_barrier_sums_something_because_of_nothing_gloo_makes_no_sum():
    summed: list[list[float]] = []
    world: Any = SimpleNamespace(sum=summed.append)
    World.barrier(world)
    assert [len(values) for values in summed] == [1]
