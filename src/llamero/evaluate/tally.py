"""From log-likelihoods to scores, by the rules of whoever is compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks
from llamero.evaluate.questions import MMLU_SUBJECTS, Document, Metric, Rules, Task
from llamero.infer import choices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOUR = {"arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc"}
"""Whose mean is H4."""
PUBLISHED_DOCUMENTS = {"arc_challenge": 1172, "hellaswag": 10042, "truthfulqa_mc": 817}
PUBLISHED_POOLS = {"arc_challenge": 1119, "hellaswag": 39905}
"""Documents that the published scores were made from: asked, and to draw examples from."""


class Number(TypedDict):
    """A mean over documents and its standard error (None for a single document)."""

    value: float
    standard_error: float | None


class Scores(TypedDict):
    """What one task measured; `documents` holds the metrics of each document, in the order of the task."""

    task: str
    metric: Metric
    n: int
    metrics: dict[str, Number]
    documents: list[dict[str, float]]


class BenchmarkSummary(TypedDict):
    """One benchmark; `value` is a fraction, `others` are the task's other metrics (of a benchmark of one task)."""

    metric: Metric
    value: float
    standard_error: float | None
    others: dict[str, Number]
    n: int
    available: int
    shots: int
    pool: str
    edition: str
    subjects: list[str]


class Summary(TypedDict):
    """The scores as their owner gives them.

    `average` is the plain mean of the four times 100, None unless all four are there.
    `departures` names everything that differs from the published setting.
    """

    rules: str
    average: float | None
    benchmarks: dict[str, BenchmarkSummary]
    departures: list[str]


def scores(task: Task, log_likelihoods: Sequence[float]) -> Scores:
    """Return the metrics of a task whose requests have the given log-likelihoods, in their order."""
    if len(log_likelihoods) != len(task.requests):
        raise ValueError(f"{task.name}: {len(log_likelihoods)} log-likelihoods for {len(task.requests)} requests")
    rows: list[dict[str, float]] = []
    start = 0
    for number, document in enumerate(task.documents):
        stop = start + len(document.choices)
        rows.append(measured(task, number, log_likelihoods[start:stop]))
        start = stop
    return tallied(task, rows)


