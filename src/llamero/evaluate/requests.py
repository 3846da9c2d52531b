"""The requests of a benchmark task: which, from which files, and written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llamero.core import files
from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus import benchmarks, benchmarks_hub
from llamero.evaluate import h4, questions
from llamero.evaluate.config import HUB
from llamero.evaluate.questions import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.evaluate.config import H4Task
    from llamero.evaluate.questions import Task


_FOUR = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa")
FOLDERS: dict[str, tuple[str, ...]] = {
    "h4": _FOUR,
    "openllm": (*_FOUR, "winogrande", "gsm8k"),
    "truthfulqa_mc": ("truthfulqa",),
    "truthfulqa_mc1": ("truthfulqa",),
}
"""Folders of the layout that a task reads, where they are not called as it is."""


def of(task: H4Task, root: Path) -> list[Task]:
    """Return what a task asks.

    Args:
        task: What a recipe or a command line says.
        root: Directory that its paths start from.

    Raises:
        LlameroError: Files are missing or broken, or there is no such subject.
    """
    directory = _fetched(task) if task.data == HUB else root / task.data
    return h4.tasks(
        directory,
        _names(task, directory),
        limit=task.limit,
        truthfulqa_edition=task.truthfulqa,
        rules=RULES[task.compat],
    )


def write(path: Path, asked: Sequence[Task]) -> int:
    """Write the request list, as `questions.lines` says, and return how many there are."""
    if not path.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=path.parent)
    with files.disk_errors_named(path):
        files.write_atomically(path, "".join(questions.lines(asked)))
    return sum(len(task.requests) for task in asked)


def _fetched(task: H4Task) -> Path:
    """Return where the files of the hub are that a task reads."""
    folders = FOLDERS.get(task.tasks, (task.tasks,))
    edition = task.truthfulqa or h4.EDITION[task.compat]
    if "truthfulqa" in folders and edition == "2021":
        raise LlameroError(
            "the hub serves the later edition of TruthfulQA, published scores used that of 2021",
            fix="--truthfulqa later, or a directory with mc_task_2021.json: --data DIR",
        )
    return benchmarks_hub.fetched(folders)


def _names(task: H4Task, directory: Path) -> list[str]:
    """Return the tasks to ask for; a limit on MMLU subjects takes the first by name."""
    if task.subjects is None:
        return [task.tasks]
    groups = {"h4": list(h4.BENCHMARKS), "mmlu": ["mmlu"], "openllm": [*h4.BENCHMARKS, *h4.TODAY]}
    there = benchmarks.mmlu_subjects(directory)
    chosen = there[: task.subjects] if isinstance(task.subjects, int) else task.subjects
    for subject in chosen:
        if subject not in there:
            raise LlameroError(
                f"MMLU has no subject `{subject}` here", where=directory, fix=did_you_mean(subject, there)
            )
    subjects = [h4.MMLU_PREFIX[task.compat] + subject for subject in chosen]
    return [part for name in groups[task.tasks] for part in (subjects if name == "mmlu" else [name])]
