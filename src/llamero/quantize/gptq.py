"""GPTQ: round one input channel at a time and let the channels still to come absorb the error.

Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Where it is known how the loss feels the outputs, those still to
come absorb errors too (in the way of Tseng et al. 2025, arXiv:2505.22988, with some outputs at a time for single ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.checkpoint.codes import Actorder, GroupCodes
from llamero.core.errors import LlameroError
from llamero.model import grid
from llamero.quantize.factor import inverse_factor

BLOCK = 128
"""Channels whose errors are gathered before the channels beyond them are told."""

STRIP = 32
"""Channels whose errors are gathered before the rest of their block is told."""

COLUMNS = 2048
"""Rows of weights, of all grids together, that are solved at a time: a block of their channels stays in the cache."""

OUTPUTS = 64
"""Outputs that are solved at a time where they are coupled; fewer are better and take longer."""

MOST_STEPS = 16
"""In how many steps the outputs of a set are solved at most."""

WAITING = 2**29
"""Bytes of coupled weights that wait for their turn."""

OUTPUT_DAMP = 0.1
"""Added to the diagonal of the gradients' second moments, as a fraction of its mean: they come from few tokens."""

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

    @property
    def importance(self) -> Float[Tensor, " d"]:
        """Return what a squared difference costs in each channel, in the order of solving, all later ones answering."""
        return self.u.diagonal() ** -2.0


@dataclass(frozen=True, eq=False)
class Outputs:
    """How the errors of a layer's outputs add up in the loss, for sets of neighbouring outputs."""

    u: Float[Tensor, "sets size size"]
    """Upper triangular, `u.T @ u` is the inverse of the gradients' damped second moment, in the order of solving."""
    order: Int[Tensor, "sets size"]
    """Outputs of a set in the order of solving: those first that the loss feels most."""


def couple(g: Float[Tensor, "sets size size"]) -> Outputs:
    """Return how errors of outputs add up in the loss.

    Args:
        g: Second moments of the loss's gradients by the outputs, for sets of neighbouring outputs.
    """
    factors, orders = zip(*(_couple_set(each) for each in g), strict=True)
    return Outputs(torch.stack(factors), torch.stack(orders))


