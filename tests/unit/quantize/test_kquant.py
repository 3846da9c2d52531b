"""GPTQ within the blocks of GGUF types, against brute force."""

import pytest
import torch

from llamero.model.kquants import KINDS, decode, fit, round_to
from llamero.quantize.gptq import factorize
from llamero.quantize.kquant import gptq, gptq_each


def layer(kind, *, out=5):
    """A weight of three blocks and the second moment of inputs that go together."""
    d = 3 * KINDS[kind].block
    random = torch.Generator().manual_seed(4)
    mixing = torch.randn(d, d, generator=random) / d**0.5 + torch.eye(d)
    x = torch.randn(4 * d, d, generator=random) @ mixing * torch.rand(d, generator=random).add(0.1)
    return torch.randn(out, d, generator=random), x.T @ x


def brute_force(w, h, kind, *, importance):
    """Optimal brain quantization in channel order: re-invert what is left at every step."""
    h = h.double() + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    w, width, made = w.double().clone(), KINDS[kind].block, torch.zeros_like(w)
    for start in range(0, w.shape[1], width):
        part = slice(start, start + width)
        step, low = fit(w[:, part].float(), kind, importance=importance[part], thorough=False).grid()
        first, last = fit(w[:, part].float(), kind).ends
        for i in range(start, start + width):
            j = i - start
            code = ((w[:, i].float() + low[:, j]) / step[:, j]).round().clamp(first, last)
            made[:, i] = step[:, j] * code - low[:, j]
            inverse = torch.linalg.inv(h[i:, i:])
            w[:, i:] -= torch.outer((w[:, i] - made[:, i]) / inverse[0, 0], inverse[0])
    return made


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_gptq_in_blocks_matches_brute_force(kind):
    w, h = layer(kind)
    found = gptq(w, factorize(h, by_activation=False, damp=0.01), kind, importance=h.diagonal()).dequantize()
    expected = brute_force(w, h, kind, importance=h.diagonal())
    same = torch.isclose(found, expected, rtol=0, atol=1e-6).float().mean()
    assert same > 0.97, "a weight halfway between two values may go either way, and its neighbours after it"


def test_kinds_that_are_made_together_are_those_that_are_made_alone():
    w, h = layer("Q4_K", out=7)
    kinds, factor = ["Q2_K", "Q4_0", "Q3_K", "Q6_K", "Q8_0", "Q4_K"], factorize(h, by_activation=False, damp=0.01)
    together = gptq_each(w, factor, kinds, importance=h.diagonal())
    assert list(together) == ["Q2_K", "Q3_K", "Q6_K", "Q4_K", "Q4_0", "Q8_0"]  # blocks of one length side by side
    for kind in kinds:
        assert torch.equal(together[kind].data, gptq(w, factor, kind, importance=h.diagonal()).data)


def error(w, made, h):
    return float((((w - made) @ h) * (w - made)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_errs_less_than_rounding_and_fits_the_same_bytes(kind):
    w, h = layer(kind)
    importance = h.diagonal() / len(h)
    plain = round_to(w, kind, importance=importance)
    found = gptq(w, factorize(h, by_activation=False, damp=0.01), kind, importance=importance)
    assert found.data.shape == plain.data.shape
    assert torch.equal(found.dequantize(), decode(found.data, kind))
    assert error(w, found.dequantize(), h) < 0.75 * error(w, plain.dequantize(), h)


def test_dead_channels_and_rows_of_zeros_stay_finite():
    w, h = layer("Q4_K")
    h[:, 7] = h[7] = 0
    w[2] = 0
    factor = factorize(h, by_activation=False, damp=0.01)
    made = gptq(w, factor, "Q4_K", importance=h.diagonal()).dequantize()
    assert bool(made.isfinite().all())
    assert bool((made[2] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_blocks_is_what_their_codes_mean(kind):
    w, _ = layer(kind)
    found = fit(w, kind)
    step, low = found.grid()
    codes = found.codes.flatten(1).float()
    first, last = found.ends
    assert first <= codes.min()
    assert codes.max() <= last
    torch.testing.assert_close((step * codes - low).view(w.shape), round_to(w, kind).dequantize())
