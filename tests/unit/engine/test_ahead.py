import threading

import pytest

from llamero.engine.ahead import Ahead


def test_the_next_step_is_made_while_this_one_is_worked_on():
    made, ready = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread().name))
        if step == 4:
            ready.set()
        return step * 10

    with Ahead(make, range(3, 6)) as ahead:
        assert ahead.take(3) == 30
        assert ready.wait(10)  # nobody has asked for it yet
        assert [ahead.take(4), ahead.take(5)] == [40, 50]
    assert [step for step, _ in made] == [3, 4, 5]
    assert all(name.startswith("ahead") for _, name in made[1:])


def test_what_goes_wrong_in_the_thread_is_raised_where_its_step_is_taken():
    def make(step):
        if step == 1:
            raise ValueError("no such row")
        return step

    with Ahead(make, range(3)) as ahead:
        assert ahead.take(0) == 0
        with pytest.raises(ValueError, match="no such row"):
            ahead.take(1)
