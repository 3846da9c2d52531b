import pytest

from llamero.plan.order import Durations, orders, seconds


def bubble(schedule, ranks, pieces, micros):
    """Return the share of a step that a rank waits, where a pass of a rank's pieces takes 1, and backward 2."""
    each = ranks / pieces
    whole, busy = seconds(schedule, ranks, micros, [Durations(each, each, each)] * pieces, hop=0.0)
    assert busy == pytest.approx([3 * micros] * ranks)
    return (whole - busy[0]) / whole


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_bubbles_are_those_of_the_papers(ranks, rounds):
    micros = ranks * rounds
    for schedule in ("gpipe", "1f1b"):
        assert bubble(schedule, ranks, ranks, micros) == pytest.approx((ranks - 1) / (micros + ranks - 1))
    interleaved = bubble("interleaved", ranks, 2 * ranks, micros)
    assert interleaved == pytest.approx((ranks - 1) / (2 * micros + ranks - 1))  # arXiv:2104.04473, section 2.2
    assert bubble("zero-bubble", ranks, 2 * ranks, micros) < interleaved


def test_a_step_takes_as_long_as_its_slowest_place_and_what_leads_there():
    # by hand: F0 F1 | B1 B0 with a hop of 1 between, the second piece three times as slow
    whole, busy = seconds("gpipe", 2, 1, [Durations(1, 1, 1), Durations(3, 3, 3)], hop=1.0)
    assert whole == 1 + 1 + 3 + 6 + 1 + 2
    assert busy == [3, 9]


@pytest.mark.parametrize(("schedule", "pieces"), [("gpipe", 4), ("1f1b", 4), ("interleaved", 8), ("zero-bubble", 8)])
def test_every_piece_sees_every_micro_batch_once(schedule, pieces):
    for rank, plan in enumerate(orders(schedule, 4, pieces, 8)):
        assert {action.piece for action in plan} == set(range(rank, pieces, 4))
        assert len(set(plan)) == len(plan)
        forward = [action for action in plan if action.kind == "F"]
        assert len(forward) == 8 * pieces // 4
        assert {action._replace(kind="F") for action in plan} == set(forward)
