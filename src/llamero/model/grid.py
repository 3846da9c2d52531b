"""The evenly spaced values that a group of weights may take: `scale * (code - zero)`, codes 0 … 2^bits - 1."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16."""


TOGETHER = 2**18
"""Weights, times candidates, that a search looks at together."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid for each row; scales are float16 values from the start, so what is solved is what is stored."""

    scale: Float[Tensor, "*rows"]
    """Negative where the code below all others is better spent on the positive side."""
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


def search(
    w: Float[Tensor, "..."],
    importance: Float[Tensor, "..."],
    *,
    dim: int,
    bits: int,
    sym: bool,
    shrinks: Sequence[float],
) -> Grid:
    """Return the grids, among those of `fit` and smaller ones, whose nearest values are nearest by weighted squares.

    A smaller grid cuts weights off and is finer for the others. A symmetric grid has one value more on one side: both
    signs of the scale are tried. An asymmetric one may begin a step earlier or later.

    Args:
        w: Weights.
        importance: Weight of each squared difference, broadcast to `w`.
        dim: Along which weights share a grid, counted from the first.
        bits: Width of a code.
        sym: Whether zero is in the middle.
        shrinks: Sizes to try, as shares of what `fit` returns; 1.0 is always tried.
    """
    scales, zeros = _candidates(fit(w, dim=dim, bits=bits, sym=sym), sym=sym, shrinks=shrinks)
    together = max(1, TOGETHER // w.numel())
    errors = [
        _squares(w[None], Grid(scale, zero, bits), importance, dim + 1)
        for scale, zero in zip(scales.split(together), zeros.split(together), strict=True)
    ]
    which = torch.cat(errors).argmin(0, keepdim=True)  # the first of those that are as near
    return Grid(scales.gather(0, which)[0], zeros.gather(0, which)[0], bits)


def _candidates(whole: Grid, *, sym: bool, shrinks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (candidates, *rows); the first is `whole`."""
    sizes = whole.scale.new_tensor((1.0, *shrinks)).view(-1, *[1] * whole.scale.dim())
    scales = _as_stored(whole.scale * sizes)
    if sym:
        scales = torch.cat([scales, -scales])
        return scales, whole.zero.expand_as(scales)
    zeros = torch.stack([whole.zero, whole.zero - 1, whole.zero + 1]).clamp_(1, 2**whole.bits - 1)
    return scales.repeat(3, *[1] * whole.scale.dim()), zeros.repeat_interleave(len(sizes), 0)


def _squares(w: Tensor, grid: Grid, importance: Tensor, dim: int) -> Tensor:
    """Return the weighted squared differences between weights and their nearest values, summed along `dim`."""
    scale, zero = grid.scale.unsqueeze(dim), grid.zero.unsqueeze(dim)
    steps = (w / scale).round_().clamp_(-zero, 2**grid.bits - 1 - zero)
    return torch.addcmul(w, steps, scale, value=-1).square_().mul_(importance).sum(dim)


def _as_stored(scale: Tensor) -> Tensor:
    """Round to float16; a group of zeros gets any scale, one that would vanish the smallest there is."""
    return torch.where(scale == 0, 1.0, scale.half().to(scale.dtype).clamp(min=_SMALLEST_SCALE))
