"""Two sample files beside each other: which samples differ, in what, and what that does to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError
from llamero.evaluate import per_sample
from llamero.evaluate.per_sample import ABOUT, FILE, Key, key_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

TOLERANCE = 1e-3
"""Nats that a log-likelihood may move by before it counts: what sums in another order are, and less than an edition."""
FIRST = 3
"""Differing samples of a task that are shown."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One sample that differs."""

    key: Key
    what: str
    """`prompt`, `tokens`, `answer`, `log-likelihood`, `greedy`, `truncated` or `scores`: the first of these."""
    a: str
    b: str


@dataclass(frozen=True)
class Effect:
    """What a metric was in both, over the documents that both have."""

    metric: str
    a: float
    b: float
    documents: int
    changed: int
    """Documents whose own value is another."""


@dataclass(frozen=True)
class TaskDiff:
    """One task in two files."""

    task: str
    both: int
    """Samples that both have."""
    only_a: int
    only_b: int
    prompts: int
    """Of both: the model saw another context, or was asked about other tokens."""
    values: int
    """Of both, with the same prompt: another log-likelihood (beyond the tolerance), another answer or flag."""
    largest: float
    """Largest difference of log-likelihoods among equal prompts."""
    first: tuple[Sample, ...]
    effects: tuple[Effect, ...]

    @property
    def differs(self) -> bool:
        """Return whether the two are not the same."""
        changed = any(effect.changed for effect in self.effects)
        return bool(self.only_a or self.only_b or self.prompts or self.values or changed)


@dataclass(frozen=True)
class Diff:
    """Two files."""

    settings: tuple[tuple[str, str, str], ...]
    """What they were made with and is not the same: name, in A, in B."""
    tasks: tuple[TaskDiff, ...]

    @property
    def differs(self) -> bool:
        """Return whether any sample differs; settings that changed nothing do not count."""
        return any(task.differs for task in self.tasks)


def compare(a: Path, b: Path, *, tolerance: float = TOLERANCE) -> Diff:
    """Return how two runs differ, sample by sample.

    Args:
        a: A file of samples, or the directory of a measurement.
        b: Another.
        tolerance: Nats that a log-likelihood may move by.

    Raises:
        LlameroError: One of them is no file of samples, or holds none.
    """
    one, other = _read(a), _read(b)
    mine, theirs = _by_key(one), _by_key(other)
    tasks = dict.fromkeys(key.task for key in [*mine, *theirs])
    return Diff(tuple(_settings(one, other)), tuple(_task(task, mine, theirs, tolerance) for task in tasks))


def _read(path: Path) -> list[Row]:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise LlameroError(
            "no file of samples", where=file, fix="give what `llamero evaluate … --out DIR` wrote, or its directory"
        )
    records = per_sample.read(file)
    if not rows_of(records):
        raise LlameroError("no samples in it", where=file, fix="run the evaluation to its end")
    return records


def _by_key(records: Sequence[Row]) -> dict[Key, Row]:
    return {key_of(row): row for row in rows_of(records)}


def _settings(one: Sequence[Row], other: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield what was said of how the samples were made, and is not the same; by task where both have it."""
    abouts_a, abouts_b = ({row[ABOUT]: row for row in part if ABOUT in row} for part in (one, other))
    shared = [label for label in abouts_a if label in abouts_b]
    pairs = [(label, label) for label in shared]
    if not shared and len(abouts_a) == len(abouts_b) == 1:  # the same thing by another protocol
        pairs = [(next(iter(abouts_a)), next(iter(abouts_b)))]
    for label_a, label_b in pairs:
        a, b = _flat(abouts_a[label_a]), _flat(abouts_b[label_b])
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key):
                yield key, str(a.get(key)), str(b.get(key))


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= _flat(inner, f"{before}{key}.")
        else:
            found[before + key] = inner
    return found


def _task(task: str, mine: Mapping[Key, Row], theirs: Mapping[Key, Row], tolerance: float) -> TaskDiff:
    a = {key: row for key, row in mine.items() if key.task == task}
    b = {key: row for key, row in theirs.items() if key.task == task}
    both = [key for key in a if key in b]
    differing = [sample for key in both if (sample := _sample(key, a[key], b[key], tolerance)) is not None]
    prompts = {sample.key for sample in differing if sample.what in ("prompt", "tokens", "truncated")}
    moved = [
        _apart(a[k]["log_likelihood"], b[k]["log_likelihood"]) for k in both if k not in prompts and _likely(a, b, k)
    ]
    return TaskDiff(
        task=task,
        both=len(both),
        only_a=len(a) - len(both),
        only_b=len(b) - len(both),
        prompts=len(prompts),
        values=len(differing) - len(prompts),
        largest=max(moved, default=0.0),
        first=tuple(differing[:FIRST]),
        effects=tuple(_effects(both, a, b)),
    )


def _apart(a: float, b: float) -> float:
    """Return how far two log-likelihoods are from each other; two that are infinite alike are not."""
    return 0.0 if a == b else abs(a - b)


def _likely(a: Mapping[Key, Row], b: Mapping[Key, Row], key: Key) -> bool:
    return a[key].get("log_likelihood") is not None and b[key].get("log_likelihood") is not None


def _sample(key: Key, a: Row, b: Row, tolerance: float) -> Sample | None:
    """Return the first thing in which two samples differ, if they do."""
    for what, name in (("prompt", "prompt"), ("tokens", "tokens"), ("truncated", "truncated")):
        written = name == "tokens" and "text" in a and "text" in b  # tokens that the model wrote are its answer
        if not written and a.get(name) != b.get(name):
            return Sample(key, what, str(a.get(name)), str(b.get(name)))
    if a.get("text") != b.get("text"):
        return Sample(key, "answer", repr(a.get("text")), repr(b.get("text")))
    one, other = a.get("log_likelihood"), b.get("log_likelihood")
    near = one is other if one is None or other is None else _apart(one, other) <= tolerance
    if not near:
        return Sample(key, "log-likelihood", str(one), str(other))
    if a.get("greedy") != b.get("greedy"):
        return Sample(key, "greedy", str(a.get("greedy")), str(b.get("greedy")))
    one, other = a.get("scores") or {}, b.get("scores") or {}
    if any(abs(one[name] - other[name]) > TOLERANCE for name in one if name in other):
        return Sample(key, "scores", str(one), str(other))
    return None


def _effects(both: Sequence[Key], a: Mapping[Key, Row], b: Mapping[Key, Row]) -> Iterator[Effect]:
    """Yield the metrics that both have, over the documents that both have."""
    documents = {key.doc: key for key in reversed(both)}  # the scores stand at each choice of a document
    pairs = [(a[key].get("scores") or {}, b[key].get("scores") or {}) for key in documents.values()]
    metrics = dict.fromkeys(name for one, other in pairs for name in one if name in other)
    for metric in metrics:
        values = [(one[metric], other[metric]) for one, other in pairs if metric in one and metric in other]
        n = len(values)
        yield Effect(
            metric,
            sum(x for x, _ in values) / n,
            sum(y for _, y in values) / n,
            n,
            sum(abs(x - y) > TOLERANCE for x, y in values),
        )
