import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamero.data import draw


def test_keys_depend_on_the_sample_alone():
    together = draw.keys(1, "a", "val", np.arange(10), np.arange(10) % 3)
    assert [int(draw.keys(1, "a", "val", np.asarray([i]), i % 3)[0]) for i in range(10)] == together.tolist()


def test_seed_source_and_purpose_give_other_keys():
    said = [(1, "a", "val"), (2, "a", "val"), (1, "b", "val"), (1, "a", "take")]
    assert len({tuple(draw.keys(*what, np.arange(3)).tolist()) for what in said}) == 4


def test_keys_are_those_of_splitmix64():
    """The first outputs of the generator that is seeded with 0, as its authors publish them."""
    state = (np.arange(3, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    assert draw._mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_shares_are_met_and_purposes_are_independent():
    units = np.arange(200_000)
    first = draw.below(draw.keys(7, "a", "val", units), 0.25)
    second = draw.below(draw.keys(7, "a", "take", units), 0.5)
    assert abs(first.mean() - 0.25) < 0.005
    assert abs((first & second).mean() - 0.125) < 0.005
    assert not draw.below(draw.keys(7, "a", "val", units), 0.0).any()


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 14))
def test_the_lowest_are_those_that_sorting_puts_first(found, count):
    chosen = draw.lowest(np.asarray(found, dtype=np.uint64), count)
    order = sorted(range(len(found)), key=lambda number: (found[number], number))
    assert sorted(order[:count]) == np.flatnonzero(chosen).tolist()
