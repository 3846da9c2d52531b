import pytest
import torch
import torch.nn.functional as F

from llamero.checkpoint import gptq
from llamero.model.linear import GptqLinear

GENERATOR = torch.Generator().manual_seed(3)


def codes(bits, groups=2, *, shuffled=False):
    g_idx = torch.arange(64) // (64 // groups)
    if shuffled:
        g_idx = g_idx[torch.randperm(64, generator=GENERATOR)]
    return gptq.GroupCodes(
        codes=torch.randint(0, 2**bits, (96, 64), generator=GENERATOR).to(torch.uint8),
        scales=torch.rand(96, groups, generator=GENERATOR).half(),
        zeros=torch.randint(1, 2**bits, (96, groups), generator=GENERATOR).to(torch.uint8),
        g_idx=g_idx.to(torch.int32),
        bits=bits,
    )


def packed(weight, *, bias=None):
    groups = weight.scales.shape[1]
    layer = GptqLinear(64, 96, layout=gptq.Format(weight.bits, 64 // groups, 1), bias=bias is not None)
    for name, tensor in gptq.encode(weight).items():
        assert layer.get_buffer(name).shape == tensor.shape
        layer.register_buffer(name, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_a_packed_layer_has_exactly_the_weights_of_its_codes(bits, shuffled):
    weight = codes(bits, shuffled=shuffled)
    assert torch.equal(packed(weight).dequantize(torch.float32), weight.dequantize())
    assert torch.equal(packed(weight).dequantize(torch.bfloat16), weight.dequantize().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_layer_computes_what_its_plain_twin_computes(dtype):
    layer = packed(codes(4), bias=torch.randn(96, generator=GENERATOR).to(dtype))
    x = torch.randn(5, 64, generator=GENERATOR).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), layer.dense(dtype)(x))
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), F.linear(x, codes_of(layer).to(dtype), layer.bias))


def codes_of(layer):
    """The weight by the formula, without the layer's own code."""
    steps = gptq.unpack(layer.qweight, 4).double() - 1 - gptq.unpack(layer.qzeros.T, 4).T.double()[layer.g_idx.long()]
    return (steps * layer.scales.double()[layer.g_idx.long()]).T


def test_a_plain_twin_without_bias_has_none():
    assert packed(codes(4)).dense(torch.float32).bias is None
