"""GPTQ: round one input channel at a time and let the channels still to come absorb the error.

Frantar et al. 2022, arXiv:2210.17323, Algorithm 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.checkpoint.codes import Actorder, GroupCodes
from llamero.core.errors import LlameroError
from llamero.model import grid

BLOCK = 128
"""Channels whose errors are gathered before the channels beyond them are told."""

ESCALATIONS = 4
"""How often damping is tried, each time ten times stronger."""


@dataclass(frozen=True, eq=False)
class Factor:
    """What the solver needs to know of a layer's inputs; shared by all variants that solve in the same order."""

    u: Float[Tensor, "d d"]
    """Upper triangular, `u.T @ u` is the inverse of the damped second moment, in the order of solving."""
    order: Int[Tensor, " d"]
    """Input channels in the order of solving."""
    dead: Bool[Tensor, " d"]
    """Input channels that are always zero."""
    damp: float
    """Damping that was needed, as a fraction of the mean diagonal."""


def factorize(h: Float[Tensor, "d d"], *, by_activation: bool, damp: float, where: str = "layer") -> Factor:
    """Return the factor of the inverse of `h`.

    Args:
        h: Second moment `x @ x.T` of the layer's inputs; its scale does not matter.
        by_activation: Solve the most active channel first.
        damp: Added to the diagonal, as a fraction of its mean; ten times as much where that is too little.
        where: Name of the layer, for errors.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / max(1, int((~dead).sum())) if not bool(dead.all()) else diagonal.new_ones(())
    order = torch.arange(len(h), device=h.device)
    if by_activation:
        order = diagonal.argsort(descending=True, stable=True)
    used = damp
    for attempt in range(ESCALATIONS):
        used = damp * 10**attempt
        u = _inverse_factor(h, order, added=dead * mean + used * mean)
        if u is not None:
            return Factor(u, order, dead, used)
    raise LlameroError(
        f"the second moment of its inputs is not positive definite, even damped by {used:g} of its mean diagonal",
        where=where,
        fix="calibrate on more, or more varied, text",
    )


def _inverse_factor(h: Tensor, order: Tensor, *, added: Tensor) -> Tensor | None:
    """Return upper triangular `u` with `u.T @ u` the inverse of `h` in another order, or `None` where there is none.

    With rows and columns reversed, the inverse of the Cholesky factor is `u`, reversed: one factorization
    where inverting first would take two. At most two matrices of the size of `h` are held beside it.

    Args:
        h: Symmetric matrix.
        order: Of its rows and columns.
        added: To the diagonal of `h`.
    """
    back = order.flip(0)
    damped = h[back[:, None], back]
    damped.diagonal().add_(added[back])
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if int(info) != 0:
        return None
    inverse = torch.eye(len(h), dtype=h.dtype, device=h.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1) if bool(inverse.isfinite().all()) else None


def quantize(
    w: Float[Tensor, "out d"],
    h: Float[Tensor, "d d"],
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    actorder: Actorder = "none",
    damp: float = 0.01,
) -> GroupCodes:
    """Round `w` so that `w @ x` changes little for inputs like those behind `h`.

    Args:
        w: Weight of a linear layer.
        h: Second moment `x @ x.T` of the layer's inputs; its scale does not matter.
        bits: Width of a code.
        group_size: Input channels that share one grid; divides `d`, or -1 for all of them.
        sym: Whether zero is in the middle of every grid.
        actorder: Order of the channels, see `Actorder`.
        damp: Added to the diagonal of `h`, as a fraction of its mean.
    """
    factor = factorize(h, by_activation=actorder != "none", damp=damp)
    return solve(w, factor, bits=bits, group_size=group_size, sym=sym, static=actorder == "static")


def solve(
    w: Float[Tensor, "out d"], factor: Factor, *, bits: int, group_size: int, sym: bool, static: bool
) -> GroupCodes:
    """Return the codes of `w`; its rows are independent, so layers with the same inputs may be stacked.

    Args:
        w: Weight of a linear layer, or of several with the same inputs.
        factor: Of their inputs.
        bits: Width of a code.
        group_size: Input channels that share one grid; divides `d`, or -1 for all of them.
        sym: Whether zero is in the middle of every grid.
        static: Grids come from the unsolved weights of neighbouring channels. Otherwise groups are formed in
            the order of solving, and a grid is fitted when its group is reached, to weights that have
            absorbed all errors so far.
    """
    inputs, u, order = w.shape[1], factor.u, factor.order
    size = inputs if group_size == -1 else group_size
    w = w.masked_fill(factor.dead, 0)
    grids: list[grid.Grid] = []
    if static:
        grids = [grid.fit(part, dim=1, bits=bits, sym=sym) for part in w.split(size, dim=1)]
    group_of = (order if static else torch.arange(inputs, device=w.device)) // size  # in the order of solving
    groups = group_of.tolist()

    w = w[:, order].T.contiguous()  # (d, out): a channel is a row from here on, and so lies together
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start, stop in _blocks(inputs, size):
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            if not static and i % size == 0:
                grids.append(grid.fit(w[i : i + size], dim=0, bits=bits, sym=sym))
            here = grids[groups[i]]
            code = here.encode(w[i])
            codes[i] = code
            error = (w[i] - here.decode(code)) / u[i, i]
            w[i:stop].addr_(u[i, i:stop], error, alpha=-1)  # this block, now
            errors[i - start] = error
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)  # everything beyond it, once

    back = order.argsort()
    return GroupCodes(
        codes=codes[back].T.contiguous(),
        scales=torch.stack([g.scale for g in grids], dim=1).half(),
        zeros=torch.stack([g.zero for g in grids], dim=1).to(torch.uint8),
        g_idx=group_of[back].to(torch.int32),
        bits=bits,
    )


def _blocks(inputs: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of at most `BLOCK` channels in which every group that begins has all its channels up to date.

    A group may not begin within a block and end beyond it: the channels beyond have not been told yet.
    """
    step = BLOCK // size * size if size <= BLOCK else size
    for outer in range(0, inputs, step):
        end = min(outer + step, inputs)
        for start in range(outer, end, BLOCK):
            yield start, min(start + BLOCK, end)
