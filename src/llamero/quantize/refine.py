"""Better codes for given ones: coordinate descent on codes and scales against the outputs' squared error.

GPTQ never looks back: what it rounded early cannot answer to what came later. Here every code, and every group's scale,
is set to the value that is best with all others as they are, again and again. The error never grows (in the way of
Behdin et al. 2023, arXiv:2309.01885, with the scales as coordinates too).
"""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.codes import GroupCodes

BLOCK = 128
"""Channels whose changes are gathered before the others are told."""

ROWS = 2048
"""Rows of weights that are worked on at a time."""


def refine(
    w: Float[Tensor, "out d"], h: Float[Tensor, "d d"], start: GroupCodes, *, damp: float, sweeps: int
) -> GroupCodes:
    """Return codes on the same grids, and scales, with which `tr((w - q) (h + damping) (w - q).T)` is smaller.

    Args:
        w: What the codes stand for.
        h: Second moment of the inputs.
        start: Codes to begin with.
        damp: Added to the diagonal of `h`, as a fraction of its mean.
        sweeps: How often all codes and all scales are gone through.
    """
    order = start.g_idx.long().argsort(stable=True)  # groups side by side
    h = h[order[:, None], order]
    alive = h.diagonal() > 0
    h.diagonal().add_(damp * h.diagonal().sum() / max(1, int(alive.sum())))
    h.diagonal()[~alive] = h.diagonal().mean()
    parts = []
    for first in range(0, len(w), ROWS):
        rows = slice(first, first + ROWS)
        work = _Work(w[rows, order].T.contiguous().masked_fill_(~alive[:, None], 0), h, start.rows(first, rows.stop))
        for _ in range(sweeps):
            work.move_codes()
            work.move_scales()
        work.move_codes()
        codes = (work.steps[order.argsort()] + work.zeros[start.g_idx.long()]).T
        parts.append((codes.to(torch.uint8).contiguous(), work.scales.T.to(start.scales.dtype).contiguous()))
        del work, codes  # before the next ones are made, not after
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return GroupCodes(codes, scales, start.zeros, start.g_idx, start.bits)


class _Work:
    """Codes on their way, and the gradient of the error that follows them; a channel is a row, and lies together.

    `steps` are codes minus zero points; what they stand for is `scale * step`.
    """

    def __init__(self, w: Float[Tensor, "d out"], h: Float[Tensor, "d d"], start: GroupCodes) -> None:
        self.h, self.dtype, self.last = h, start.scales.dtype, 2**start.bits - 1
        self.scales, self.zeros = start.scales.T.to(w.dtype), start.zeros.T.to(w.dtype)  # (groups, out)
        order = start.g_idx.long().argsort(stable=True)
        self.group = start.g_idx.long()[order]
        self.bounds = [0, *(torch.bincount(self.group).cumsum(0).tolist())]
        self.steps = start.codes.T[order].to(w.dtype) - self.zeros[self.group]
        self.gradient = h @ (w - self.scales[self.group] * self.steps)

    def move_codes(self) -> None:
        """Set every code to its best value, channel after channel."""
        for start in range(0, len(self.h), BLOCK):
            part = slice(start, min(start + BLOCK, len(self.h)))
            h, steps, scales = self.h[part, part], self.steps[part], self.scales[self.group[part]]
            low = -self.zeros[self.group[part]]
            high, change, gradient = low + self.last, steps.clone(), self.gradient[part].clone()
            for i, pivot in enumerate(h.diagonal().tolist()):
                torch.addcdiv(steps[i], gradient[i], scales[i], value=1 / pivot, out=steps[i])
                torch.clamp(steps[i].round_(), low[i], high[i], out=steps[i])
                torch.sub(steps[i], change[i], out=change[i]).mul_(scales[i])
                gradient[i + 1 :].addr_(h[i + 1 :, i], change[i], alpha=-1)  # of those still to move, now
            self.gradient.addmm_(self.h[:, part], change, alpha=-1)  # of all, once

    def move_scales(self) -> None:
        """Set every group's scale to its best value."""
        for group, part in self._groups():
            steps = self.steps[part]
            curvature = ((self.h[part, part] @ steps) * steps).sum(0)
            moved = (self.gradient[part] * steps).sum(0) / torch.where(curvature > 0, curvature, 1.0)
            old = self.scales[group]
            new = (old + moved).to(self.dtype).to(old.dtype)
            new = torch.where((new * old > 0) & (curvature > 0) & new.isfinite(), new, old)
            self.gradient.addmm_(self.h[:, part], (new - old) * steps, alpha=-1)
            self.scales[group] = new

    def _groups(self) -> Iterator[tuple[int, slice]]:
        for group, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
            yield group, slice(start, stop)
