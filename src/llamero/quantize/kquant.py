"""Weights in the types of a GGUF mix, each rounded with the importance of its input channel."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from llamero.checkpoint.gguf_names import to_gguf
from llamero.model.kquants import round_to
from llamero.quantize import gguf_mix
from llamero.quantize.problem import LayerProblems, Problem, Solution
from llamero.quantize.variants import Variant


def solve(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    """Yield the blocks of each variant; a channel counts by its mean square on the calibration text.

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


def importance(layer: LayerProblems, problem: Problem, theirs: str) -> Tensor:
    """Return the mean square (d,) of the inputs of a layer, by its name in GGUF: that of a file, if one is given."""
    given = layer.imatrix.get(theirs)
    if given is not None:
        return given.to(problem.weight.device)
    return problem.statistics.second_moment.diagonal() / problem.statistics.tokens


def _named(layer: LayerProblems, name: str) -> str:
    theirs = to_gguf(f"model.layers.{layer.number}.{name}.weight")
    if theirs is None:
        raise ValueError(f"{name} has no name in GGUF")
    return theirs
