"""Products with weights that rest as low-bit codes, on the CPU, without the whole weight ever being there.

`plain` is the oracle: dequantize, multiply. Three forms of the same codes are faster:

- `Rows` for codes of any width and inputs of any dtype: torch's unpacking kernels make the weights of a few outputs,
  which stay in the cache until they are multiplied. They are those of the codes to the last bit.
- `Tiles` for 4-bit codes and bfloat16 inputs: torch's int4 product for up to `FEW` rows. It takes scales in bfloat16,
  so its weights are off by up to 2^-8 of themselves and 2^-9 of their zero point, about what rounding each weight
  to bfloat16 costs. More rows go by the exact weights, rounded once.
- `Bytes` for 8-bit codes with one scale for all of an output and zero in the middle, and bfloat16 inputs: torch's int8
  product for up to `FEW_BYTES` rows, with scales rounded to bfloat16 (2^-9 of an output). More rows are multiplied with
  the codes, which bfloat16 holds exactly, and the outputs scaled.
"""

from functools import cache
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

CHUNK_WEIGHTS = 1 << 19
"""Weights that are made at a time: 2 MiB in float32, what a core's own cache holds."""

FEW = 32
"""Rows up to which the int4 product beats making the weights."""

FEW_BYTES = 8
"""Rows up to which the int8 product beats multiplying with the codes."""

SUMS = {torch.bfloat16, torch.float16, torch.float32}
"""Dtypes of inputs; float64 is for oracles and goes the plain way."""


@runtime_checkable
class Coded(Protocol):
    """A weight matrix on low-bit grids: `scale * (code - zero)`, one grid per output and group of inputs."""

    @property
    def codes(self) -> UInt8[Tensor, "out d"]:
        """Return the codes."""
        ...

    @property
    def scales(self) -> Float[Tensor, "out groups"]:
        """Return the scales, as stored."""
        ...

    @property
    def zeros(self) -> UInt8[Tensor, "out groups"]:
        """Return the zero points."""
        ...

    @property
    def g_idx(self) -> Int[Tensor, " d"]:
        """Return the group of each input channel."""
        ...

    @property
    def bits(self) -> int:
        """Return the width of a code."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weights that the codes stand for."""
        ...


def plain(x: Float[Tensor, "... d"], coded: Coded) -> Float[Tensor, "... out"]:
    """Return `x @ weight.T`, the weight rounded once to the dtype of `x`."""
    return F.linear(x, coded.dequantize(torch.promote_types(x.dtype, torch.float32)).to(x.dtype))


class Form(nn.Module):
    """Codes as a fast product wants them, with input channels in an order in which groups lie side by side."""

    title: str
    """What a report calls it."""
    order: Int[Tensor, " d"] | None
    """Which input channel comes where; `None` as they were."""

    def __init__(self, order: Int[Tensor, " d"] | None) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return `x @ weight.T`."""
        return self.product(x if self.order is None else x.index_select(-1, self.order))

    def product(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product, channels of `x` in `order`."""
        raise NotImplementedError

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, exact in float32 and rounded once, channels as they were."""
        found = self.ordered_weight(dtype)
        return found if self.order is None else found.index_select(1, self.order.argsort())

    def ordered_weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, channels in `order`."""
        raise NotImplementedError


def side_by_side(coded: Coded) -> tuple[Int[Tensor, " d"] | None, str]:
    """Return in which order of input channels groups are neighbours (`None`: as they are), and why there is none."""
    g_idx, groups = coded.g_idx.long(), coded.scales.shape[1]
    if len(g_idx) % groups:
        return None, f"{len(g_idx)} inputs do not fill {groups} groups"
    expected = torch.arange(len(g_idx), device=g_idx.device) // (len(g_idx) // groups)
    if bool((g_idx == expected).all()):
        return None, ""
    order = g_idx.argsort(stable=True)
    if bool((g_idx[order] == expected).all()):
        return order, ""
    return None, "its groups differ in size"


