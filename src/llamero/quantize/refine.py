"""Better codes for given ones: coordinate descent on codes and scales against the outputs' squared error.

GPTQ never looks back: what it rounded early cannot answer to what came later. Here every code, and every group's scale,
is set to the value that is best with all others as they are, again and again. The error never grows (in the way of
Behdin et al. 2023, arXiv:2309.01885, with the scales as coordinates too).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.codes import GroupCodes

BLOCK = 128
"""Channels whose changes are gathered before the others are told."""


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
    h = h[order][:, order]
    alive = h.diagonal() > 0
    h.diagonal().add_(damp * h.diagonal().sum() / max(1, int(alive.sum())))
    h.diagonal()[~alive] = h.diagonal().mean()
    w = w[:, order].masked_fill(~alive, 0)
    work = _Work(w, h, start, order)
    for _ in range(sweeps):
        work.move_codes()
        work.move_scales()
    work.move_codes()
    back = order.argsort()
    return GroupCodes(
        (work.steps[:, back] + work.zeros[:, start.g_idx.long()]).to(torch.uint8),
        work.scales.to(start.scales.dtype),
        start.zeros,
        start.g_idx,
        start.bits,
    )


class _Work:
    """Codes on their way, and the gradient of the error that follows them.

    `steps` are codes minus zero points; what they stand for is `scale * step`.
    """

    def __init__(self, w: Tensor, h: Tensor, start: GroupCodes, order: Tensor) -> None:
        self.h, self.dtype = h, start.scales.dtype
        self.scales, self.zeros = start.scales.to(w.dtype), start.zeros.to(w.dtype)
        self.group = start.g_idx.long()[order]
        self.bounds = [0, *(torch.bincount(self.group).cumsum(0).tolist())]
        self.low, self.high = -self.zeros, 2**start.bits - 1 - self.zeros
        self.steps = start.codes[:, order].to(w.dtype) - self.zeros[:, self.group]
        self.gradient = (w - self.scales[:, self.group] * self.steps) @ h

    def move_codes(self) -> None:
        """Set every code to its best value, channel after channel."""
        for start in range(0, len(self.h), BLOCK):
            part = slice(start, min(start + BLOCK, len(self.h)))
            h, groups = self.h[part, part], self.group[part].tolist()
            gradient = self.gradient[:, part].T.contiguous()  # a channel is a row, and so lies together
            steps = self.steps[:, part].T.contiguous()
            change = torch.empty_like(steps)
            for i, group in enumerate(groups):
                scale = self.scales[:, group]
                best = steps[i] + gradient[i] / (h[i, i] * scale)
                best = torch.minimum(torch.maximum(best.round(), self.low[:, group]), self.high[:, group])
                change[i] = scale * (best - steps[i])
                steps[i] = best
                gradient.addr_(h[:, i], change[i], alpha=-1)
            self.steps[:, part] = steps.T
            self.gradient.addmm_(change.T, self.h[part], alpha=-1)

    def move_scales(self) -> None:
        """Set every group's scale to its best value."""
        for group, (start, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            part = slice(start, stop)
            steps = self.steps[:, part]
            curvature = ((steps @ self.h[part, part]) * steps).sum(1)
            moved = (self.gradient[:, part] * steps).sum(1) / torch.where(curvature > 0, curvature, 1.0)
            old = self.scales[:, group]
            new = (old + moved).to(self.dtype).to(old.dtype)
            new = torch.where((new > 0) & (curvature > 0), new, old)
            self.gradient.addmm_((new - old)[:, None] * steps, self.h[part], alpha=-1)
            self.scales[:, group] = new