def _couple_set(g: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = g.diagonal()
    mean = diagonal.mean()
    added = OUTPUT_DAMP * mean if mean > 0 else torch.ones_like(mean)  # nothing is felt: each for itself
    order = diagonal.argsort(descending=True, stable=True)
    u = inverse_factor(g, order, added=added.expand(len(g)))
    if u is None:
        raise ValueError(f"second moments of {len(g)} gradients are not positive semidefinite")
    return u, order


@dataclass(frozen=True)
class Grids:
    """On which values weights may come to lie."""

    bits: int
    """Width of a code."""
    group_size: int
    """Input channels that share one grid; divides `d`, or -1 for all of them."""
    sym: bool = True
    """Zero in the middle of every grid."""
    static: bool = False
    """Grids come from the unsolved weights of neighbouring channels. Otherwise groups are formed in the order of
    solving, and a grid is fitted when its group is reached, to weights that have absorbed all errors so far."""
    shrinks: tuple[float, ...] = ()
    """Smaller grids to try, see `grid.search`; none: each spans its weights."""

    def size(self, inputs: int) -> int:
        """Return the channels of a group."""
        return inputs if self.group_size == -1 else self.group_size

    def fit(self, w: Float[Tensor, "*groups group columns"], importance: Float[Tensor, "*groups group"]) -> grid.Grid:
        """Return the grid of a group, or of several, for each column."""
        if not self.shrinks:
            return grid.fit(w, dim=-2, bits=self.bits, sym=self.sym)
        dim = w.dim() - 2
        return grid.search(w, importance[..., None], dim=dim, bits=self.bits, sym=self.sym, shrinks=self.shrinks)


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
        u = inverse_factor(h, order, added=dead * mean + used * mean)
        if u is not None:
            return Factor(u, order, dead, used)
    raise LlameroError(
        f"the second moment of its inputs is not positive definite, even damped by {used:g} of its mean diagonal",
        where=where,
        fix="calibrate on more, or more varied, text",
    )


def quantize(
    w: Float[Tensor, "out d"],
    h: Float[Tensor, "d d"],
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    actorder: Actorder = "none",
    damp: float = 0.01,
    shrinks: tuple[float, ...] = (),
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
        shrinks: Smaller grids to try, see `grid.search`.
    """
    factor = factorize(h, by_activation=actorder != "none", damp=damp)
    return solve(w, factor, [Grids(bits, group_size, sym, actorder == "static", shrinks)])[0]


def solve(
    w: Float[Tensor, "out d"], factor: Factor, asked: Sequence[Grids], outputs: Outputs | None = None
) -> list[GroupCodes]:
    """Return the codes of `w` on each of the grids asked for.

    Layers with the same inputs may be stacked in `w`. The grids are stacked as if they were more rows, so that a
    channel costs the same few operations whatever is asked for; none changes the codes of another. Beside the codes,
    what is held at a time grows neither with the rows nor with the grids.

    Args:
        w: Weight of a linear layer, or of several with the same inputs.
        factor: Of their inputs.
        asked: Any number of grids.
        outputs: How errors of outputs add up; without it each counts for itself, and rows are independent.
    """
    inputs = w.shape[1]
    stacks: dict[Blocks, list[int]] = {}
    for number, grids in enumerate(asked):
        stacks.setdefault(_blocks(inputs, grids.size(inputs)), []).append(number)
    found: dict[int, GroupCodes] = {}
    for blocks, stack in stacks.items():
        solver = _Solver(factor, [asked[number] for number in stack], blocks)
        parts = solver.alone(w) if outputs is None else solver.together(w, outputs)
        for number, pieces in zip(stack, zip(*parts, strict=True), strict=True):
            found[number] = _one_below_the_other(pieces)
    return [found[number] for number in range(len(asked))]


def _one_below_the_other(pieces: Sequence[GroupCodes], order: Tensor | None = None) -> GroupCodes:
    """Return the codes of all rows, put into another order."""
    if len(pieces) == 1 and order is None:
        return pieces[0]
    codes, scales, zeros = zip(*((piece.codes, piece.scales, piece.zeros) for piece in pieces), strict=True)
    whole = (torch.cat(codes), torch.cat(scales), torch.cat(zeros))
    if order is not None:
        whole = (whole[0][order], whole[1][order], whole[2][order])
    return GroupCodes(*whole, pieces[0].g_idx, pieces[0].bits)


@dataclass(frozen=True)
class _Solver:
    """Solves for several grids that have the same blocks."""

    factor: Factor
    asked: Sequence[Grids]
    blocks: Blocks

    def alone(self, w: Tensor) -> Iterator[tuple[GroupCodes, ...]]:
        """Yield the codes of some rows after the other, none of which changes another's."""
        for part in w.split(max(1, COLUMNS // len(self.asked))):
            part = part.masked_fill(self.factor.dead, 0)
            yield self.sweep(part.expand(len(self.asked), *part.shape))

    def together(self, w: Tensor, outputs: Outputs) -> Iterator[tuple[GroupCodes, ...]]:
        """Yield the codes of some sets of outputs after the other."""
        count, size = outputs.order.shape
        sets = max(1, WAITING // (len(self.asked) * size * w.shape[1] * w.element_size()))
        for first in range(0, count, sets):
            chosen = slice(first, first + sets)
            yield self.sets(w.unflatten(0, (count, size))[chosen], outputs.u[chosen], outputs.order[chosen])

    def sets(self, w: Tensor, u: Tensor, order: Tensor) -> tuple[GroupCodes, ...]:
        """Return the codes of sets of outputs: what some of a set are off by, those still to come are told.

        That is GPTQ once more, over outputs in place of channels, and a few of them at a time.

        Args:
            w: (sets, size, d).
            u: (sets, size, size), upper triangular, of the inverse of what couples the outputs.
            order: (sets, size), in which outputs are solved.
        """
        count, size, _ = w.shape
        w = w.take_along_dim(order[..., None], 1).masked_fill_(self.factor.dead, 0)
        targets = w.expand(len(self.asked), *w.shape).clone()  # (grids, sets, size, d)
        pieces: list[tuple[GroupCodes, ...]] = []
        rows: list[Tensor] = []  # where outputs of the pieces lie
        step = max(1, min(OUTPUTS, size // 2), size // MOST_STEPS)  # in one step none would be told anything
        for start in range(0, size, step):
            stop = min(start + step, size)
            wanted = targets[:, :, start:stop]
            pieces.append(self.sweep(wanted.flatten(1, 2)))
            rows.append((torch.arange(count, device=w.device)[:, None] * size + order[:, start:stop]).flatten())
            if stop < size:
                made = torch.stack([codes.dequantize(w.dtype) for codes in pieces[-1]]).view_as(wanted)
                within, beyond = u[:, start:stop, start:stop], u[:, start:stop, stop:]
                errors = torch.linalg.solve_triangular(within.mT, wanted - made, upper=False)
                for target, error in zip(targets, errors, strict=True):
                    target[:, stop:] -= beyond.mT @ error
        back = torch.cat(rows).argsort()
        return tuple(_one_below_the_other(mine, back) for mine in zip(*pieces, strict=True))

    def sweep(self, w: Float[Tensor, "grids rows d"]) -> tuple[GroupCodes, ...]:
        """Return the codes of some rows, each grid those of its own."""
        rows = w.shape[1]
        x = w[:, :, self.factor.order].flatten(0, 1).T.contiguous()  # (d, columns): a channel is a row from here on
        codes = torch.empty(x.shape, dtype=torch.uint8, device=w.device)
        parts = [
            _Part(grids, own, self.factor, slice(i * rows, (i + 1) * rows))
            for i, (grids, own) in enumerate(zip(self.asked, w, strict=True))
        ]
        u = self.factor.u
        for start, stop, strips in self.blocks:
            errors = torch.empty_like(x[start:stop])
            for first, end in strips:
                mine = errors[first - start : end - start]
                _round_strip(x, self.factor, parts, first, end, codes, mine)
                x[end:stop].addmm_(u[first:end, end:stop].T, mine, alpha=-1)  # the rest of its block
            x[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)  # everything beyond it, once
        back = self.factor.order.argsort()
        return tuple(part.result(codes, back) for part in parts)


def _round_strip(
    x: Tensor, factor: Factor, parts: Sequence[_Part], start: int, stop: int, codes: Tensor, errors: Tensor
) -> None:
    """Write the codes of a strip of channels, and their errors, of which the channels beyond are to be told."""
    strip, u = x[start:stop], factor.u[start:stop, start:stop]
    pivots = u.diagonal()[:, None]
    told = (u / pivots).triu_(1)  # of one channel's difference; nothing before it, nor itself
    begins: dict[int, list[_Part]] = {}
    for part in parts:
        for channel in part.begins(start, stop):
            begins.setdefault(channel - start, []).append(part)
    scale, low, high, steps = (torch.empty_like(strip) for _ in range(4))
    channels = (each.unbind() for each in (strip, told, scale, low, high, steps, errors))
    for i, (w, tell, size, least, most, step, error) in enumerate(zip(*channels, strict=True)):
        for part in begins.get(i, ()):
            part.lay(x, start + i, scale[i:], low[i:], high[i:])
        torch.div(w, size, out=step)
        torch.clamp(step.round_(), least, most, out=step)
        torch.addcmul(w, step, size, value=-1, out=error)
        strip.addr_(tell, error, alpha=-1)  # this strip, now
    errors.div_(pivots)
    codes[start:stop] = steps.sub_(low)


class _Part:
    """The columns that one of several stacked grids has."""

    def __init__(self, grids: Grids, w: Tensor, factor: Factor, where: slice) -> None:
        inputs = w.shape[1]
        self.grids, self.where, self.size = grids, where, grids.size(inputs)
        self.importance = factor.importance
        channels = factor.order if grids.static else torch.arange(inputs, device=w.device)
        self.group = channels // self.size  # in the order of solving
        self.scales = w.new_empty(inputs // self.size, len(w))
        self.low = torch.empty_like(self.scales)
        if grids.static:
            importance = self.importance[factor.order.argsort()]
            self._fit(slice(None), w.T.unflatten(0, (-1, self.size)), importance.unflatten(0, (-1, self.size)))

    def _fit(self, groups: int | slice, w: Tensor, importance: Tensor) -> None:
        found = self.grids.fit(w, importance)
        self.scales[groups] = found.scale
        torch.neg(found.zero, out=self.low[groups])

    def begins(self, start: int, stop: int) -> Sequence[int]:
        """Return at which channels from `start` to `stop` grids have to be laid."""
        if self.grids.static:
            return (start,)
        inside = range(-(-start // self.size) * self.size, stop, self.size)
        return inside if start in inside else (start, *inside)

    def lay(self, x: Tensor, channel: int, scale: Tensor, low: Tensor, high: Tensor) -> None:
        """Write the grids of the channels from this one on, as far as they are known.

        Args:
            x: Weights of all channels in the order of solving, up to date.
            channel: That is rounded now.
            scale: Of the channels from this one to the end of the strip.
            low: Their lowest steps.
            high: Their highest steps.
        """
        if self.grids.static:
            group: Tensor | int = self.group[channel : channel + len(scale)]
        else:
            group, end = channel // self.size, channel + self.size
            if channel % self.size == 0:
                self._fit(group, x[channel:end, self.where], self.importance[channel:end])
            scale, low, high = (each[: self.size] for each in (scale, low, high))
        scale[:, self.where] = self.scales[group]
        low[:, self.where] = self.low[group]
        torch.add(low[:, self.where], 2**self.grids.bits - 1, out=high[:, self.where])

    def result(self, codes: Tensor, back: Tensor) -> GroupCodes:
        """Return the codes, channels as they lay."""
        return GroupCodes(
            codes=codes[:, self.where][back].T.contiguous(),
            scales=self.scales.T.half().contiguous(),
            zeros=self.low.T.neg().to(torch.uint8).contiguous(),
            g_idx=self.group[back].to(torch.int32),
            bits=self.grids.bits,
        )


Blocks = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
"""First and last channel of each block, and of its strips."""


@cache
def _blocks(inputs: int, size: int) -> Blocks:
    """Return blocks of at most `BLOCK` channels, each in strips of at most `STRIP`."""
    return tuple(
        (start, stop, tuple((start + first, start + end) for first, end in _parts(stop - start, size, STRIP)))
        for start, stop in _parts(inputs, size, BLOCK)
    )


def _parts(inputs: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield at most so many channels after the other; every group that begins has all its channels up to date.

    A group may not begin within a part and end beyond it: the channels beyond have not been told yet.
    """
    step = most // size * size if size <= most else size
    for outer in range(0, inputs, step):
        end = min(outer + step, inputs)
        for start in range(outer, end, most):
            yield start, min(start + most, end)