def prepare(coded: Coded, dtype: torch.dtype) -> Form | str:
    """Return the fastest form for inputs of a dtype on the CPU, or why there is none.

    Args:
        coded: The weight, on the CPU.
        dtype: Of the inputs it will see most; others are taken too.
    """
    order, problem = side_by_side(coded)
    if problem:
        return problem
    if dtype not in SUMS:
        return f"inputs are {dtype}"
    if dtype == torch.bfloat16 and not Tiles.refuses(coded):
        return Tiles(coded, order)
    if dtype == torch.bfloat16 and not Bytes.refuses(coded):
        return Bytes(coded)
    return Rows.refuses(coded) or Rows(coded, order)


# -- rows: torch's unpacking kernels

_UNPACK = {2: "embedding_bag_2bit_unpack", 4: "embedding_bag_4bit_unpack", 8: "embedding_bag_byte_unpack"}
"""Operators that make float32 of rows of codes with a scale and an offset behind each: float16 behind 2 and 4 bits,
float32 behind bytes."""


def _resting_bits(bits: int) -> int:
    """Return in how many bits a code rests: those of the next operator."""
    return next(width for width in _UNPACK if width >= bits)


@cache
def _unpacks(bits: int) -> bool:
    """Return whether this torch has the operator and it does what we take it to do."""
    try:
        codes = torch.arange(32, dtype=torch.uint8).view(2, 16) & (2**bits - 1)
        numbers = torch.tensor([[0.5, -1.5], [2.0, 3.0]])
        found = _unpack(_lines(codes, numbers[:, :1], numbers[:, 1:], bits), bits)
    except (AttributeError, RuntimeError):  # not compiled into this torch
        return False
    return torch.equal(found, codes * numbers[:, :1] + numbers[:, 1:])


def _unpack(lines: UInt8[Tensor, "lines bytes"], bits: int) -> Float[Tensor, "lines values"]:
    return getattr(torch.ops.quantized, _UNPACK[bits])(lines)


