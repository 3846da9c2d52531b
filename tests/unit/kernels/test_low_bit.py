import pytest
import torch

from llamero.checkpoint.codes import GroupCodes
from llamero.kernels import low_bit

OUTPUTS, INPUTS = 192, 256


def coded(bits, group=64, *, sym=True, shuffled=False, dtype=torch.float16, smallest=2e-3, outputs=OUTPUTS):
    generator = torch.Generator().manual_seed(bits + group)
    groups = INPUTS // group
    g_idx = torch.arange(INPUTS) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(INPUTS, generator=generator)]
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=generator).to(torch.uint8)
    return GroupCodes(
        codes=torch.randint(0, 2**bits, (outputs, INPUTS), generator=generator).to(torch.uint8),
        scales=((1 + torch.rand(outputs, groups, generator=generator)) * smallest).to(dtype),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        g_idx=g_idx.to(torch.int32),
        bits=bits,
    )


def inputs(rows, dtype):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group", [32, INPUTS])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_rows_have_the_weights_of_the_codes_to_the_last_bit(bits, group, sym, shuffled):
    weight = coded(bits, group, sym=sym, shuffled=shuffled)
    form = low_bit.prepare(weight, torch.float32)
    assert isinstance(form, low_bit.Rows)
    assert torch.equal(form.weight(torch.float32), weight.dequantize())
    assert torch.equal(form.weight(torch.bfloat16), weight.dequantize().bfloat16())


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2e-3), (torch.bfloat16, 1e-9), (torch.float32, 0.1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_that_float16_cannot_hold_are_exact_too(bits, dtype, smallest):
    weight = coded(bits, sym=False, dtype=dtype, smallest=smallest)
    form = low_bit.prepare(weight, torch.float32)
    assert isinstance(form, low_bit.Form)
    assert torch.equal(form.weight(torch.float32), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_are_those_of_the_plain_way(bits, rows, dtype):
    weight, x = coded(bits, sym=False, shuffled=True), inputs(rows, dtype)
    form = low_bit.Rows(weight, low_bit.side_by_side(weight)[0])
    found, expected = form(x), low_bit.plain(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=float(expected.abs().max()) * torch.finfo(dtype).eps * 8, rtol=0)


def test_outputs_in_several_chunks_and_a_rest(monkeypatch):
    monkeypatch.setattr(low_bit, "CHUNK_WEIGHTS", INPUTS * 50)
    weight, x = coded(4, sym=False), inputs(3, torch.float32)
    form = low_bit.Rows(weight, None)
    assert torch.equal(form.weight(torch.float32), weight.dequantize())
    torch.testing.assert_close(form(x), low_bit.plain(x, weight))


tiles = pytest.mark.skipif(low_bit._tile() is None, reason="this torch's int4 layout is not known on this CPU")


@tiles
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group", [32, INPUTS])
@pytest.mark.parametrize("bits", [3, 4])
def test_tiles_have_the_weights_of_the_codes_where_rows_are_many(bits, group, sym, shuffled, monkeypatch):
    monkeypatch.setattr(low_bit, "CHUNK_WEIGHTS", INPUTS * 64)
    weight = coded(bits, group, sym=sym, shuffled=shuffled)
    form = low_bit.prepare(weight, torch.bfloat16)
    assert isinstance(form, low_bit.Tiles)
    assert torch.equal(form.weight(torch.float32), weight.dequantize())
    x = inputs(low_bit.FEW + 1, torch.bfloat16)
    torch.testing.assert_close(form(x), low_bit.plain(x, weight))
    few = inputs(4, torch.float32)  # another dtype than that it was made for
    torch.testing.assert_close(form(few), low_bit.plain(few, weight))


@tiles
@pytest.mark.parametrize("rows", [1, 3, low_bit.FEW])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_int4_product_keeps_the_stated_tolerance(rows, sym, shuffled):
    weight, x = coded(4, sym=sym, shuffled=shuffled), inputs(rows, torch.bfloat16)
    form = low_bit.prepare(weight, torch.bfloat16)
    assert isinstance(form, low_bit.Tiles)
    exact = weight.dequantize(torch.float64)
    group = weight.g_idx.long()
    zero = (8 - weight.zeros.double())[:, group].abs() * weight.scales.double()[:, group]
    off = x.double().abs() @ (exact.abs() * 2**-8 + zero * 2**-9).T
    expected = x.double() @ exact.T
    difference = (form(x).double() - expected).abs()
    assert bool((difference <= off + expected.abs() * 2**-8 + 1e-5).all())
    assert bool((difference > 0).any())  # it is another sum than the exact one


bytes_ = pytest.mark.skipif(not low_bit._multiplies_bytes(), reason="this torch has no int8 product")


@bytes_
@pytest.mark.parametrize("rows", [1, low_bit.FEW_BYTES, low_bit.FEW_BYTES + 1, 70])
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
def test_the_int8_product_keeps_the_stated_tolerance(rows, scales, monkeypatch):
    monkeypatch.setattr(low_bit, "CHUNK_WEIGHTS", INPUTS * 50)
    weight, x = coded(8, INPUTS, dtype=scales), inputs(rows, torch.bfloat16)
    form = low_bit.prepare(weight, torch.bfloat16)
    assert isinstance(form, low_bit.Bytes)
    assert torch.equal(form.weight(torch.float32), weight.dequantize())
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert bool(((form(x).double() - expected).abs() <= expected.abs() * 2**-7 + 1e-5).all())
    wide = inputs(3, torch.float32)
    torch.testing.assert_close(form(wide), low_bit.plain(wide, weight))


def test_bytes_with_zero_points_or_groups_are_made_in_rows():
    for weight in (coded(8, INPUTS, sym=False), coded(8, 64)):
        assert isinstance(low_bit.prepare(weight, torch.bfloat16), low_bit.Rows)


@pytest.mark.parametrize(
    ("change", "dtype", "says"),
    [
        ({"g_idx": torch.zeros(INPUTS, dtype=torch.int32)}, torch.float32, "groups differ in size"),
        ({"scales": torch.ones(OUTPUTS, 3).half()}, torch.float32, "256 inputs do not fill 3 groups"),
        ({}, torch.float64, "inputs are torch.float64"),
    ],
)
def test_what_has_no_form_says_why(change, dtype, says):
    weight = coded(4)
    changed = GroupCodes(**{**{name: getattr(weight, name) for name in weight.__dataclass_fields__}, **change})
    found = low_bit.prepare(changed, dtype)
    assert isinstance(found, str)
    assert says in found


def test_outputs_that_fill_no_tile_are_made_in_rows():
    assert isinstance(low_bit.prepare(coded(4, outputs=40), torch.bfloat16), low_bit.Rows)


def test_a_torch_without_the_operators_is_told(monkeypatch):
    low_bit._unpacks.cache_clear()
    monkeypatch.setitem(low_bit._UNPACK, 4, "no_such_operator")
    try:
        assert low_bit.prepare(coded(4), torch.float32) == "this torch does not unpack 4-bit codes"
    finally:
        low_bit._unpacks.cache_clear()
