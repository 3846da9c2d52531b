import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.quantize import statistics
from llamero.quantize.statistics import Sums, Units, units


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(statistics, "LEAST", 4)
    monkeypatch.setattr(statistics, "WIDE", 16)


def inputs(groups=6, width=40, seed=0, spread=3.0):
    """Groups of inputs whose channels differ in size, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    size = (spread * torch.randn(width, generator=generator)).exp()
    return [torch.randn(7 + i, width, generator=generator) * size for i in range(groups)]


def summed(groups, unit, **how):
    sums = Sums(unit, **how)
    for x in groups:
        sums.add(x)
    return sums


def test_sums_are_those_of_brute_force():
    groups = inputs()
    found = summed(groups, units(groups[0], len(groups))).statistics("x")
    x = torch.cat(groups).double()
    scale = (x.square().sum(0)[:, None] * x.square().sum(0)).sqrt()
    assert (((found.second_moment - x.T @ x) / scale).abs() < 1e-6).all()
    assert torch.equal(found.second_moment, found.second_moment.T)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(found.absmax, x.abs().amax(0).float())
    assert found.tokens == len(x)
    assert torch.equal(found.channels.energy, found.second_moment.diagonal())


def test_without_products_the_diagonal_is_the_same():
    groups = inputs()
    unit = units(groups[0], len(groups))
    alone, whole = summed(groups, unit, products=False).channels("x"), summed(groups, unit).statistics("x").channels
    torch.testing.assert_close(alone.energy, whole.energy, rtol=1e-6, atol=0)
    assert torch.equal(alone.mean_abs, whole.mean_abs)
    assert torch.equal(alone.absmax, whole.absmax)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("second_moment", "mean_abs", "absmax"))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), spread=st.floats(0, 6))
def test_any_number_of_processes_in_any_order_sums_to_the_same_bytes(seed, spread):
    groups = inputs(8, 24, seed, spread)
    unit = units(groups[0], len(groups))
    alone = summed(groups, unit).statistics("x")
    for ranks in (2, 4):
        for order in itertools.islice(itertools.permutations(range(ranks)), 6):
            parts = [summed(groups[rank::ranks][::-1], unit) for rank in range(ranks)]
            total = Sums(unit)
            for rank in order:
                total.merge(parts[rank])
            assert equal(total.statistics("x"), alone)


def test_plain_sums_would_depend_on_the_order():
    groups = inputs(8, 24)
    one = torch.zeros(24, 24)
    other = one.clone()
    for x in groups:
        one += x.T @ x
    for x in reversed(groups):
        other += x.T @ x
    assert not torch.equal(one, other)


def error_of_bfloat16(groups, unit):
    """Return by how much sums over bfloat16 inputs are off, at most, as shares of the sizes of both channels."""
    found = summed(groups, unit).statistics("x")
    assert torch.equal(found.second_moment, found.second_moment.T)
    x = torch.cat(groups).double()
    size = x.square().sum(0).sqrt()
    return float(((found.second_moment - x.T @ x) / torch.outer(size, size)).abs().max())


def test_of_bfloat16_only_what_was_not_expected_is_rounded():
    """Text is alike: what a group is off by the first one is a fraction of it."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(40, generator=generator)
    groups = [(common + 0.5 * torch.randn(512, 40, generator=generator)).bfloat16() for _ in range(8)]
    unit = units(groups[0], len(groups))
    assert unit.expected is not None
    unaware = Units(unit.scale, unit.unit, torch.zeros_like(unit.expected))
    assert 3 * error_of_bfloat16(groups, unit) < error_of_bfloat16(groups, unaware)
    assert error_of_bfloat16(groups, Units(unit.scale, unit.unit)) < 1e-5  # as float32 where nothing is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-3.0, 0.0, -torch.inf, torch.inf, torch.nan])
def test_the_largest_magnitude_shows_what_is_no_number(dtype, value):
    x = torch.tensor([[1.0, -2.0], [-1.0, value]], dtype=dtype)
    torch.testing.assert_close(statistics.largest(x), x.abs().amax(0).float(), equal_nan=True)


def test_sums_in_different_units_do_not_mix():
    with pytest.raises(ValueError, match="different units"):
        Sums(units(torch.ones(3, 4), 1)).merge(Sums(units(100 * torch.ones(3, 4), 1)))


def test_a_first_group_of_zeros_is_no_obstacle():
    x = torch.ones(4, 8)
    found = summed([0 * x, x, x], units(0 * x, 3)).statistics("x")
    assert torch.equal(found.second_moment, torch.full((8, 8), 8.0))


def test_inputs_far_larger_than_the_first_are_told(caplog):
    x = torch.ones(4, 8)
    with caplog.at_level(logging.WARNING):
        found = summed([x, 1e5 * x], units(x, 2)).statistics("model.layers.3.mlp.down_proj")
    assert "model.layers.3.mlp.down_proj: much larger inputs" in caplog.text
    torch.testing.assert_close(found.second_moment, torch.full((8, 8), 4 * (1e10 + 1)))


def test_dead_channels_are_counted():
    x = torch.ones(4, 8)
    x[:, 2:5] = 0
    assert summed([x], units(x, 1)).statistics("x").channels.dead == 3
