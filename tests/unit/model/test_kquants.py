"""Block formats of GGUF against the decoders of the `gguf` library, which llama.cpp's own project keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.model import kquants

gguf = pytest.importorskip("gguf")


def theirs(data, kind):
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # random bytes hold scales that are no numbers
        return torch.from_numpy(dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def matrix(rows=24, columns=512):
    """Weights as layers have them, and rows as they should not have them."""
    random = torch.Generator().manual_seed(1)
    w = torch.randn(rows, columns, generator=random) * torch.rand(1, columns, generator=random)
    w[0] = 0
    w[1, :256] = 0
    w[2] = w[2].abs()
    w[3] = -w[3].abs()
    w[4] *= 1e-6
    w[5, 7] = 40
    w[6] = 0.25
    return w, torch.rand(columns, generator=random) ** 3 + 0.01


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_sizes_and_numbers_are_those_of_gguf(kind):
    form, number = kquants.KINDS[kind], gguf.GGMLQuantizationType[kind]
    assert (form.block, form.size) == gguf.GGML_QUANT_SIZES[number]
    assert form.number == number.value


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_any_bytes_are_read_as_the_library_reads_them(kind):
    random = np.random.default_rng(3)
    data = torch.from_numpy(random.integers(0, 256, (64, 2 * kquants.KINDS[kind].size), dtype=np.uint8))
    assert torch.equal(kquants.decode(data, kind).nan_to_num(7), theirs(data, kind).nan_to_num(7))


@pytest.mark.parametrize("kind", kquants.KINDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_written_is_near_and_read_alike(kind, weighted):
    w, importance = matrix()
    data = kquants.encode(w, kind, importance=importance if weighted else None)
    assert data.shape == (len(w), w.shape[1] // kquants.KINDS[kind].block * kquants.KINDS[kind].size)
    ours = kquants.decode(data, kind)
    assert torch.equal(ours, theirs(data, kind))
    assert bool(ours.isfinite().all())
    assert bool((ours[0] == 0).all())
    counted = importance if weighted else torch.ones_like(importance)
    error = (((w - ours) ** 2 * counted).sum() / (w**2 * counted).sum()).sqrt()
    bits = int(kind[1])
    assert error < {2: 0.32, 3: 0.17, 4: 0.12, 5: 0.08, 6: 0.03, 8: 0.01}[bits]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_errors_are_not_above_those_of_the_library(kind):
    from gguf.quants import quantize

    w, _ = matrix()
    theirs_made = theirs(torch.from_numpy(quantize(w.numpy(), gguf.GGMLQuantizationType[kind])), kind)
    ours = kquants.decode(kquants.encode(w, kind), kind)
    assert float(((w - ours) ** 2).sum()) <= 1.001 * float(((w - theirs_made) ** 2).sum())


def plainly(w, bits, groups, scale_bits):
    """Each group from its smallest to its largest weight, scales rounded as the format has them; no search."""
    last, top = 2**bits - 1, 2**scale_bits - 1
    parts = w.view(-1, groups, 256 // groups)
    low = (-parts.amin(2)).clamp(min=0)
    step = (parts.amax(2).clamp(min=0) + low) / last
    d, dmin = (v.amax(1, keepdim=True) / top for v in (step, low))
    step = d * (step / d.clamp(min=1e-30)).round()
    low = dmin * (low / dmin.clamp(min=1e-30)).round()
    codes = ((parts + low[..., None]) / step[..., None].clamp(min=1e-30)).round().clamp(0, last)
    return (step[..., None] * codes - low[..., None]).view(len(w), -1)


@pytest.mark.parametrize(("kind", "how"), [("Q2_K", (2, 16, 4)), ("Q4_K", (4, 8, 6)), ("Q5_K", (5, 8, 6))])
def test_searching_is_better_than_taking_the_range(kind, how):
    w, _ = matrix()
    ours = kquants.decode(kquants.encode(w, kind), kind)
    naive = ((w - plainly(w, *how)) ** 2).sum()
    assert float(((w - ours) ** 2).sum() / naive) < {"Q2_K": 0.75, "Q4_K": 0.9, "Q5_K": 0.95}[kind]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_what_counts_more_errs_less(kind):
    w, importance = matrix()
    found = [
        float(((w - kquants.decode(kquants.encode(w, kind, importance=counted), kind)) ** 2 * importance).sum())
        for counted in (importance, None)
    ]
    assert found[0] < found[1]


@settings(max_examples=20)
@given(kind=st.sampled_from(sorted(kquants.KINDS)), seed=st.integers(0, 100), split=st.integers(1, 11))
def test_rows_are_encoded_each_by_itself(kind, seed, split):
    w = torch.randn(12, 256, generator=torch.Generator().manual_seed(seed))
    whole = kquants.encode(w, kind)
    assert torch.equal(whole, torch.cat([kquants.encode(part, kind) for part in (w[:split], w[split:])]))


def test_a_width_that_blocks_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="288 inputs are no multiple of the 256"):
        kquants.encode(torch.zeros(2, 288), "Q4_K")
