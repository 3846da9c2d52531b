"""Cross-entropy of a linear head, without ever holding [tokens, vocabulary].

The gradient is computed in the forward pass, chunk by chunk, while the logits of the chunk are at hand:
three matrix products in all where recomputing the logits would need four. With z-loss, log² of the softmax's
denominator is added (PaLM: Chowdhery et al. 2022, arXiv:2204.02311, section 5).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits held at a time: 16 MiB in float32 on CPU; 512 MiB on CUDA, where the head is read anew for every chunk and a
thousand tokens are needed to hide it."""


def _chunk(device: torch.device, rows: int) -> int:
    """Return how many tokens go through a head of so many rows at a time."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // max(1, rows))


@dataclass(frozen=True)
class Seen:
    """What a loss sees of each position on its way; without these it would be lost with the logits."""

    nll: Float[Tensor, " tokens"]
    """−log p(target): neither weighted nor with z-loss."""
    right: Bool[Tensor, " tokens"] | None
    """Whether the target is the likeliest token (the first of equals); None is not looked at."""

    @classmethod
    def blank(cls, hidden: Float[Tensor, "tokens dim"], *, right: bool = False) -> "Seen":
        """Return what a loss of these hidden states fills."""
        nll = torch.zeros(len(hidden), dtype=_wide(hidden), device=hidden.device)
        return cls(nll, torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if right else None)


def plain(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    z_loss: float = 0.0,
    seen: Seen | None = None,
) -> Float[Tensor, ""]:
    """Return Σ weight·(−log p(target) + z_loss·log² Σ exp(logits)), all logits at once: the oracle."""
    logits = (hidden @ weight.T).to(_wide(hidden))
    nll = F.cross_entropy(logits, targets, reduction="none")
    if seen is not None:
        seen.nll.copy_(nll.detach())
        if seen.right is not None:
            seen.right.copy_(logits.argmax(-1) == targets)
    each = nll + z_loss * logits.logsumexp(-1) ** 2
    return (each * weights).sum()


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    z_loss: float = 0.0,
    seen: Seen | None = None,
) -> Float[Tensor, ""]:
    """Return Σ weight·(−log p(target) + z_loss·log² Σ exp(logits)) in float32 (float64 for hidden states of that).

    Args:
        hidden: Last hidden states, only of the positions that are learned.
        weight: The head.
        targets: The token that follows each position.
        weights: How much each position counts.
        z_loss: How much large logits cost.
        seen: Filled with what is seen of each position.
    """
    if not torch.is_grad_enabled():  # inside `forward` nobody can tell, and validation would pay for gradients
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, seen)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        seen: Seen | None,
    ) -> Tensor:
        compute = weight.to(hidden.dtype)  # under autocast the head is still float32
        wide = _wide(hidden)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        size = _chunk(hidden.device, weight.shape[0])
        # one buffer for all chunks: on CPU fresh memory costs as much as a pass over it
        buffer = hidden.new_empty(min(size, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            x, target, scale = hidden[part], targets[part, None], weights[part, None].to(wide)
            logits = torch.mm(x, compute.T, out=buffer[: len(x)]).to(wide)  # (chunk, vocab)
            chosen, highest = logits.gather(1, target), _highest(logits, seen, part, target)
            odds = logits.sub_(highest).exp_()  # in place, as what follows
            total = odds.sum(-1, keepdim=True)
            log_total = highest + total.log()
            nll = log_total - chosen
            if seen is not None:
                seen.nll[part] = nll[:, 0]
            loss += ((nll + z_loss * log_total**2) * scale).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            of_total = scale * (1 + 2 * z_loss * log_total)  # ∂loss/∂log_total
            grad = odds.mul_(of_total / total).scatter_add_(1, target, -scale).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, compute, out=grad_hidden[part])
            if grad_weight is not None:
                if grad.dtype == wide:
                    grad_weight.addmm_(grad.T, x)
                else:
                    grad_weight += grad.T @ x
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads  # scaled in place below, so only once; and `.grad` takes over what nobody else holds
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale.to(grad_weight.dtype)),
            None,
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class Share:
    """The rows of the head that a process has, the others being with the other processes of a group."""

    group: dist.ProcessGroup
    start: int
    """First token of this share."""
    largest: int
    """Rows of the largest share."""


def sharded_linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "share dim"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    share: Share | None,
    z_loss: float = 0.0,
    seen: Seen | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of `linear_cross_entropy`, the same on every process of a group that shares the head.

    Only three numbers a token cross the wire: its highest logit, its sum of exponentials, its target's logit; and the
    likeliest token where it is asked whether that is right. The gradient of `hidden` is that of this share alone: the
    caller sums it over the group.

    Args:
        hidden: Last hidden states, the same on every process.
        weight: This process's rows of the head.
        targets: The token that follows each position.
        weights: How much each position counts.
        share: Which rows these are; `None` if they are all.
        z_loss: How much large logits cost.
        seen: Filled with what is seen of each position, the same on every process.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _ShardedLinearCrossEntropy.apply(hidden, weight, targets, weights, share, z_loss, seen)


class _ShardedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        share: Share | None,
        z_loss: float,
        seen: Seen | None,
    ) -> Tensor:
        compute, wide, rows = weight.to(hidden.dtype), _wide(hidden), weight.shape[0]
        start = 0 if share is None else share.start
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        # every process of the group must make the same number of chunks
        size = _chunk(hidden.device, rows if share is None else share.largest)
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            x, scale = hidden[part], weights[part, None].to(wide)
            place = targets[part, None] - start
            here = (place >= 0) & (place < rows)
            place = place.clamp(0, rows - 1)
            logits = (x @ compute.T).to(wide)  # (chunk, share)
            highest = _highest(logits, seen, part, targets[part, None], share)
            chosen = logits.gather(1, place) * here
            odds = logits.sub_(highest).exp_()
            total, chosen = _all(torch.cat([odds.sum(-1, keepdim=True), chosen], 1), share).split(1, 1)
            log_total = highest + total.log()
            nll = log_total - chosen
            if seen is not None:
                seen.nll[part] = nll[:, 0]
            loss += ((nll + z_loss * log_total**2) * scale).sum()
            of_total = scale * (1 + 2 * z_loss * log_total)  # ∂loss/∂log_total
            grad = odds.mul_(of_total / total).scatter_add_(1, place, -scale * here).to(hidden.dtype)
            torch.mm(grad, compute, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        to_weight = None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), to_weight, *(None,) * 5


def _highest(
    logits: Float[Tensor, "chunk share"],
    seen: Seen | None,
    part: slice,
    targets: Int[Tensor, "chunk 1"],
    share: Share | None = None,
) -> Float[Tensor, "chunk 1"]:
    """Return the highest logit of each position, and note whether it is the target's where that is asked."""
    if seen is None or seen.right is None:
        return _all(logits.amax(-1, keepdim=True), share, dist.ReduceOp.MAX)
    mine, token = logits.max(-1, keepdim=True)
    highest = mine if share is None else _all(mine.clone(), share, dist.ReduceOp.MAX)
    if share is not None:  # the first of equals, wherever it is
        beyond = torch.full_like(token, torch.iinfo(token.dtype).max)
        token = _all(torch.where(mine == highest, token + share.start, beyond), share, dist.ReduceOp.MIN)
    seen.right[part] = (token == targets)[:, 0]
    return highest


def _all(values: Tensor, share: Share | None, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if share is not None:
        values = values.contiguous()
        dist.all_reduce(values, operation, group=share.group)
    return values


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
