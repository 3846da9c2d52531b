"""Every method: a decoder layer in, its codes for each variant out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from llamero.model import rtn
from llamero.quantize import awq, bitsandbytes, gptq, kquant
from llamero.quantize.problem import LayerProblems, Problem, Solution
from llamero.quantize.refine import refine
from llamero.quantize.variants import Variant

SHRINKS: dict[int, tuple[float, ...]] = dict.fromkeys((3, 4, 5, 6), tuple(step / 20 for step in range(12, 20)))
"""Sizes of grids that GPTQ tries beside the whole span of a group's weights, by the width of codes. At 8 bits nothing
is left to gain. At 2 bits weights that absorb errors need room, and much smaller grids do harm."""

COUPLED_SHRINKS: dict[int, tuple[float, ...]] = SHRINKS | {2: (0.75, 0.85, 0.95, 1.1)}
"""Where outputs answer to one another."""

REFINED = {3: 2}
"""Sweeps of `refine` for codes of some widths, where nothing else is asked for."""

Method = Callable[[LayerProblems, Sequence[Variant]], Iterator[Solution]]
"""Yields a solution for each variant, in their order; all variants of a method are asked for together."""


def _rtn(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    for variant in variants:
        solution = Solution()
        for problem in layer.inputs.values():
            codes = rtn.quantize(problem.weight, bits=variant.bits, group_size=variant.group_size, sym=variant.sym)
            solution.add(problem, codes)
        yield solution


def _gptq(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    for some in layer.together(variants):
        yield from _gptq_together(layer, some)


def _gptq_together(layer: LayerProblems, variants: Sequence[Variant]) -> list[Solution]:
    """Return solutions of variants that are held in memory at a time; those with the same order share a sweep."""
    solutions, seconds = [Solution() for _ in variants], [0.0] * len(variants)
    for problem in layer.heaviest_first():
        for by_activation in (True, False):
            mine = [i for i, variant in enumerate(variants) if (variant.actorder != "none") == by_activation]
            if mine:
                chosen = [variants[i] for i in mine]
                spent = _in_one_order(layer, problem, by_activation, chosen, [solutions[i] for i in mine])
                for i, each in zip(mine, spent, strict=True):
                    seconds[i] += each
    for solution, whole in zip(solutions, seconds, strict=True):
        solution.seconds = whole
    return solutions


def _in_one_order(
    layer: LayerProblems,
    problem: Problem,
    by_activation: bool,
    variants: Sequence[Variant],
    solutions: Sequence[Solution],
) -> list[float]:
    """Add the codes of variants with the same order to their solutions; return the seconds that each took."""
    started = time.perf_counter()
    coupled = problem.coupled and problem.coupled()
    asked = [_grids(variant, SHRINKS if coupled is None else COUPLED_SHRINKS) for variant in variants]
    factor = problem.factor(by_activation)
    found = gptq.solve(problem.weight, factor, asked, coupled)
    damp, dead = factor.damp, int(factor.dead.sum())
    del factor  # of a large layer it is as large as all weights
    shared, seconds = (time.perf_counter() - started) / len(variants), []
    for variant, solution, codes in zip(variants, solutions, found, strict=True):
        started = time.perf_counter()
        if sweeps := _sweeps(layer, problem, variant):
            moment = problem.statistics.second_moment
            codes = refine(problem.weight, moment, codes, damp=damp, sweeps=sweeps)
        solution.add(problem, codes, damp=damp, dead=dead)
        seconds.append(shared + time.perf_counter() - started)
    return seconds


def _grids(variant: Variant, shrinks: Mapping[int, tuple[float, ...]]) -> gptq.Grids:
    static = variant.actorder == "static"
    return gptq.Grids(variant.bits, variant.group_size, variant.sym, static, shrinks.get(variant.bits, ()))


def _sweeps(layer: LayerProblems, problem: Problem, variant: Variant) -> int:
    """Return how often codes are refined: unless it is said, where their width is worth it."""
    own = REFINED.get(variant.bits, 0) if problem.coupled is None else 0  # it knows nothing of other outputs
    return own if layer.refine is None else layer.refine


def _awq(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    for variant in variants:
        yield awq.solve(layer, bits=variant.bits, group_size=variant.group_size, sym=variant.sym)


METHODS: dict[str, Method] = {
    "gptq": _gptq,
    "awq": _awq,
    "rtn": _rtn,
    "gguf": kquant.solve,
    "gguf-rtn": kquant.round_nearest,
    "bitsandbytes": bitsandbytes.solve,
}
"""Every method there is. To add one: a file, a line here, a name in `variants`, a parity test."""

DAMPED = frozenset({"gptq", "gguf"})
"""Methods that damp the second moment."""

TOGETHER = frozenset({"awq"})
"""Methods that need all of a decoder layer at once; others solve linear layers with the same inputs by themselves."""
