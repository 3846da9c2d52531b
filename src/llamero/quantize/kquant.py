"""Weights in the types of a GGUF mix, each rounded with the importance of its input channel."""

from collections.abc import Iterator, Mapping, Sequence

from llamero.checkpoint.gguf_names import to_gguf
from llamero.model.kquants import round_to
from llamero.quantize import gguf_mix
from llamero.quantize.problem import LayerProblems, Solution
from llamero.quantize.variants import Variant


def solve(layer: LayerProblems, variants: Sequence[Variant]) -> Iterator[Solution]:
    """Yield the blocks of each variant; a channel counts by its mean square on the calibration text.

    That is the diagonal of GPTQ's second moment, and llama.cpp's "imatrix".
    """
    for variant in variants:
        kinds, solution = gguf_mix.types(layer.shape, variant.mix), Solution()
        for problem in layer.inputs.values():
            importance = problem.statistics.second_moment.diagonal() / problem.statistics.tokens
            parts = zip(problem.names, problem.weight.split(problem.outputs), strict=True)
            codes = {
                name: round_to(weight, kind_of(kinds, layer.number, name), importance=importance)
                for name, weight in parts
            }
            solution.add_parts(problem, codes)
        yield solution


def kind_of(kinds: Mapping[str, str], number: int, name: str) -> str:
    """Return the type of a linear layer.

    Args:
        kinds: Of all tensors, by their names in the file.
        number: Of the decoder layer.
        name: Of the linear layer within it.
    """
    theirs = to_gguf(f"model.layers.{number}.{name}.weight")
    if theirs is None:
        raise ValueError(f"{name} has no name in GGUF")
    return kinds[theirs]
