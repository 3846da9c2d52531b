import itertools

import pytest
import torch

from llamero.checkpoint.codes import GroupCodes
from llamero.quantize import gptq
from llamero.quantize.refine import refine

DAMP = 0.01


def layer(outputs=24, inputs=256, *, dead=False):
    random = torch.Generator().manual_seed(0)
    w = torch.randn(outputs, inputs, generator=random, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = mix @ torch.randn(inputs, 3 * inputs, generator=random, dtype=torch.float64)
    if dead:
        x[5] = 0
    return w, x @ x.T


def error(w, h, codes):
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    change = w - codes.dequantize(torch.float64)
    return float(((change @ h) * change).sum())


@pytest.mark.parametrize("actorder", ["none", "static", "desc"])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, 32, True), (3, 64, False), (4, -1, True)])
def test_every_sweep_errs_less(bits, group_size, sym, actorder):
    w, h = layer()
    codes = gptq.quantize(w, h, bits=bits, group_size=group_size, sym=sym, actorder=actorder, damp=DAMP)
    found = [error(w, h, codes)]
    for sweeps in (1, 2, 4):
        made = refine(w, h.clone(), codes, damp=DAMP, sweeps=sweeps)
        assert int(made.codes.max()) < 2**bits
        assert torch.equal(made.g_idx, codes.g_idx)
        assert torch.equal(made.zeros, codes.zeros)
        assert made.scales.dtype == torch.float16
        found.append(error(w, h, made))
    assert all(later < before for before, later in itertools.pairwise(found))
    assert found[-1] < 0.97 * found[0]


def test_no_single_code_can_be_bettered():
    """After the last sweep each code is the best one with all others as they are."""
    w, h = layer(3, 64)
    start = gptq.quantize(w, h, bits=2, group_size=32, damp=DAMP)
    made = refine(w, h.clone(), start, damp=DAMP, sweeps=40)
    least = error(w, h, made)
    for row, column in itertools.product(range(3), range(64)):
        for code in range(4):
            codes = made.codes.clone()
            codes[row, column] = code
            other = GroupCodes(codes, made.scales, made.zeros, made.g_idx, 2)
            assert error(w, h, other) >= least * (1 - 1e-9)


def test_channels_without_activity_stay_at_zero():
    w, h = layer(dead=True)
    start = gptq.quantize(w, h, bits=3, group_size=64, damp=DAMP)
    assert bool((refine(w, h.clone(), start, damp=DAMP, sweeps=2).dequantize()[:, 5] == 0).all())


def test_many_rows_are_refined_as_if_alone(monkeypatch):
    w, h = layer(outputs=11)
    start = gptq.quantize(w, h, bits=3, group_size=64, actorder="static", damp=DAMP)
    whole = refine(w, h, start, damp=DAMP, sweeps=2)
    monkeypatch.setattr("llamero.quantize.refine.ROWS", 4)
    parts = refine(w, h, start, damp=DAMP, sweeps=2)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
