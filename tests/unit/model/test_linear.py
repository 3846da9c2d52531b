import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llamero.checkpoint import gptq
from llamero.checkpoint.codes import GroupCodes, unpack
from llamero.model import nf4
from llamero.model.linear import GroupLinear, ReadyLinear, encode, make_ready, ways

GENERATOR = torch.Generator().manual_seed(3)


def codes(bits, groups=2, *, shuffled=False):
    g_idx = torch.arange(64) // (64 // groups)
    if shuffled:
        g_idx = g_idx[torch.randperm(64, generator=GENERATOR)]
    return GroupCodes(
        codes=torch.randint(0, 2**bits, (96, 64), generator=GENERATOR).to(torch.uint8),
        scales=torch.rand(96, groups, generator=GENERATOR).half(),
        zeros=torch.randint(1, 2**bits, (96, groups), generator=GENERATOR).to(torch.uint8),
        g_idx=g_idx.to(torch.int32),
        bits=bits,
    )


def packed(weight, *, bias=None):
    groups = weight.scales.shape[1]
    layer = GroupLinear(64, 96, layout=gptq.Format(weight.bits, 64 // groups, 1), bias=bias is not None)
    for name, tensor in gptq.Format(weight.bits, -1).encode(weight).items():
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
    steps = unpack(layer.qweight, 4).double() - 1 - unpack(layer.qzeros.T, 4).T.double()[layer.g_idx.long()]
    return (steps * layer.scales.double()[layer.g_idx.long()]).T


def test_a_plain_twin_without_bias_has_none():
    assert packed(codes(4)).dense(torch.float32).bias is None


FORMS = ("nf4", "nf4-double", "rtn-2bit-32g", "rtn-3bit-32g", "rtn-4bit-64g", "rtn-8bit--1g")


def packed_layer(form, *, mixed_groups=False):
    """A layer of 256 inputs and 192 outputs with a bias, perhaps with its groups in no order."""
    plain = torch.nn.Linear(256, 192)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    layer = encode(plain, form)
    if mixed_groups and isinstance(layer, GroupLinear):
        layer.g_idx = layer.get_buffer("g_idx")[
            torch.randperm(256, generator=torch.Generator().manual_seed(1))
        ].contiguous()
    return layer


@pytest.mark.parametrize("mixed_groups", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("of", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_shares_of_a_packed_layer_are_the_layer(form, of, outputs, mixed_groups):
    layer = packed_layer(form, mixed_groups=mixed_groups)
    expected, x = layer.dequantize(torch.float32), torch.randn(3, 256).double()
    y = layer(x)
    if not layer.cuts(of, outputs=outputs):
        assert (form, of, outputs) == ("rtn-3bit-32g", 4, True)  # 48 outputs a share
        return
    shares = [copy.deepcopy(layer) for _ in range(of)]
    for number, share in enumerate(shares):
        share.keep(number, of, outputs=outputs)
    parts = [share.dequantize(torch.float32) for share in shares]
    assert torch.equal(torch.cat(parts, 0 if outputs else 1), expected)
    if outputs:
        torch.testing.assert_close(torch.cat([share(x) for share in shares], -1), y)
    else:
        inputs = x.chunk(of, -1)
        torch.testing.assert_close(sum(share(part) for share, part in zip(shares, inputs, strict=True)), y)
    largest = max(layer.codes().items(), key=lambda pair: pair[1].nbytes)[0]
    assert shares[0].codes()[largest].nbytes * of == layer.codes()[largest].nbytes


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_same_as_frozen_parameters(form):
    layer = packed_layer(form)
    expected, x = layer.dequantize(torch.float32), torch.randn(3, 256)
    y = layer(x)
    layer.freeze()
    for parameter in layer.parameters():  # what mixed precision does; it does not reach bytes
        parameter.data = parameter.data.to(torch.bfloat16) if parameter.is_floating_point() else parameter.data
    codes = {name: p for name, p in layer.named_parameters() if name != "bias"}
    assert codes
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in codes.values())
    assert torch.equal(layer.dequantize(torch.float32), expected)
    torch.testing.assert_close(layer(x), y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_ready_layer_computes_and_learns_as_the_packed_one(dtype):
    layer = packed(codes(4, shuffled=True), bias=torch.randn(96, generator=GENERATOR))
    model = nn.Sequential(copy.deepcopy(layer))
    make_ready(model, torch.float32)
    assert ways(model) == {"unpacked in the cache": 1}
    ready = model.get_submodule("0")
    assert isinstance(ready, ReadyLinear)
    assert torch.equal(ready.dequantize(torch.float32), layer.dequantize(torch.float32))
    x = torch.randn(2, 5, 64, generator=GENERATOR).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = model(inputs[0]), layer(inputs[1])
    within = 0.02 if dtype == torch.bfloat16 else 1e-5  # the sum has another order
    torch.testing.assert_close(found, expected, atol=within, rtol=within)
    for y in (found, expected):
        y.sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=within, rtol=within)
    torch.testing.assert_close(ready.dense(torch.float32).weight, layer.dense(torch.float32).weight)


def test_a_layer_without_a_faster_way_stays_and_says_why():
    weight = codes(4)
    layer = packed(weight)
    layer.g_idx = torch.zeros(64, dtype=torch.int32)
    model = nn.Sequential(layer)
    make_ready(model, torch.float32)
    assert model[0] is layer
    assert ways(model) == {"dequantized for every product (its groups differ in size)": 1}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nf4_products_have_the_weights_of_the_codes(double, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "_CHUNK_WEIGHTS", 256 * 50)
    layer, x = packed_layer("nf4-double" if double else "nf4"), torch.randn(3, 5, 256, generator=GENERATOR).to(dtype)
    assert layer.bias is not None
    expected = F.linear(x, layer.dequantize(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(layer(x), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)
    assert layer.way() == "nf4, decoded in the cache"
