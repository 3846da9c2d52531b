"""Round to nearest: every weight by itself, the baseline of every other method."""

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.codes import GroupCodes
from llamero.model import grid

_AT_ONCE = 1 << 24
"""Weights that are rounded at a time."""


def quantize(w: Float[Tensor, "out d"], *, bits: int, group_size: int, sym: bool = True) -> GroupCodes:
    """Return the nearest codes.

    Args:
        w: Weight of a linear layer.
        bits: Width of a code.
        group_size: Input channels that share one grid; divides `d`, or -1 for all of them.
        sym: Whether zero is in the middle of every grid.
    """
    size = w.shape[1] if group_size == -1 else group_size
    parts = [_quantize(part, bits, size, sym) for part in w.split(max(1, _AT_ONCE // w.shape[1]))]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return GroupCodes(codes, scales, zeros, (torch.arange(w.shape[1], device=w.device) // size).to(torch.int32), bits)


def nearest(w: Float[Tensor, "out d"], *, bits: int, group_size: int, sym: bool = True) -> Float[Tensor, "out d"]:
    """Return what the nearest codes stand for; arguments as of `quantize`, and the values that its codes have."""
    grouped = w.unflatten(1, (-1, w.shape[1] if group_size == -1 else group_size))  # (out, groups, size)
    spread = _spread(grouped, bits, sym)
    return spread.decode(spread.encode(grouped)).flatten(1)


def _spread(grouped: Tensor, bits: int, sym: bool) -> grid.Grid:
    """Return the grids of groups (out, groups, size), to be broadcast to their weights."""
    grids = grid.fit(grouped, dim=2, bits=bits, sym=sym)
    return grid.Grid(grids.scale[..., None], grids.zero[..., None], bits)


def _quantize(w: Tensor, bits: int, size: int, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of some rows."""
    grouped = w.unflatten(1, (-1, size))  # (out, groups, size)
    spread = _spread(grouped, bits, sym)
    codes = spread.encode(grouped).flatten(1).to(torch.uint8)
    return codes, spread.scale[..., 0].half(), spread.zero[..., 0].to(torch.uint8)
