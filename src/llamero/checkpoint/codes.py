"""Low-bit codes of weight matrices, and the dense bit streams that most formats store them as."""

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llamero.core.errors import LlameroError

Actorder = Literal["none", "static", "desc"]
"""Order in which input channels were solved. `none`: as they lie; `static`: the most active first, groups stay side by
side; `desc`: the most active first, groups are formed in that order and readers need `g_idx` (`desc_act`)."""

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class GroupCodes:
    """A weight matrix on low-bit grids: `scale * (code - zero)`, one grid per output and group of inputs."""

    codes: UInt8[Tensor, "out d"]
    scales: Float[Tensor, "out groups"]
    """In the precision in which they are stored."""
    zeros: UInt8[Tensor, "out groups"]
    g_idx: Int[Tensor, " d"]
    """Group of each input channel, int32."""
    bits: int

    @property
    def side_by_side(self) -> bool:
        """Return whether groups are neighbouring channels, as formats without `g_idx` need them."""
        size = -(-len(self.g_idx) // self.scales.shape[1])
        return bool((self.g_idx == torch.arange(len(self.g_idx), device=self.g_idx.device) // size).all())

    def rows(self, start: int, stop: int) -> "GroupCodes":
        """Return some of the output channels."""
        part = slice(start, stop)
        return GroupCodes(self.codes[part], self.scales[part], self.zeros[part], self.g_idx, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
        """Return the weights that the codes stand for; exact in float32 (11 bits times at most 9)."""
        group = self.g_idx.long()
        steps = self.codes.to(dtype) - self.zeros.to(dtype)[:, group]
        return steps.mul_(self.scales.to(dtype)[:, group])


def pack(codes: UInt8[Tensor, "n columns"], bits: int) -> Int[Tensor, "words columns"]:
    """Return each column as a little-endian bit stream cut into int32 words; value i has bits [i*b, i*b + b).

    Args:
        codes: Values below 2^bits; `n * bits` is a multiple of 32.
        bits: Width of a value.
    """
    values, words = period(bits)
    if codes.shape[0] % values:
        raise ValueError(f"{codes.shape[0]} codes of {bits} bits do not fill 32-bit words")
    parts = codes.unflatten(0, (-1, values))  # (periods, values, columns)
    stream = torch.zeros(parts.shape[0], words, *codes.shape[1:], dtype=torch.int64, device=codes.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = parts[:, i].long()
        stream[:, word] |= value << shift
        if shift + bits > 32:
            stream[:, word + 1] |= value >> (32 - shift)
    return signed(stream & _WORD).flatten(0, 1)


def unpack(stream: Int[Tensor, "words columns"], bits: int) -> UInt8[Tensor, "n columns"]:
    """Return the values of bit streams, the inverse of `pack`."""
    values, words = period(bits)
    parts = stream.unflatten(0, (-1, words))  # (periods, words, columns)
    codes = torch.empty(parts.shape[0], values, *stream.shape[1:], dtype=torch.uint8, device=stream.device)
    if words == 1 and sys.byteorder == "little":  # whole codes in every byte: work on bytes, of which more go at once
        bytes_ = stream.reshape(-1).contiguous().view(torch.uint8).view(len(parts), *stream.shape[1:], 4)
        for i in range(values):
            byte, shift = divmod(i * bits, 8)
            codes[:, i] = (bytes_[..., byte] >> shift) & ((1 << bits) - 1)
        return codes.flatten(0, 1)
    mask = (1 << bits) - 1
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = parts[:, word] >> shift
        if shift + bits > 32:
            # the sign must not be shifted in above the bits that this word still has
            value = (value & ((1 << (32 - shift)) - 1)) | (parts[:, word + 1] << (32 - shift))
        codes[:, i] = (value & mask).to(torch.uint8)
    return codes.flatten(0, 1)


def period(bits: int) -> tuple[int, int]:
    """Return after how many values, and words, a stream meets a word boundary again."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def signed(words: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return unsigned 32-bit words, held in int64, as the int32 with the same bits."""
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def groups_of(inputs: int, group_size: int) -> int:
    """Return how many groups of input channels a layer has; -1 is one group of all of them."""
    return 1 if group_size == -1 else -(-inputs // group_size)


def refuse_unknown_keys(
    keys: Mapping[str, Any], *, known: Collection[str], must_be: Mapping[str, Collection[Any]], where: str
) -> None:
    """Refuse a key of a `quantization_config` that may change how codes are stored.

    Args:
        keys: The config.
        known: Keys that may have any value.
        must_be: The values that other keys may have.
        where: The file.

    Raises:
        LlameroError: A key that is in neither, or has another value.
    """
    for key, value in keys.items():
        if value not in must_be[key] if key in must_be else key not in known:
            raise LlameroError(
                f"quantization key `{key}: {value}` is not understood; it may change how codes are stored",
                where=where,
                fix="remove it if you are sure that it does not",
            )
