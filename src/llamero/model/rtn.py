"""Round to nearest: every weight by itself, the baseline of every other method."""

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.codes import GroupCodes
from llamero.model import grid


def quantize(w: Float[Tensor, "out d"], *, bits: int, group_size: int, sym: bool = True) -> GroupCodes:
    """Return the nearest codes.

    Args:
        w: Weight of a linear layer.
        bits: Width of a code.
        group_size: Input channels that share one grid; divides `d`, or -1 for all of them.
        sym: Whether zero is in the middle of every grid.
    """
    size = w.shape[1] if group_size == -1 else group_size
    grouped = w.unflatten(1, (-1, size))  # (out, groups, size)
    grids = grid.fit(grouped, dim=2, bits=bits, sym=sym)
    spread = grid.Grid(grids.scale[..., None], grids.zero[..., None], bits)
    return GroupCodes(
        codes=spread.encode(grouped).flatten(1).to(torch.uint8),
        scales=grids.scale.half(),
        zeros=grids.zero.to(torch.uint8),
        g_idx=(torch.arange(w.shape[1], device=w.device) // size).to(torch.int32),
        bits=bits,
    )
