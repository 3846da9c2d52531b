"""Products with 4-bit codes on CUDA: weights of a tile are made in registers and multiplied, none are written.

One Triton kernel for fp16 and bf16 inputs, with sums in float32; its twin dequantizes and multiplies. Weights are made
in float32 and rounded once to the dtype of the inputs, so they are the twin's; only sums have another order. Inputs of
other dtypes go the twin's way.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llamero.kernels.low_bit import Coded, Form, side_by_side

if importlib.util.find_spec("triton") is not None or TYPE_CHECKING:
    import triton  # pyright: ignore[reportMissingImports] (comes with torch on CUDA)
    import triton.language as tl  # pyright: ignore[reportMissingImports]

_NIBBLES = 8
"""Codes of a word."""

_DEPTH = 32
"""Inputs that a step sums over: no more than the smallest group, so that a step has one grid per output."""

_PROGRAMS = 256
"""Programs that fill a GPU: inputs of few rows are shared out until there are so many."""


class Tile(NamedTuple):
    """What a program computes."""

    rows: int
    outputs: int
    warps: int


def tile_of(rows: int) -> Tile:
    """Return the tile for so many rows: a few wait for memory, many for arithmetic."""
    if rows <= 16:
        return Tile(16, 64, 4)
    return Tile(32, 64, 4) if rows <= 64 else Tile(64, 128, 4) if rows <= 512 else Tile(128, 128, 8)


def shares_of(rows: int, outputs: int, steps: int) -> int:
    """Return over how many programs the inputs of a tile are shared out; their sums are added in a fixed order."""
    tile = tile_of(rows)
    programs = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    return max(1, min(_PROGRAMS // programs, steps // 4, 16))


class Fused(Form):
    """4-bit codes in words along the inputs, each output by itself, with its grids as stored.

    Args:
        coded: The weight; codes of 2 and 3 bits rest as 4.
        order: In which groups lie side by side.
    """

    title = "Triton W4A16"

    def __init__(self, coded: Coded, order: Int[Tensor, " d"] | None) -> None:
        super().__init__(order)
        self.out_features, self.in_features = coded.codes.shape
        codes = (coded.codes if order is None else coded.codes.index_select(1, order)).T
        words = torch.zeros(len(codes) // _NIBBLES, codes.shape[1], dtype=torch.int32, device=codes.device)
        for i in range(_NIBBLES):
            words |= codes[i::_NIBBLES].int() << (4 * i)
        self.words: Tensor
        self.register_buffer("words", words)
        self.scales: Tensor
        self.register_buffer("scales", coded.scales.T.contiguous())  # (groups, out)
        self.zeros: Tensor
        self.register_buffer("zeros", coded.zeros.T.contiguous())

    @staticmethod
    def refuses(coded: Coded) -> str:
        """Return why a weight has no such form, or nothing."""
        size = coded.codes.shape[1] // coded.scales.shape[1]
        if coded.bits > 4:
            return f"{coded.bits}-bit codes"
        return f"groups of {size}" if size % _DEPTH else ""

    def product(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product, channels of `x` in `order`."""
        if x.dtype not in (torch.float16, torch.bfloat16) or not len(x):
            return self.plain(x)
        return self.fused(x.contiguous())

    def plain(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product by the whole weight: the oracle of `fused`."""
        return F.linear(x, self.ordered_weight(x.dtype))

    def fused(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows out"]:
        """Return the product by the kernel."""
        rows, tile, steps = len(x), tile_of(len(x)), self.in_features // _DEPTH
        shares = shares_of(rows, self.out_features, steps)
        sums = torch.empty(shares, rows, self.out_features, dtype=torch.float32, device=x.device)
        grid = (-(-self.out_features // tile.outputs), -(-rows // tile.rows), shares)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device, wherever their tensors are
            _kernel()[grid](
                x,
                self.words,
                self.scales,
                self.zeros,
                sums,
                rows,
                self.out_features,
                self.in_features,
                -(-steps // shares),
                size=self.in_features // len(self.scales),
                tall=tile.rows,
                wide=tile.outputs,
                depth=_DEPTH,
                num_warps=tile.warps,
            )
        return sums.sum(0).to(x.dtype)

    def ordered_weight(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, channels in `order`."""
        codes = torch.stack([(self.words >> (4 * i)) & 15 for i in range(_NIBBLES)], 1).flatten(0, 1)  # (d, out)
        grouped = codes.view(len(self.scales), -1, self.out_features).to(torch.promote_types(dtype, torch.float32))
        weight = (grouped - self.zeros[:, None]) * self.scales[:, None].to(grouped.dtype)
        return weight.flatten(0, 1).T.to(dtype)


def prepare(coded: Coded, dtype: torch.dtype) -> Form | str:
    """Return the form for inputs of a dtype on CUDA, or why there is none.

    Args:
        coded: The weight, where it will stay.
        dtype: Of the inputs it will see most; others are taken too.
    """
    order, problem = side_by_side(coded)
    if problem:
        return problem
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"inputs are {dtype}"
    return Fused.refuses(coded) or Fused(coded, order)


@cache
def _kernel() -> Any:
    # tests wrap functions to check types, and Triton reads the source and the globals of the innermost
    return triton.jit(inspect.unwrap(_product))


def _product(  # noqa: PLR0913, PLR0917 (a kernel is told all it knows)
    x: Any,
    words: Any,
    scales: Any,
    zeros: Any,
    sums: Any,
    rows: Any,
    outputs: Any,
    inputs: Any,
    steps: Any,
    size: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Sum a share of the inputs for a tile of rows and outputs.

    x (rows, inputs), words (inputs / 8, outputs), scales and zeros (groups, outputs), sums (shares, rows, outputs).
    """
    output = tl.program_id(0) * wide + tl.arange(0, wide)
    row = tl.program_id(1) * tall + tl.arange(0, tall)
    share = tl.program_id(2)
    here, there = row < rows, output < outputs
    row, output = row.to(tl.int64), output.to(tl.int64)
    total = tl.zeros((tall, wide), dtype=tl.float32)
    for step in range(share * steps, tl.minimum((share + 1) * steps, inputs // depth)):
        channel = step * depth + tl.arange(0, depth)
        grid = (step * depth // size) * outputs + output
        scale = tl.load(scales + grid, mask=there, other=0.0).to(tl.float32)
        zero = tl.load(zeros + grid, mask=there, other=0).to(tl.int32)
        word = tl.load(words + (channel // 8)[:, None] * outputs + output[None, :], mask=there[None, :], other=0)
        code = (word >> ((channel % 8) * 4)[:, None]) & 15
        weight = (code - zero[None, :]).to(tl.float32) * scale[None, :]
        some = tl.load(x + row[:, None] * inputs + channel[None, :], mask=here[:, None], other=0.0)
        total = tl.dot(some, weight.to(some.dtype), total)
    place = (share * rows + row)[:, None] * outputs + output[None, :]
    tl.store(sums + place, total, mask=here[:, None] & there[None, :])
