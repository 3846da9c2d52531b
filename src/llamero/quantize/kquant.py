"""Weights in the types of a GGUF mix: GPTQ's rounding within their blocks, or each weight rounded by itself.

The scales of a block are fitted with the importance of its input channels. GPTQ then takes one channel after another
and lets those to come absorb the error (Frantar et al. 2022, arXiv:2210.17323); nothing about the file is different.
"""

import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.gguf_names import to_gguf
from llamero.model.kquants import KINDS, BlockCodes, Fitted, fit, pack, round_to
from llamero.quantize import gguf_mix
from llamero.quantize.gptq import STRIP, Factor
from llamero.quantize.problem import LayerProblems, Problem, Solution
from llamero.quantize.variants import Variant

ROWS = 512
"""Rows of weights that are solved at a time, in each of the kinds asked for."""

LANES = 16
"""Rows are filled up to a multiple of it: what comes out of them does not depend on where they lie."""


def round_nearest(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    """Yield the blocks of each variant, all weights rounded by themselves; a channel counts by its mean square.

    That is the diagonal of GPTQ's second moment, and llama.cpp's "imatrix".
    """
    for variant in variants:
        kinds, solution = gguf_mix.types(layer.shape, variant.mix), Solution()
        for problem in layer.inputs.values():
            codes = {}
            for name, weight in zip(problem.names, problem.weight.split(problem.outputs), strict=True):
                theirs = _named(layer, name)
                heeded = solution.importance[theirs] = importance(layer, problem, theirs)
                codes[name] = round_to(weight, kinds[theirs], importance=heeded)
            solution.add_parts(problem, codes)
        yield solution


def solve(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    """Yield the blocks of each variant, their codes found by GPTQ; types that are no blocks are rounded."""
    for some in layer.together(variants):
        yield from _together(layer, some)


def _together(layer: LayerProblems, variants: Sequence[Variant]) -> list[Solution]:
    """Return solutions of variants that are held in memory at a time; of each factor all have their share."""
    heeded = {
        theirs: importance(layer, problem, theirs)
        for problem in layer.inputs.values()
        for theirs in (_named(layer, name) for name in problem.names)
    }
    kinds = [gguf_mix.types(layer.shape, variant.mix) for variant in variants]
    solutions = [Solution(importance=dict(heeded), seconds=0.0) for _ in variants]
    for problem in layer.heaviest_first():
        started = time.perf_counter()
        factor = problem.factor(False)
        found: list[dict[str, BlockCodes]] = [{} for _ in variants]
        for name, weight in zip(problem.names, problem.weight.split(problem.outputs), strict=True):
            theirs = _named(layer, name)
            wanted = list(dict.fromkeys(mine[theirs] for mine in kinds))
            blocks = [kind for kind in wanted if kind in KINDS]
            made = {kind: round_to(weight, kind) for kind in wanted if kind not in KINDS}
            made |= gptq_each(weight, factor, blocks, importance=heeded[theirs])
            for codes, mine in zip(found, kinds, strict=True):
                codes[name] = made[mine[theirs]]
        damp, dead = factor.damp, int(factor.dead.sum())
        del factor  # before the next one is made, not after
        for solution, codes in zip(solutions, found, strict=True):
            solution.add_parts(problem, codes, damp=damp, dead=dead)
        for solution in solutions:
            assert solution.seconds is not None
            solution.seconds += (time.perf_counter() - started) / len(variants)
    return solutions


def gptq(w: Float[Tensor, "out d"], factor: Factor, kind: str, *, importance: Float[Tensor, " d"]) -> BlockCodes:
    """Return blocks of one kind; arguments as of `gptq_each`."""
    return gptq_each(w, factor, [kind], importance=importance)[kind]


def gptq_each(
    w: Float[Tensor, "out d"], factor: Factor, kinds: Sequence[str], *, importance: Float[Tensor, " d"]
) -> dict[str, BlockCodes]:
    """Return blocks that are rounded one input channel after another, the channels to come absorbing the error.

    The scales of a block are fitted to its weights as they are when it is reached, and stay. Kinds whose blocks are of
    one length are stacked as if they were more rows: a channel costs the same few operations whatever is asked for.

    Args:
        w: Weight, its inputs a multiple of the kinds' blocks.
        factor: Of its inputs, in their own order.
        kinds: Names of `kquants.KINDS`, each once.
        importance: Mean square of the inputs.
    """
    found: dict[str, BlockCodes] = {}
    for width in dict.fromkeys(KINDS[kind].block for kind in kinds):
        stack = [kind for kind in kinds if KINDS[kind].block == width]
        parts = [
            _gptq(part.masked_fill(factor.dead, 0), factor.u, stack, importance)
            for part in w.split(ROWS)  # rows are independent
        ]
        for kind, rows in zip(stack, zip(*parts, strict=True), strict=True):
            found[kind] = BlockCodes(torch.cat(rows), kind)
    return found


def _gptq(w: Tensor, u: Tensor, kinds: Sequence[str], importance: Tensor) -> list[Tensor]:
    """Return the bytes of some rows in each of several kinds whose blocks are of one length."""
    rows_here, width = len(w), KINDS[kinds[0]].block
    w = F.pad(w, (0, 0, 0, -len(w) % LANES))
    count = len(w)
    x = w.T.repeat(1, len(kinds))  # (d, columns): a channel is a row from here on
    columns = [slice(i * count, (i + 1) * count) for i in range(len(kinds))]
    rows: list[list[Tensor]] = [[] for _ in kinds]
    for start in range(0, len(x), width):
        stop = start + width
        block, heeded = x[start:stop], importance[start:stop]
        found = [
            fit(block[:, mine].T, kind, importance=heeded, thorough=False)
            for kind, mine in zip(kinds, columns, strict=True)
        ]
        codes, errors = _round_block(block, u[start:stop, start:stop], found, columns)
        for mine in columns:
            x[stop:, mine].addmm_(u[start:stop, stop:].T, errors[:, mine], alpha=-1)
        for kind, mine, fitted, parts in zip(kinds, columns, found, rows, strict=True):
            parts.append(pack(fitted.recoded(codes[:, mine].T.contiguous()), kind, rows=count))
    return [torch.cat(parts, 1)[:rows_here] for parts in rows]


def _round_block(
    w: Float[Tensor, "n columns"], u: Float[Tensor, "n n"], found: Sequence[Fitted], columns: Sequence[slice]
) -> tuple[Float[Tensor, "n columns"], Float[Tensor, "n columns"]]:
    """Return the codes of a block's channels, and the error of each that the channels beyond are to absorb.

    Args:
        w: Weights of all kinds side by side; is overwritten.
        u: Of the factor.
        found: The grids of each kind.
        columns: Of each kind; products are computed for one after the other, whatever else is there.
    """
    steps, lows = zip(*(each.grid() for each in found), strict=True)
    step, low = torch.cat(steps).T.contiguous(), torch.cat(lows).T.contiguous()
    inverse = torch.where(step == 0, 0.0, 1 / step)
    first, last = (
        torch.cat([w.new_full((len(mine),), each.ends[end]) for each, mine in zip(found, steps, strict=True)])
        for end in (0, 1)
    )
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, len(w), STRIP):
        stop = min(start + STRIP, len(w))
        strip, told = w[start:stop], u[start:stop, start:stop].triu(1).unbind()
        pivots = u.diagonal()[start:stop].tolist()
        channels = (each[start:stop].unbind() for each in (w, step, low, inverse, codes, errors))
        for pivot, tell, mine, size, least, back, code, error in zip(pivots, told, *channels, strict=True):
            torch.add(mine, least, out=code)
            torch.clamp(code.mul_(back).round_(), first, last, out=code)
            torch.addcmul(least, size, code, value=-1, out=error).add_(mine).div_(pivot)
            strip.addr_(tell, error, alpha=-1)  # this strip, now
        for mine in columns:  # the rest of the block
            w[stop:, mine].addmm_(u[start:stop, stop:].T, errors[start:stop, mine], alpha=-1)
    return codes, errors


def importance(layer: LayerProblems, problem: Problem, theirs: str) -> Tensor:
    """Return the mean square (d,) of the inputs of a layer, by its name in GGUF: that of a file, if one is given."""
    given = layer.imatrix.get(theirs)
    if given is not None:
        return given.to(problem.statistics.mean_abs.device)
    return problem.statistics.second_moment.diagonal() / problem.statistics.tokens


def _named(layer: LayerProblems, name: str) -> str:
    theirs = to_gguf(f"model.layers.{layer.number}.{name}.weight")
    if theirs is None:
        raise ValueError(f"{name} has no name in GGUF")
    return theirs
