"""GPTQ against optimal brain quantization that re-inverts what is left at every step; float64."""

import pytest
import torch

from llamero.model import rtn
from llamero.quantize import gptq

DAMP = 0.01


@pytest.fixture(scope="module")
def layer():
    """A weight and correlated inputs whose channels differ in strength."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(24, 192, generator=generator, dtype=torch.float64)
    mix = torch.randn(192, 192, generator=generator, dtype=torch.float64)
    strength = torch.rand(192, 1, generator=generator, dtype=torch.float64) + 0.1
    x = strength * (mix @ torch.randn(192, 600, generator=generator, dtype=torch.float64))
    return w, x @ x.T


def fit(part, *, bits, sym):
    """One grid per row: (scale, zero); scales are float16."""
    last = 2**bits - 1
    if sym:
        scale = (2 * part.abs().amax(1) / last).half().double()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    high = part.amax(1).clamp(min=0)
    low = torch.minimum(part.amin(1), -high / (last - 1))
    scale = ((high - low) / last).half().double()
    return scale, (-low / scale).round().clamp(1, last)


def brute_force(w, h, *, bits, group_size, sym, actorder):
    """Quantize channel after channel; return the weights that remain."""
    d = w.shape[1]
    size = d if group_size == -1 else group_size
    order = h.diagonal().argsort(descending=True, stable=True) if actorder != "none" else torch.arange(d)
    h = h + DAMP * h.diagonal().mean() * torch.eye(d, dtype=h.dtype)
    h, original, w = h[order][:, order], w, w[:, order].clone()
    q = torch.zeros_like(w)
    scale = zero = torch.zeros(len(w))
    for i in range(d):
        if actorder == "static":
            group = int(order[i]) // size
            scale, zero = fit(original[:, group * size : (group + 1) * size], bits=bits, sym=sym)
        elif i % size == 0:
            scale, zero = fit(w[:, i : i + size], bits=bits, sym=sym)
        q[:, i] = scale * ((w[:, i] / scale).round().add(zero).clamp(0, 2**bits - 1) - zero)
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - q[:, i]) / inverse[0, 0], inverse[0])
    return q[:, order.argsort()]


@pytest.mark.parametrize("actorder", ["none", "static", "desc"])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 16, True), (3, 96, False), (2, 64, True), (4, -1, False)])
def test_gptq_matches_brute_force(layer, bits, group_size, sym, actorder):
    w, h = layer
    how = {"bits": bits, "group_size": group_size, "sym": sym, "actorder": actorder}
    ours = gptq.quantize(w, h, damp=DAMP, **how).dequantize(torch.float64)
    torch.testing.assert_close(ours, brute_force(w, h, **how))


@pytest.mark.parametrize("actorder", ["none", "static", "desc"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding(layer, bits, actorder):
    w, h = layer

    def error(codes):
        off = w - codes.dequantize(torch.float64)
        return ((off @ h) * off).sum()

    solved = error(gptq.quantize(w, h, bits=bits, group_size=64, actorder=actorder))
    assert solved < 0.9 * error(rtn.quantize(w, bits=bits, group_size=64))
