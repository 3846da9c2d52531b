"""Every method: a decoder layer in, its codes for each variant out."""

from collections.abc import Callable, Iterator, Sequence

from llamero.model import rtn
from llamero.quantize import awq, bitsandbytes, gptq, kquant
from llamero.quantize.problem import LayerProblems, Solution
from llamero.quantize.refine import refine
from llamero.quantize.variants import Variant

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
    for variant in variants:
        solution = Solution()
        for problem in layer.inputs.values():
            factor = problem.factor(variant.actorder != "none")
            codes = gptq.solve(
                problem.weight,
                factor,
                bits=variant.bits,
                group_size=variant.group_size,
                sym=variant.sym,
                static=variant.actorder == "static",
            )
            if layer.refine:
                moment = problem.statistics.second_moment
                codes = refine(problem.weight, moment, codes, damp=factor.damp, sweeps=layer.refine)
            solution.add(problem, codes, damp=factor.damp, dead=int(factor.dead.sum()))
        yield solution


def _awq(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    for variant in variants:
        yield awq.solve(layer, bits=variant.bits, group_size=variant.group_size, sym=variant.sym)


METHODS: dict[str, Method] = {
    "gptq": _gptq,
    "awq": _awq,
    "rtn": _rtn,
    "gguf": kquant.solve,
    "bitsandbytes": bitsandbytes.solve,
}
"""Every method there is. To add one: a file, a line here, a name in `variants`, a parity test."""

DAMPED = frozenset({"gptq"})
"""Methods that damp the second moment."""