def _lines(codes: UInt8[Tensor, "n d"], scale: Tensor, offset: Tensor, bits: int) -> UInt8[Tensor, "n bytes"]:
    """Return lines of codes, the first in the lowest bits of a byte, each with its scale and offset behind it."""
    packed = codes[:, :: 8 // bits].clone()
    for i in range(1, 8 // bits):
        packed |= codes[:, i :: 8 // bits] << (i * bits)
    numbers = torch.cat([scale, offset], 1).to(torch.float32 if bits == 8 else torch.float16)
    return torch.cat([packed, numbers.view(torch.uint8)], 1)


class Rows(Form):
    """Codes in lines of a group each, made into weights a few outputs at a time.

    Numbers that do not fit behind a line without being rounded stand beside and cost a pass over the weights.

    Args:
        coded: The weight.
        order: In which groups lie side by side.
    """

    title = "unpacked in the cache"

    def __init__(self, coded: Coded, order: Int[Tensor, " d"] | None) -> None:
        super().__init__(order)
        self.out_features, self.in_features = coded.codes.shape
        self.bits = _resting_bits(coded.bits)
        self.groups = coded.scales.shape[1]
        codes = coded.codes if order is None else coded.codes.index_select(1, order)
        scale, zero = coded.scales.float().reshape(-1, 1), coded.zeros.float().reshape(-1, 1)
        inside, scale_beside, offset_beside = (scale, -zero * scale), None, None
        if not (_fits_half(scale) if self.bits < 8 else coded.scales.dtype.itemsize == 2):
            inside, scale_beside = (torch.ones_like(scale), -zero), scale
        elif self.bits < 8 and not _fits_half(inside[1]):
            inside, offset_beside = (scale, torch.zeros_like(scale)), inside[1]
        self.lines: Tensor
        self.register_buffer("lines", _lines(codes.reshape(len(scale), -1), *inside, self.bits))
        self.scale: Tensor | None
        self.register_buffer("scale", scale_beside)
        self.offset: Tensor | None
        self.register_buffer("offset", offset_beside)

    @staticmethod
    def refuses(coded: Coded) -> str:
        """Return why a weight has no such form, or nothing."""
        bits, size = _resting_bits(coded.bits), coded.codes.shape[1] // coded.scales.shape[1]
        if not _unpacks(bits):
            return f"this torch does not unpack {bits}-bit codes"
        return f"groups of {size} do not fill bytes" if size % (8 // bits) else ""

    def product(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product, channels of `x` in `order`."""
        y = x.new_empty(len(x), self.out_features)
        for start, stop in self._chunks():
            torch.mm(x, self._some(start, stop).to(x.dtype).T, out=y[:, start:stop])
        return y

    def ordered_weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, channels in `order`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for start, stop in self._chunks():
            weight[start:stop] = self._some(start, stop)
        return weight

    def _chunks(self) -> list[tuple[int, int]]:
        step = max(1, CHUNK_WEIGHTS // self.in_features)
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def _some(self, start: int, stop: int) -> Float[Tensor, "outputs d"]:
        """Return the weights of some outputs, in float32."""
        lines = slice(start * self.groups, stop * self.groups)
        weight = _unpack(self.lines[lines], self.bits)
        if self.scale is not None:
            weight.mul_(self.scale[lines])
        elif self.offset is not None:
            weight.add_(self.offset[lines])
        return weight.view(stop - start, self.in_features)


def _fits_half(values: Float[Tensor, "*n"]) -> bool:
    return bool((values.half().float() == values).all())


# -- tiles: torch's int4 product

_SIZES = (32, 64, 128, 256)
"""Groups that the int4 product knows."""


@cache
def _tile() -> Int[Tensor, " outputs"] | None:
    """Return to which output, of a tile, each nibble of an input belongs, the low before the high; `None` if unknown.

    It depends on the vector registers of the CPU, so it is asked by packing the numbers of the outputs themselves.
    """
    outputs, inputs = 256, 2
    number = torch.arange(outputs)[:, None].expand(outputs, inputs)
    try:
        low, high = (_nibbles(_pack_tiles((number >> shift) & 15)).long() for shift in (0, 4))
    except (AttributeError, RuntimeError):
        return None
    found = low | high << 4  # (outputs * inputs), as they lie
    for size in (64, 32, 16):
        tile = found[:size]
        starts = torch.arange(0, outputs, size)[:, None, None]
        if torch.equal(found, (starts + tile.expand(inputs, size)).flatten()):
            return tile
    return None


def _pack_tiles(codes: Tensor) -> UInt8[Tensor, "out bytes"]:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)


def _nibbles(packed: UInt8[Tensor, "*n"]) -> UInt8[Tensor, " nibbles"]:
    return torch.stack([packed & 15, packed >> 4], -1).flatten()


class Tiles(Form):
    """4-bit codes as torch's int4 product on the CPU takes them, with exact scales beside for many rows.

    Args:
        coded: The weight.
        order: In which groups lie side by side.
    """

    title = "int4 product"

    def __init__(self, coded: Coded, order: Int[Tensor, " d"] | None) -> None:
        super().__init__(order)
        self.out_features, self.in_features = coded.codes.shape
        codes = coded.codes if order is None else coded.codes.index_select(1, order)
        # 3-bit codes fit as well; a group of a whole row, or a wide one, is several with the same grid
        size = self.in_features // coded.scales.shape[1]
        self.size = next(width for width in reversed(_SIZES) if size % width == 0)
        self.packed: Tensor
        self.register_buffer("packed", _pack_tiles(codes))
        self.scales: Tensor
        self.register_buffer("scales", coded.scales.T.contiguous())  # (groups, out)
        self.zeros: Tensor
        self.register_buffer("zeros", coded.zeros.T.contiguous())
        # the product computes scale * (code - 8) + offset; an offset of the rounded scale keeps the zero at zero
        scale = coded.scales.T.to(torch.bfloat16)
        offset = (scale.float() * (8 - coded.zeros.T.float())).to(torch.bfloat16)
        self.grids: Tensor
        grids = torch.stack([scale, offset], -1)
        self.register_buffer("grids", grids.repeat_interleave(size // self.size, 0).contiguous())

    @staticmethod
    def refuses(coded: Coded) -> str:
        """Return why a weight has no such form, or nothing."""
        (outputs, inputs), groups, tile = coded.codes.shape, coded.scales.shape[1], _tile()
        if coded.bits > 4:
            return f"{coded.bits}-bit codes"
        if tile is None:
            return "this torch's int4 layout is not known"
        if outputs % len(tile):
            return f"{outputs} outputs do not fill tiles of {len(tile)}"
        return "" if inputs // groups % _SIZES[0] == 0 else f"groups of {inputs // groups}"

    def product(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product, channels of `x` in `order`."""
        if x.dtype == torch.bfloat16 and len(x) <= FEW:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, self.size, self.grids)
        y = x.new_empty(len(x), self.out_features)
        for start, stop in self._chunks():
            torch.mm(x, self._some(start, stop).to(x.dtype), out=y[:, start:stop])
        return y

    def ordered_weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, channels in `order`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for start, stop in self._chunks():
            weight[start:stop] = self._some(start, stop).T
        return weight

    def _chunks(self) -> list[tuple[int, int]]:
        tile = _tile()
        assert tile is not None
        step = max(1, CHUNK_WEIGHTS // self.in_features // len(tile)) * len(tile)
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def _some(self, start: int, stop: int) -> Float[Tensor, "d outputs"]:
        """Return the weights of some outputs, whole tiles, in float32."""
        tile = _tile()
        assert tile is not None
        packed = self.packed[start:stop].view(-1, self.in_features, len(tile) // 2)
        weight = torch.empty(self.in_features, len(packed), len(tile))
        both = torch.cat([tile[0::2], tile[1::2]])  # low nibbles, then high ones
        codes = torch.cat([packed & 15, packed >> 4], -1).transpose(0, 1)  # (inputs, tiles, nibbles)
        if torch.equal(both, torch.arange(len(tile))):
            weight.copy_(codes)
        else:
            weight.copy_(codes.index_select(-1, both.argsort()))
        groups = weight.view(len(self.scales), -1, stop - start)
        groups.sub_(self.zeros[:, None, start:stop]).mul_(self.scales[:, None, start:stop].float())
        return groups.view(self.in_features, stop - start)


# -- bytes: torch's int8 product


@cache
def _multiplies_bytes() -> bool:
    """Return whether this torch has the int8 product on the CPU and it does what we take it to do."""
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 4)[:, :32]  # (4, 32)
    x, scales = torch.ones(2, 32, dtype=torch.bfloat16), torch.tensor([0.5, 1, 2, 4], dtype=torch.bfloat16)
    try:
        found = torch.ops.aten._weight_int8pack_mm(x, values.contiguous(), scales)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, (x @ values.to(x.dtype).T) * scales)


class Bytes(Form):
    """8-bit codes as int8, with one scale for each output.

    Args:
        coded: The weight.
    """

    title = "int8 product"

    def __init__(self, coded: Coded) -> None:
        super().__init__(None)
        self.out_features, self.in_features = coded.codes.shape
        self.values: Tensor
        self.register_buffer("values", (coded.codes.to(torch.int16) - 128).to(torch.int8))
        self.scales: Tensor
        self.register_buffer("scales", coded.scales[:, 0].contiguous())
        self.rounded: Tensor
        self.register_buffer("rounded", self.scales.to(torch.bfloat16))

    @staticmethod
    def refuses(coded: Coded) -> str:
        """Return why a weight has no such form, or nothing."""
        if coded.bits != 8 or coded.scales.shape[1] != 1:
            return f"{coded.bits}-bit codes in {coded.scales.shape[1]} groups"
        if not bool((coded.zeros == 128).all()):
            return "zero points"
        return "" if _multiplies_bytes() else "this torch has no int8 product"

    def product(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product."""
        if x.dtype != torch.bfloat16:
            return F.linear(x, self.ordered_weight(x.dtype))
        if len(x) <= FEW_BYTES:
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.values, self.rounded)
        y = x.new_empty(len(x), self.out_features)
        step = max(1, CHUNK_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, step):
            some = slice(start, start + step)
            torch.mm(x, self.values[some].to(x.dtype).T, out=y[:, some])
        return y.mul_(self.scales)

    def ordered_weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight."""
        return (self.values.float() * self.scales.float()[:, None]).to(dtype)
