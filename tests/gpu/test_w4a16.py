"""The Triton product with 4-bit codes. Without a GPU it runs in Triton's interpreter: `TRITON_INTERPRET=1`."""

import os

import pytest
import torch

from llamero.checkpoint.codes import GroupCodes
from llamero.kernels import low_bit, w4a16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device"),
]


def coded(outputs, inputs, group, *, bits=4, shuffled=False, dtype=torch.float16):
    generator = torch.Generator().manual_seed(outputs + inputs)
    g_idx = torch.arange(inputs) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return GroupCodes(
        torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8).to(DEVICE),
        (torch.rand(outputs, inputs // group, generator=generator) * 0.01 + 0.001).to(dtype).to(DEVICE),
        torch.randint(0, 2**bits, (outputs, inputs // group), generator=generator).to(torch.uint8).to(DEVICE),
        g_idx.to(torch.int32).to(DEVICE),
        bits,
    )


# the interpreter multiplies the bits of bfloat16, not the numbers
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(1, 96, 128, 32), (7, 64, 256, 64), (33, 160, 256, 256), (70, 200, 128, 128)],
)
@pytest.mark.parametrize(("bits", "shuffled"), [(4, False), (4, True), (3, False)])
def test_the_kernel_computes_what_its_twin_computes(rows, outputs, inputs, group, bits, shuffled, dtype):
    weight = coded(outputs, inputs, group, bits=bits, shuffled=shuffled, dtype=dtype)
    form = w4a16.prepare(weight, dtype)
    assert isinstance(form, w4a16.Fused)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    expected = x.double() @ weight.dequantize(torch.float32).to(dtype).double().T
    close = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(form(x).double(), expected, atol=close, rtol=0)
    torch.testing.assert_close(low_bit.plain(x, weight).double(), expected, atol=close, rtol=0)


def test_inputs_are_shared_out_and_summed(monkeypatch):
    weight = coded(64, 2048, 128)
    form = w4a16.prepare(weight, torch.float16)
    assert isinstance(form, w4a16.Fused)
    assert w4a16.shares_of(1, 64, 2048 // 32) == 16
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    found = form(x)
    monkeypatch.setattr(w4a16, "_PROGRAMS", 1)
    alone = form(x)
    torch.testing.assert_close(found, alone, atol=float(alone.abs().max()) * 2e-3, rtol=0)
    assert torch.equal(form(x), alone)
