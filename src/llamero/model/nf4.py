"""NF4: codes of four bits whose values lie where normally distributed weights are, a scale for each block of 64.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3). Every byte is as in the files and kernels of bitsandbytes:
blocks run over the flattened weight, the first of two weights has the high half of the byte. With double quantization
the scales, less their mean, are 8-bit codes of the dynamic map (Dettmers 2015, arXiv:1511.04561) in blocks of 256.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256

_CHUNK_WEIGHTS = 1 << 19
"""Weights that `product` makes at a time."""

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What each code stands for, as bitsandbytes publishes it."""


CODE_BOOK: Float[Tensor, "16"] = torch.tensor(VALUES)


def _dynamic_map() -> Float[Tensor, "256"]:
    """Return the values of the 8-bit codes: seven decades, each with twice the values of the one below."""
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([-positive, torch.zeros(1), positive, torch.ones(1)]).sort().values


DYNAMIC_MAP: Float[Tensor, "256"] = _dynamic_map()
_PAIRS: Float[Tensor, "256 2"] = torch.cartesian_prod(CODE_BOOK, CODE_BOOK)
"""The two values of each byte."""


def _on(table: Tensor, device: torch.device) -> Tensor:
    """Return one of these tables on a device, where it stays: a copy would wait for the device at every use."""
    return table if device.type == "cpu" else _copied(table, device)


@cache
def _copied(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device)


