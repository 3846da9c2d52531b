"""Weights in the types of a GGUF mix: GPTQ's rounding within their blocks, or each weight rounded by itself.

The scales of a block are fitted with the importance of its input channels. GPTQ then takes one channel after another
and lets those to come absorb the error (Frantar et al. 2022, arXiv:2210.17323); nothing about the file is different.
"""

import time
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.gguf_names import to_gguf
from llamero.model.kquants import KINDS, BlockCodes, fit, pack, round_to
from llamero.quantize import gguf_mix
from llamero.quantize.gptq import Factor
from llamero.quantize.problem import AT_ONCE, LayerProblems, Problem, Solution
from llamero.quantize.variants import Variant


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
    solutions = [Solution(importance=dict(heeded), seconds=0.0) for _ in variants]
    for problem in layer.heaviest_first():
        started = time.perf_counter()
        factor = problem.factor(False)
        shared = (time.perf_counter() - started) / len(variants)
        for variant, solution in zip(variants, solutions, strict=True):
            started = time.perf_counter()
            _add(solution, layer, problem, variant, factor)
            assert solution.seconds is not None
            solution.seconds += shared + time.perf_counter() - started
        del factor  # before the next one is made, not after
    return solutions


def _add(solution: Solution, layer: LayerProblems, problem: Problem, variant: Variant, factor: Factor) -> None:
    kinds, codes = gguf_mix.types(layer.shape, variant.mix), {}
    for name, weight in zip(problem.names, problem.weight.split(problem.outputs), strict=True):
        theirs = _named(layer, name)
        kind = kinds[theirs]
        if kind in KINDS:
            codes[name] = gptq(weight, factor, kind, importance=solution.importance[theirs])
        else:
            codes[name] = round_to(weight, kind)
    solution.add_parts(problem, codes, damp=factor.damp, dead=int(factor.dead.sum()))


def gptq(w: Float[Tensor, "out d"], factor: Factor, kind: str, *, importance: Float[Tensor, " d"]) -> BlockCodes:
    """Return blocks that are rounded one input channel after another, the channels to come absorbing the error.

    The scales of a block are fitted to its weights as they are when it is reached, and stay.

    Args:
        w: Weight, its inputs a multiple of the kind's block.
        factor: Of its inputs, in their own order.
        kind: A name of `kquants.KINDS`.
        importance: Mean square of the inputs.
    """
    parts = w.split(max(1, AT_ONCE // w.shape[1]))  # rows are independent
    return BlockCodes(torch.cat([_gptq(part, factor, kind, importance) for part in parts]), kind)


def _gptq(w: Tensor, factor: Factor, kind: str, importance: Tensor) -> Tensor:
    u, width = factor.u, KINDS[kind].block
    w = w.masked_fill(factor.dead, 0)
    rows = []
    for start in range(0, w.shape[1], width):
        stop = start + width
        found = fit(w[:, start:stop], kind, importance=importance[start:stop])
        codes, errors = _round_block(
            w[:, start:stop].T.contiguous(), u[start:stop, start:stop], *found.grid(), found.ends
        )
        w[:, stop:] -= errors.T @ u[start:stop, stop:]
        rows.append(pack(found.recoded(codes.T), kind, rows=len(w)))
    return torch.cat(rows, 1)


def _round_block(
    w: Float[Tensor, "n out"],
    u: Float[Tensor, "n n"],
    step: Float[Tensor, "out n"],
    low: Float[Tensor, "out n"],
    ends: tuple[int, int],
) -> tuple[Float[Tensor, "n out"], Float[Tensor, "n out"]]:
    """Return the codes of a block's channels, and the error of each that the channels beyond are to absorb."""
    step, low = step.T.contiguous(), low.T.contiguous()
    inverse = torch.where(step == 0, 0.0, 1 / step)
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for i in range(len(w)):
        codes[i] = ((w[i] + low[i]) * inverse[i]).round_().clamp_(*ends)
        errors[i] = (w[i] - (step[i] * codes[i] - low[i])) / u[i, i]
        w[i:].addr_(u[i, i:], errors[i], alpha=-1)
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
