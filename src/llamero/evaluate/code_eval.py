"""lm-eval's tasks that run what a model wrote (HumanEval, MBPP), with our sandbox in the place of their own runner.

They take the metric `code_eval` of the `evaluate` library, which runs programs as they are and is fetched from the hub.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llamero.evaluate import humaneval, sandbox
from llamero.evaluate.sandbox import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FENCED = ("humaneval", "mbpp")
"""How the names of tasks begin that run programs by `code_eval` alone."""
METRIC = "code_eval"


class CodeEval:
    """The metric, in the sandbox."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = humaneval.KS,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Return pass@k over all problems, and for each problem what became of its programs.

        Args:
            references: Tests of each problem.
            predictions: Programs for each problem; each runs with the tests after it.
            k: Numbers of tries; those beyond the number of programs are left out.
            timeout: Processor time of each program, in seconds.
        """
        programs = [f"{each}\n{test}" for test, those in zip(references, predictions, strict=True) for each in those]
        outcomes = iter(sandbox.run_all(programs, Limits(seconds=timeout)))
        found: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, those in enumerate(predictions):
            found[task] = [
                (number, {"task_id": task, "passed": each.passed, "result": each.said or each.how})
                for number, each in zip(range(len(those)), outcomes, strict=False)
            ]
        right = [sum(said["passed"] for _, said in each) for each in found.values()]
        fewest = min(len(those) for those in predictions)
        means: dict[str, float] = {}
        for tries in k:
            if tries <= fewest:
                each = [humaneval.pass_at(tries, len(p), r) for p, r in zip(predictions, right, strict=True)]
                means[f"pass@{tries}"] = sum(each) / len(each)
        return means, found


@contextmanager
def fenced(names: Sequence[str]) -> Iterator[bool]:
    """Put the sandbox in the place of `code_eval` meanwhile; say whether all programs of these tasks run in it.

    Args:
        names: Of lm-eval's tasks.
    """
    mine = bool(names) and all(name.startswith(FENCED) for name in names)
    if not any(name.startswith(FENCED) for name in names):
        yield mine
        return
    sandbox.refuse_unfenced()
    library: Any = importlib.import_module("evaluate")
    real = library.load

    def load(path: str, *more: Any, **options: Any) -> Any:
        return CodeEval() if path == METRIC else real(path, *more, **options)

    library.load = load
    try:
        yield mine
    finally:
        library.load = real