def measured(task: Task, number: int, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one document.

    Args:
        task: That it is of.
        number: Its index there.
        log_likelihoods: Of its choices.

    Raises:
        LlameroError: They are no probabilities; `where` names the document.
    """
    document = task.documents[number]
    try:
        if document.mc2_labels:
            return _truthful(document, log_likelihoods, task.rules)
        found = choices.verdict(choices.Item(document.choices, document.answer), log_likelihoods)
    except LlameroError as error:
        raise LlameroError(error.problem, where=f"{task.name}, document {number}", fix=error.fix) from error
    return {"mc1": found.acc} if task.metric == "mc1" else {"acc": found.acc, "acc_norm": found.acc_norm}


def tallied(task: Task, rows: list[dict[str, float]]) -> Scores:
    """Return the means of the metrics of each document."""
    means = {name: choices.mean([row[name] for row in rows]) for name in rows[0]}
    return {
        "task": task.name,
        "metric": task.metric,
        "n": len(rows),
        "metrics": {name: {"value": mean.value, "standard_error": mean.standard_error} for name, mean in means.items()},
        "documents": rows,
    }


def summary(asked: Sequence[Task], scored: Sequence[Scores]) -> Summary:
    """Return the scores of `asked` by benchmark, with everything that departs from the published setting."""
    parts: dict[str, list[tuple[Task, Scores]]] = {}
    for pair in zip(asked, scored, strict=True):
        parts.setdefault(pair[0].benchmark, []).append(pair)
    found = {name: _benchmark_summary(part) for name, part in parts.items()}
    four = [part["value"] for name, part in found.items() if name in FOUR]
    return {
        "rules": asked[0].rules.title,
        "average": 100 * math.fsum(four) / len(four) if len(four) == len(FOUR) else None,
        "benchmarks": found,
        "departures": [text for name, part in parts.items() for text in _departures(name, [task for task, _ in part])],
    }


def _truthful(document: Document, log_likelihoods: Sequence[float], rules: Rules) -> dict[str, float]:
    """Return mc2, the share of the true answers in the probability of all, and mc1 where its choices are there too."""
    border = len(document.choices) - len(document.mc2_labels)
    first, second = log_likelihoods[:border], log_likelihoods[border:]
    top = second[choices.likeliest(second)]
    if math.isinf(top):
        raise LlameroError(
            f"no answer has a probability: {list(second)}", fix="look for overflow in the model (try float32)"
        )
    weights = [math.exp(value - top) for value in second]  # relative to the likeliest, so that none is 0 / 0
    labels = document.mc2_labels
    if rules.mc2_until_false:
        true = weights[: labels.index(0)]
    else:
        true = [weight for weight, label in zip(weights, labels, strict=True) if label]
    mc1 = {"mc1": float(choices.likeliest(first) == document.answer)} if first else {}
    return {**mc1, "mc2": math.fsum(true) / math.fsum(weights)}


def _benchmark_summary(part: Sequence[tuple[Task, Scores]]) -> BenchmarkSummary:
    """Return the mean over the tasks of one benchmark: one task, or the subjects of MMLU."""
    task, first = part[0]
    value, error = _mean([(scored["metrics"][task.metric], scored["n"]) for _, scored in part], macro=task.rules.macro)
    return {
        "metric": task.metric,
        "value": value,
        "standard_error": error,
        "others": {key: number for key, number in first["metrics"].items() if key != task.metric and len(part) == 1},
        "n": sum(scored["n"] for _, scored in part),
        "available": sum(task.available for task, _ in part),
        "shots": task.shots,
        "pool": task.pool,
        "edition": task.edition,
        "subjects": [task.subject for task, _ in part if task.benchmark == "mmlu"],
    }


def _mean(parts: Sequence[tuple[Number, int]], *, macro: bool) -> tuple[float, float | None]:
    """Return mean and standard error over tasks: each counts once, or as often as it has documents.

    The standard errors of the latter are pooled, as lm-eval does.
    """
    errors = [number["standard_error"] for number, _ in parts]
    known = [error for error in errors if error is not None]
    sizes = [n for _, n in parts]
    if macro:
        value = math.fsum(number["value"] for number, _ in parts) / len(parts)
        return value, math.hypot(*known) / len(parts) if len(known) == len(parts) else None
    value = math.fsum(number["value"] * n for number, n in parts) / sum(sizes)
    if len(known) < len(parts):
        return value, None
    squares = math.fsum((n - 1) * n * error**2 for n, error in zip(sizes, known, strict=True))
    return value, math.sqrt(squares / (sum(sizes) - len(sizes)) / sum(sizes))


def _departures(name: str, measured: Sequence[Task]) -> Iterator[str]:
    """Yield what makes a score differ from the whole benchmark, or from a published one, in words."""
    task = measured[0]
    asked, available = sum(len(task.documents) for task in measured), sum(task.available for task in measured)
    if asked < available:
        yield f"{name}: {asked} of {available} documents asked (limit)"
    if name == "mmlu" and len(measured) != MMLU_SUBJECTS:
        yield f"mmlu: {len(measured)} of {MMLU_SUBJECTS} subjects"
    if name in PUBLISHED_DOCUMENTS and available != PUBLISHED_DOCUMENTS[name]:
        yield f"{name}: {available} of {PUBLISHED_DOCUMENTS[name]} documents on disk"
    if name in PUBLISHED_POOLS and (task.pool, task.pool_documents) != ("train", PUBLISHED_POOLS[name]):
        yield (
            f"{name}: examples drawn from {task.pool_documents} documents ({task.pool}), "
            f"published scores from {PUBLISHED_POOLS[name]} (train)"
        )
    elif "left out" in task.pool and name not in PUBLISHED_POOLS:
        yield f"{name}: examples drawn from {task.pool_documents} documents ({task.pool}), the protocol's from train"
    if name == "truthfulqa_mc" and task.rules.published and task.edition != benchmarks.TRUTHFULQA_FILES["2021"]:
        yield f"truthfulqa_mc: later edition ({task.edition}), published scores are of 2021"
    if (
        name.startswith("truthfulqa")
        and not task.rules.published
        and task.edition == benchmarks.TRUTHFULQA_FILES["2021"]
    ):
        yield f"{name}: edition of 2021 ({task.edition}), hubs serve the later one"
