"""The mathematics around the Triton kernel, without Triton; the kernel itself is tested in tests/gpu."""

import pytest
import torch

from llamero.checkpoint.codes import GroupCodes
from llamero.kernels import low_bit, w4a16


def coded(group=64, *, bits=4, shuffled=False):
    generator = torch.Generator().manual_seed(bits)
    g_idx = torch.arange(256) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(256, generator=generator)]
    return GroupCodes(
        torch.randint(0, 2**bits, (48, 256), generator=generator).to(torch.uint8),
        (torch.rand(48, 256 // group, generator=generator) + 0.5).half(),
        torch.randint(0, 2**bits, (48, 256 // group), generator=generator).to(torch.uint8),
        g_idx.to(torch.int32),
        bits,
    )


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_form_keeps_the_weights_and_its_twin_multiplies_them(bits, group, shuffled):
    weight = coded(group, bits=bits, shuffled=shuffled)
    form = w4a16.Fused(weight, low_bit.side_by_side(weight)[0])
    assert torch.equal(form.weight(torch.float32), weight.dequantize())
    assert torch.equal(form.weight(torch.bfloat16), weight.dequantize().bfloat16())
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))  # float32 goes the plain way
    torch.testing.assert_close(form(x), low_bit.plain(x, weight), rtol=1e-5, atol=1e-3)


def test_what_the_kernel_does_not_take_is_said():
    assert w4a16.Fused.refuses(coded(bits=8)) == "8-bit codes"
    assert w4a16.Fused.refuses(coded(16)) == "groups of 16"
    assert not w4a16.Fused.refuses(coded(32))


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 513, 4096])
@pytest.mark.parametrize("outputs", [64, 4096])
@pytest.mark.parametrize("steps", [4, 128])
def test_every_share_has_inputs(rows, outputs, steps):
    shares = w4a16.shares_of(rows, outputs, steps)
    each = -(-steps // shares)
    assert shares >= 1
    assert each * shares >= steps
    assert shares == 1 or rows * outputs < 256 * 64 * 64
