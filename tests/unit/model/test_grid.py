import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamero.model import grid, rtn


def test_a_symmetric_grid_has_its_zero_in_the_middle():
    grids = grid.fit(torch.tensor([[-1.0, 0.5], [0.25, 0.25]]), dim=1, bits=4, sym=True)
    assert grids.zero.tolist() == [8, 8]
    assert grids.scale.tolist() == torch.tensor([2 / 15, 0.5 / 15]).half().tolist()


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16),
    st.sampled_from([2, 3, 4, 8]),
)
def test_an_asymmetric_grid_covers_its_weights_and_its_zero_is_at_least_one(weights, bits):
    w = torch.tensor([weights])
    grids = grid.fit(w, dim=1, bits=bits, sym=False)
    assert 1 <= int(grids.zero) <= 2**bits - 1
    reach = grids.decode(torch.tensor([[0.0], [2**bits - 1.0]]))  # (2, 1)
    slack = float(grids.scale) * 0.51 + 1e-3 * float(w.abs().max())
    assert float(reach[0]) - slack <= float(w.min())
    assert float(w.max()) <= float(reach[1]) + slack


def test_a_group_of_zeros_stays_zero():
    for sym in (True, False):
        assert rtn.quantize(torch.zeros(2, 32), bits=4, group_size=32, sym=sym).dequantize().abs().max() == 0


def test_weights_too_small_for_a_scale_do_not_become_infinite():
    codes = rtn.quantize(torch.full((2, 32), 1e-9), bits=4, group_size=32)
    assert codes.dequantize().isfinite().all()
    assert codes.scales.min() > 0


def test_rounding_errs_by_half_a_step_at_most():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes = rtn.quantize(w, bits=4, group_size=16, sym=False)
    step = codes.scales.float().repeat_interleave(16, dim=1)
    assert ((w - codes.dequantize()).abs() <= 0.51 * step + 0.01).all()


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]), st.booleans())
def test_a_search_finds_the_best_of_its_candidates(seed, bits, sym):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(12, 3, generator=random, dtype=torch.float64)
    importance = torch.rand(12, 1, generator=random, dtype=torch.float64)
    shrinks = (0.6, 0.8, 0.9)
    found = grid.search(w, importance, dim=0, bits=bits, sym=sym, shrinks=shrinks)
    whole = grid.fit(w, dim=0, bits=bits, sym=sym)

    def error(column, scale, zero):
        squares = []
        for x in w[:, column].tolist():
            code = min(max(round(x / scale) + zero, 0), 2**bits - 1)
            squares.append((x - scale * (code - zero)) ** 2)
        return float((torch.tensor(squares, dtype=torch.float64) * importance[:, 0]).sum())

    for column in range(3):
        full, zero = float(whole.scale[column]), int(whole.zero[column])
        tried = [(full, zero)]
        for shrink in shrinks:
            scale = float(torch.tensor(full * shrink).half())
            around = [min(max(zero + step, 1), 2**bits - 1) for step in (-1, 0, 1)]
            tried += [(scale, zero), (-scale, zero)] if sym else [(scale, z) for z in around]
        best = min(error(column, *each) for each in tried)
        assert error(column, float(found.scale[column]), int(found.zero[column])) <= best * (1 + 1e-9)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (4, -1), (8, 16)])
def test_the_nearest_values_are_those_of_the_nearest_codes(bits, group_size, sym):
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(bits))
    how = {"bits": bits, "group_size": group_size, "sym": sym}
    assert torch.equal(rtn.nearest(w, **how), rtn.quantize(w, **how).dequantize())
