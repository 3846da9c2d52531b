"""AWQ against a search that really runs every candidate; float64."""

import pytest
import torch

from llamero.quantize import awq

BITS, GROUP = 3, 16


@pytest.fixture(scope="module", params=[0, 1, 2])
def layer(request):
    """A weight and inputs of which a few channels are far stronger than the others."""
    generator = torch.Generator().manual_seed(request.param)
    w = torch.randn(24, 64, generator=generator, dtype=torch.float64)
    w[:, 7] *= 4
    strength = 10 ** (torch.rand(64, 1, generator=generator, dtype=torch.float64) * 2 - 1)
    return w, strength * torch.randn(64, 500, generator=generator, dtype=torch.float64)


def rounded(w):
    """Round to asymmetric grids, group by group, as files hold them."""
    out = torch.empty_like(w)
    for start in range(0, w.shape[1], GROUP):
        part = w[:, start : start + GROUP]
        last = 2**BITS - 1
        high = part.amax(1, keepdim=True).clamp(min=0)
        low = torch.minimum(part.amin(1, keepdim=True), -high / (last - 1))
        scale = ((high - low) / last).half().double()
        zero = (-low / scale).round().clamp(1, last)
        out[:, start : start + GROUP] = scale * ((part / scale).round().add(zero).clamp(0, last) - zero)
    return out


def test_the_scales_are_those_whose_outputs_are_nearest(layer):
    w, x = layer
    activity = x.abs().mean(1)
    grouped = w.abs().view(24, -1, GROUP)
    weight = (grouped / (grouped.amax(2, keepdim=True) + 1e-6)).view(24, -1).mean(0)
    best = torch.ones(64, dtype=w.dtype), float("inf")
    for step in range(-1, 20):
        s = torch.ones(64, dtype=w.dtype)
        if step >= 0:
            s = (activity ** (step / 20) / (weight ** (1 - step / 20) + 1e-4)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
        error = float(((rounded(w * s) @ (x / s[:, None]) - w @ x) ** 2).sum())
        if error < best[1]:
            best = s, error
    found = awq.search(w, x @ x.T, activity, bits=BITS, group_size=GROUP)
    torch.testing.assert_close(found.scales, best[0], rtol=1e-12, atol=0)
    assert found.error == pytest.approx(best[1], rel=1e-6)
    assert found.error < float(((rounded(w) @ x - w @ x) ** 2).sum())


def test_a_range_is_clipped_where_the_outputs_of_its_group_come_nearer(layer):
    w, x = layer
    expected = w.clone()
    for start in range(0, 64, GROUP):
        inputs = x[start : start + GROUP]
        for row in range(24):
            part = w[row : row + 1, start : start + GROUP]
            least = float("inf")
            for step in range(10):
                reach = part.abs().max() * (1 - step / 20)
                cut = part.clamp(-reach, reach)
                error = float((((rounded(cut) - part) @ inputs) ** 2).sum())
                if error < least - 1e-9:
                    least, expected[row, start : start + GROUP] = error, cut[0]
    found = awq.clip(w, x @ x.T, bits=BITS, group_size=GROUP)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert bool((found != w).any())
