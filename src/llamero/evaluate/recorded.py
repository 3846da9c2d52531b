"""MT-Bench scores from a judge's recorded replies, in the layouts of FastEval and FastChat."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError
from llamero.corpus import mt_bench as files
from llamero.evaluate.mt_bench import Rated, fasteval_scores, scores

if TYPE_CHECKING:
    from pathlib import Path

REPLIES = "judge-replies.json"
_OWN = {
    files.FIRST + index * files.PER_CATEGORY + step: category
    for index, category in enumerate(files.CATEGORIES)
    for step in range(files.PER_CATEGORY)
}
"""MT-Bench's own numbers and categories."""


def recomputed(path: Path, data: Path | None = None) -> dict[str, Any]:
    """Return the scores of one model from its judge's replies.

    Args:
        path: FastEval's report of a model (the directory with `judge-replies.json`, or one that holds just one such),
            or FastChat's `model_judgment/<judge>_single.jsonl`, in which case the scores stand beneath each model.
        data: Directory of MT-Bench's files; by default what lies beside a report (`data/mt-bench/questions.json`),
            else MT-Bench's own numbering of its categories is taken.

    Raises:
        LlameroError: There are no replies, those of several models, or they cannot be read.
    """
    if path.is_file() and path.suffix == ".jsonl":
        return _of_fastchat(path, _categories(path, data))
    if not path.exists():
        raise LlameroError("no such file or directory", where=path, fix="give the directory of one model's report")
    file = path if path.is_file() else _one(path)
    replies = _json(file)
    if not isinstance(replies, list) or not replies:
        raise LlameroError("no replies in it", where=file, fix="give the file that FastEval wrote")
    return fasteval_scores(replies, {str(number): name for number, name in _categories(file, data).items()})


def _one(directory: Path) -> Path:
    found = sorted(directory.rglob(REPLIES))
    if len(found) == 1:
        return found[0]
    if not found:
        raise LlameroError(f"no {REPLIES} in it", where=directory, fix="give the directory of one model's report")
    names = ", ".join(str(path.parent.relative_to(directory)) for path in found[:4])
    raise LlameroError(
        f"{len(found)} reports in it ({names}{' …' if len(found) > 4 else ''})", where=directory, fix="give one of them"
    )


def _categories(file: Path, data: Path | None) -> dict[int, str]:
    if data is not None:
        return {question.id: question.category for question in files.load(data).questions}
    for above in file.resolve().parents:
        questions = above / "data" / "mt-bench" / "questions.json"
        if questions.is_file():
            try:
                return {int(number): str(each["category"]) for number, each in _json(questions).items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise LlameroError("not FastEval's questions", where=questions, fix="fetch the file again") from error
    return _OWN


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlameroError(f"cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise LlameroError(f"not JSON ({error})", where=path, fix="fetch the file again") from error


def _of_fastchat(path: Path, categories: dict[int, str]) -> dict[str, Any]:
    """Return the scores of every model in a file of FastChat's judgments."""
    rated: dict[str, list[Rated]] = {}
    for row, where in files.rows(path):
        number = files.number(row.get("question_id"), where)
        if number not in categories or not isinstance(row.get("score"), int | float):
            raise LlameroError("an unknown question, or no score", where=where, fix="give the questions with --data")
        rated.setdefault(str(row.get("model")), []).append(Rated(number, row.get("turn", 1), row["score"]))
    found = {model: scores(each, categories) for model, each in rated.items()}
    return {
        model: {
            "overall": each.overall,
            **{f"turn_{turn}": mean for turn, mean in each.turns.items()},
            "mean_of_turns": each.mean_of_turns,
            "categories": dict(each.categories),
            "without_rating": each.nothing,
        }
        for model, each in found.items()
    }
