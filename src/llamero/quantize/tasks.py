"""What there is to solve of a decoder layer, in tasks that any process can take: who solves one changes no byte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llamero.quantize.methods import METHODS, TOGETHER
from llamero.quantize.problem import LayerProblems
from llamero.quantize.statistics import INPUTS
from llamero.quantize.variants import Variant

WHOLE = "layer"
"""All linear layers of a decoder layer, as a part of it that is solved at once."""

FINE = 3
"""Tasks for each process, where they can be made: the last to be finished keeps nobody waiting for long."""

COARSE = frozenset({"gguf"})
"""Methods whose variants share more than a factor (mixes have types of blocks in common): they are cut only where their
task would be more than a process's share of the layer."""

_PER_WEIGHT: dict[str, float] = {"gptq": 3000, "awq": 6000, "gguf": 6000}
"""What a weight costs beside products with all channels, in channels; of other methods nothing but that counts."""


@dataclass(frozen=True)
class Task:
    """A part of a decoder layer for some variants of a method."""

    part: str
    """A key of `INPUTS`, or `WHOLE`."""
    method: str
    variants: tuple[Variant, ...]
    cost: float
    """About, in products of numbers."""

    def of(self, problems: LayerProblems) -> LayerProblems:
        """Return what is to be solved."""
        return problems if self.part == WHOLE else replace(problems, inputs={self.part: problems.inputs[self.part]})


def tasks(problems: LayerProblems, wanted: dict[str, list[Variant]], *, processes: int = 1) -> list[Task]:
    """Return what is to be solved; for several processes in smaller tasks, the largest first.

    All that one method does for a part is a task where one process does it: what variants share is then computed once.

    Args:
        problems: The decoder layer.
        wanted: Variants whose layer lacks a part, by parts.
        processes: That share the tasks.
    """
    found = list(_whole(problems, wanted))
    if processes == 1:
        return found
    share = sum(task.cost for task in found) / processes
    mosts = [share if task.method in COARSE else share / FINE for task in found]
    small = [each for task, most in zip(found, mosts, strict=True) for each in _split(problems, task, most)]
    return sorted(small, key=lambda task: -task.cost)


def _whole(problems: LayerProblems, wanted: dict[str, list[Variant]]) -> Iterator[Task]:
    for part in (*INPUTS, WHOLE):
        for method in METHODS:
            if (part == WHOLE) == (method in TOGETHER):
                variants = tuple(variant for variant in wanted[part] if variant.method == method)
                if variants:
                    yield Task(part, method, variants, _cost(problems, part, variants))


def _split(problems: LayerProblems, task: Task, most: float) -> Iterator[Task]:
    """Yield the halves of a task, and theirs, until they are small or of one variant; those of an order stay near."""
    if task.cost <= most or len(task.variants) == 1:
        yield task
        return
    variants = sorted(task.variants, key=_by_activation)
    half = len(variants) // 2
    for some in (variants[:half], variants[half:]):
        cost = _cost(problems, task.part, some)
        yield from _split(problems, replace(task, variants=tuple(some), cost=cost), most)


def _cost(problems: LayerProblems, part: str, variants: Sequence[Variant]) -> float:
    """Return about how many products it takes: sweeps over all weights, and a factor for each order of channels."""
    method, total = variants[0].method, 0.0
    for problem in problems.inputs.values() if part == WHOLE else [problems.inputs[part]]:
        weights = problem.inputs * sum(problem.outputs)
        total += len(variants) * weights * (problem.inputs + _PER_WEIGHT.get(method, 0))
        if method in {"gptq", "gguf"}:
            total += len({_by_activation(variant) for variant in variants}) * problem.inputs**3
    return total


def _by_activation(variant: Variant) -> bool:
    return variant.actorder != "none"
