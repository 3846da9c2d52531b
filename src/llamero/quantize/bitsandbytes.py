"""The two kinds of bitsandbytes, which look at the weights alone."""

from collections.abc import Iterator, Sequence

from llamero.model import int8, nf4
from llamero.quantize.problem import LayerProblems, Solution
from llamero.quantize.variants import Variant


def solve(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    """Yield the nearest codes for each variant; scales of nf4 are quantized over all of a layer."""
    for variant in variants:
        solution = Solution()
        for problem in layer.inputs.values():
            weights = dict(zip(problem.names, problem.weight.split(problem.outputs), strict=True))
            if variant.bits == 8:
                solution.add_parts(problem, {name: int8.encode(weight) for name, weight in weights.items()})
            else:
                solution.add_parts(problem, {name: nf4.codes(weight) for name, weight in weights.items()})
        yield solution