def empty(inputs: int, outputs: int, *, double: bool) -> dict[str, Tensor]:
    """Return tensors of the shapes and dtypes of those that `encode` returns."""
    blocks = inputs * outputs // BLOCK
    plain = {"packed": torch.empty(inputs * outputs // 2, dtype=torch.uint8), "absmax": torch.empty(blocks)}
    if not double:
        return plain
    return plain | {
        "absmax": torch.empty(blocks, dtype=torch.uint8),
        "nested_absmax": torch.empty(-(-blocks // NESTED_BLOCK)),
        "offset": torch.empty(()),
    }


def encode(weight: Float[Tensor, "out d"], *, double: bool) -> dict[str, Tensor]:
    """Return the codes of a weight and the scales of its blocks.

    Args:
        weight: As many numbers as fill blocks of 64.
        double: Whether the scales are quantized too.
    """
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.numel()} weights do not fill blocks of {BLOCK}")
    codes, absmax = _nearest(weight.flatten().float(), CODE_BOOK, BLOCK)
    packed = codes[0::2] << 4 | codes[1::2]
    if not double:
        return {"packed": packed, "absmax": absmax}
    offset = absmax.mean()
    nested, nested_absmax = _nearest(absmax - offset, DYNAMIC_MAP, NESTED_BLOCK)
    return {"packed": packed, "absmax": nested, "nested_absmax": nested_absmax, "offset": offset}


class Place(NamedTuple):
    """Where the blocks of a part of a weight lie among those of the whole: runs of neighbours, evenly apart."""

    first: int = 0
    """Number of the first block."""
    runs: int = 1
    stride: int = 0
    """Blocks from the start of a run to that of the next."""

    def numbers(self, count: int, device: torch.device) -> Int[Tensor, " count"]:
        """Return the numbers of all blocks of the part, of which there are `count`."""
        starts = torch.arange(self.runs, device=device)[:, None] * self.stride + self.first
        return (starts + torch.arange(count // self.runs, device=device)).flatten()


WHOLE = Place()


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight matrix in NF4, with quantized scales; or some rows of one."""

    parts: Mapping[str, Tensor]
    """As `encode` returns them."""
    shape: tuple[int, int]
    """(out, d)."""
    place: Place = WHOLE
    """Where the blocks lie among those of the whole."""

    def rows(self, start: int, stop: int) -> "Codes":
        """Return some of the output channels, which must be of whole blocks."""
        outputs, inputs = self.shape
        if inputs % BLOCK and (start, stop) != (0, outputs):
            raise ValueError(f"rows of {inputs} weights are no whole blocks of {BLOCK}")
        blocks = slice(start * inputs // BLOCK, stop * inputs // BLOCK)
        mine = {"packed": self.parts["packed"][start * inputs // 2 : stop * inputs // 2]}
        parts = {**self.parts, **mine, "absmax": self.parts["absmax"][blocks]}
        return Codes(parts, (stop - start, inputs), Place(self.place.first + blocks.start))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
        """Return the weights that are meant."""
        return decode(self.parts, self.shape, dtype, self.place)

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers, and the tables of values, by name."""
        return {**self.parts, "book": CODE_BOOK, "nested_book": DYNAMIC_MAP}


def codes(weight: Float[Tensor, "out d"]) -> Codes:
    """Return a weight in NF4 with quantized scales."""
    return Codes(encode(weight, double=True), (weight.shape[0], weight.shape[1]))


def cut(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], share: int, of: int, *, outputs: bool
) -> tuple[dict[str, Tensor], Place]:
    """Return the codes of an equal share of a weight's outputs, or of its inputs, and where its blocks lie.

    Args:
        tensors: Of the whole, as `encode` returns them.
        shape: Of the whole, (out, d).
        share: Number of the share.
        of: How many there are; `cuts` says whether blocks lie whole in each.
        outputs: Whether outputs are shared out, or inputs.
    """
    rows = 1 if outputs else shape[0]

    def mine(tensor: Tensor) -> Tensor:
        return tensor.view(rows, of, -1)[:, share].flatten()

    found = {name: mine(value) if name in ("packed", "absmax") else value for name, value in tensors.items()}
    blocks = len(tensors["absmax"]) // rows  # of a row
    return found, Place(share * blocks // of, rows, blocks)


def cuts(shape: tuple[int, int], of: int, *, outputs: bool) -> bool:
    """Return whether blocks lie whole in each of some equal shares of outputs, or of inputs."""
    outs, inputs = shape
    if outputs:
        return outs % of == 0 and outs // of * inputs % BLOCK == 0
    return inputs % (of * BLOCK) == 0


def decode(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, place: Place = WHOLE
) -> Float[Tensor, "out d"]:
    """Return the weight, computed in float32 and rounded once; on CUDA by bitsandbytes where it is installed.

    Args:
        tensors: As `encode` or `cut` returns them.
        shape: (out, d).
        dtype: Of the result.
        place: Where the blocks lie, if these are not all.
    """
    packed, absmax = tensors["packed"], _scales(tensors, place)
    if packed.is_cuda and has_bitsandbytes():
        return decode_with_bitsandbytes(packed, absmax, shape, dtype)
    weight = _on(_PAIRS, packed.device).index_select(0, packed.int()).view(-1, BLOCK)
    return weight.mul_(absmax[:, None]).to(dtype).view(shape)


def _scales(tensors: Mapping[str, Tensor], place: Place) -> Float[Tensor, " blocks"]:
    """Return the scale of each block."""
    absmax = tensors["absmax"]
    if "offset" not in tensors:
        return absmax
    nested = tensors["nested_absmax"][place.numbers(len(absmax), absmax.device) // NESTED_BLOCK]
    return _on(DYNAMIC_MAP, absmax.device)[absmax.int()] * nested + tensors["offset"]


def product(
    x: Float[Tensor, "rows d"], tensors: Mapping[str, Tensor], outputs: int, place: Place = WHOLE
) -> Float[Tensor, "rows out"]:
    """Return `x @ weight.T` on the CPU with the weights of `decode`, a few outputs' at a time: they stay in the cache.

    Args:
        x: Inputs; their number is a multiple of 64.
        tensors: As `encode` or `cut` returns them.
        outputs: Of the weight.
        place: Where the blocks lie, if these are not all.
    """
    inputs, absmax = x.shape[1], _scales(tensors, place)
    y = x.new_empty(len(x), outputs)
    step = max(1, _CHUNK_WEIGHTS // inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        some = {
            "packed": tensors["packed"][start * inputs // 2 : stop * inputs // 2],
            "absmax": absmax[start * inputs // BLOCK : stop * inputs // BLOCK],
        }
        torch.mm(x, decode(some, (stop - start, inputs), x.dtype).T, out=y[:, start:stop])
    return y


@cache
def has_bitsandbytes() -> bool:
    """Return whether the kernels of bitsandbytes are there."""
    return importlib.util.find_spec("bitsandbytes") is not None


def decode_with_bitsandbytes(
    packed: UInt8[Tensor, " bytes"], absmax: Float[Tensor, " blocks"], shape: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "out d"]:
    """Return the weight; the fast twin of what `decode` does with plain torch."""
    from bitsandbytes.functional import QuantState, dequantize_4bit  # pyright: ignore[reportMissingImports] (optional)

    state = QuantState(absmax, shape=torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed[:, None], state)


def _nearest(
    x: Float[Tensor, " n"], book: Float[Tensor, " codes"], block: int
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Return the code nearest to each number over the largest of its block, and those; the last block may be short."""
    blocks = F.pad(x, (0, -len(x) % block)).unflatten(0, (-1, block))
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()[: len(x)]
    between = ((book[:-1] + book[1:]) / 2).to(x.device)
    return torch.bucketize(scaled, between, out_int32=True).to(torch.uint8), absmax
