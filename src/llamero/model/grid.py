"""The evenly spaced values that a group of weights may take: `scale * (code - zero)`, codes 0 … 2^bits - 1."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid for each row; scales are float16 values from the start, so what is solved is what is stored."""

    scale: Float[Tensor, "*rows"]
    zero: Float[Tensor, "*rows"]
    bits: int

    def encode(self, w: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Return the code of the nearest value."""
        return (w / self.scale).round().add_(self.zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Return the value of a code."""
        return self.scale * (codes - self.zero)


def fit(w: Float[Tensor, "..."], *, dim: int, bits: int, sym: bool) -> Grid:
    """Return the grids that span from the smallest to the largest weight along `dim`.

    Symmetric grids reach half a step beyond their last value on the positive side, so that both ends are
    treated alike. Asymmetric ones contain zero and one step below it: a zero point of 0 could not be stored
    minus one.
    """
    last = 2**bits - 1
    if sym:
        reach = w.abs().amax(dim)
        scale = _as_stored(2 * reach / last)
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
    high = w.amax(dim).clamp(min=0)
    low = torch.minimum(w.amin(dim), -high / (last - 1))
    scale = _as_stored((high - low) / last)
    return Grid(scale, (-low / scale).round().clamp(1, last), bits)


def _as_stored(scale: Tensor) -> Tensor:
    """Round to float16; a group of zeros gets any scale, one that would vanish the smallest there is."""
    return torch.where(scale == 0, 1.0, scale.half().to(scale.dtype).clamp(min=_SMALLEST_SCALE))
