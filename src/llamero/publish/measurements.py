"""Results as columns of a table: one column for each number that was measured in one way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from llamero.core import files
from llamero.core.errors import did_you_mean
from llamero.publish.markdown import NOTHING, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llamero.core.results import Result


_EXACT = 1e15
"""Numbers below it have all their digits before and after the point in a double."""


class Metric(NamedTuple):
    """A number of a task that cards print."""

    key: str
    """In `Result.metrics`."""
    title: str
    form: str = ".2f"
    percent: bool = True
    """A share in 0..1, printed in percent."""

    def show(self, metrics: Mapping[str, float], key: str | None = None) -> str:
        """Return a number as it is printed, with its standard error if that was measured."""
        key = key or self.key
        scale = 100 if self.percent else 1
        value = self._rounded(scale * metrics[key])
        error = metrics.get(f"{key}_stderr")
        return value if error is None else f"{value} ± {self._rounded(scale * error)}"

    def _rounded(self, value: float) -> str:
        return f"{_half_up(value, self._decimals):{self.form}}" if self.form.endswith("f") else f"{value:{self.form}}"

    @property
    def _decimals(self) -> int:
        return int(self.form.strip(".fg"))

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return a number as metadata hold it."""
        if self.percent:
            return round(100 * metrics[self.key], 2)
        return float(_half_up(metrics[self.key], max(4, self._decimals)))


def _half_up(value: float, decimals: int) -> Decimal | float:
    """Return a number with so many decimals; a half is rounded up, as people and pandas do: 7.440625 is 7.44063."""
    if not abs(value) < _EXACT:
        return value
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)


class Task(NamedTuple):
    """What cards print of a task."""

    title: str
    dataset: str | None
    """Name of its data for the hub's metadata; by default that of the text that it measured."""
    metrics: tuple[Metric, ...]


PERPLEXITY, AGREEMENT, MT_BENCH = "perplexity", "agreement", "mt_bench"

PRINTED: dict[str, Task] = {
    "h4": Task("H4 average", "open-llm-leaderboard", (Metric("average", "H4 average"),)),
    "arc_challenge": Task("ARC", "ai2_arc", (Metric("acc_norm", "ARC"),)),
    "hellaswag": Task("HellaSwag", "hellaswag", (Metric("acc_norm", "HellaSwag"),)),
    "mmlu": Task("MMLU", "cais/mmlu", (Metric("acc", "MMLU"),)),
    "truthfulqa_mc": Task("TruthfulQA", "truthful_qa", (Metric("mc2", "TruthfulQA"),)),
    "truthfulqa_mc1": Task("TruthfulQA mc1", "truthful_qa", (Metric("mc1", "TruthfulQA mc1"),)),
    "winogrande": Task("WinoGrande", "winogrande", (Metric("acc", "WinoGrande"),)),
    "gsm8k": Task("GSM8K", "gsm8k", (Metric("exact_match", "GSM8K"),)),
    "toy_world": Task("Toy world", "toy_world", (Metric("accuracy", "Toy world"),)),
    MT_BENCH: Task(
        "MT-Bench",
        "mt_bench",
        (
            Metric("score", "MT-Bench", ".5f", percent=False),
            Metric("turn_1", "MT-Bench, turn 1", ".5f", percent=False),
            Metric("turn_2", "MT-Bench, turn 2", ".5f", percent=False),
        ),
    ),
    "mt_bench_pairs": Task(
        "MT-Bench pairs",
        "mt_bench",
        (
            Metric("win_rate_adjusted", "MT-Bench win rate, ties half"),
            Metric("win_rate", "MT-Bench wins"),
            Metric("loss_rate", "MT-Bench losses"),
        ),
    ),
    "lm-eval": Task("lm-eval", None, (Metric("score", "Score", ".4f", percent=False),)),
    PERPLEXITY: Task("Perplexity", None, (Metric("perplexity", "Perplexity", ".3f", percent=False),)),
    "wikitext": Task(
        "WikiText",
        "wikitext",
        (
            Metric("word_perplexity", "Word perplexity", ".3f", percent=False),
            Metric("bits_per_byte", "Bits per byte", ".4f", percent=False),
        ),
    ),
    "humaneval": Task("HumanEval", "openai_humaneval", (Metric("pass@1", "HumanEval pass@1"),)),
    "needle": Task("Needle", "needle in a haystack", (Metric("accuracy", "Needle"),)),
    AGREEMENT: Task("Agreement", None, (Metric("kl", "KL", ".3g", percent=False), Metric("top1", "Top-1 agreement"))),
}
"""The main numbers of every task, in the order of columns. A new task (evaluate/config.py) needs a line here."""

_OF_THE_MODEL = {"model", "tokenizer", "measured"}
"""Inputs that differ from model to model and leave their numbers comparable."""
_IN_THE_TITLE = {"text"}


@dataclass(frozen=True)
class Series:
    """Results of one task, got in one way, of several models."""

    task: str
    title: str
    text: str | None
    """Text that was measured on, where a task has several."""
    number: int | None
    """Tells series of one title apart."""
    protocol: str
    results: Mapping[str, Result]
    """By model."""

    @property
    def notes(self) -> list[str]:
        """Return what the reader must know, said once."""
        return list(dict.fromkeys(note for result in self.results.values() for note in result.notes))

    @property
    def columns(self) -> list[tuple[str, Metric]]:
        """Return the columns that it fills: title and number."""
        return [(_titled(metric.title, self.text, self.number), metric) for metric in PRINTED[self.task].metrics]

    def categories(self, result: Result) -> dict[str, float]:
        """Return the main number of a result by category, where it tells categories apart (`score/math`)."""
        prefix = f"{PRINTED[self.task].metrics[0].key}/"
        scores = {key.removeprefix(prefix): value for key, value in result.metrics.items() if key.startswith(prefix)}
        return {name: value for name, value in scores.items() if not name.endswith("_stderr")}

    def cell(self, model: str, metric: Metric) -> str:
        """Return what was measured of a model, or that nothing was."""
        return metric.show(self.results[model].metrics) if model in self.results else NOTHING


def series(results: Iterable[Result]) -> list[Series]:
    """Return results by what can be compared: task, protocol and inputs, in the order of `PRINTED`."""
    grouped: dict[tuple[str, str, str], dict[str, Result]] = {}
    for result in results:
        if not result.metrics:
            continue  # samples: said, not measured
        if result.task not in PRINTED:
            raise ValueError(f"cards do not know task {result.task}: {did_you_mean(result.task, PRINTED)}")
        same = grouped.setdefault((result.task, result.protocol, files.canonical(_shared(result))), {})
        if result.model in same and same[result.model].metrics != result.metrics:
            raise ValueError(f"two different results of {result.task} of {result.model} by {result.protocol}")
        same[result.model] = result
    order = list(PRINTED)
    groups = sorted(grouped.items(), key=lambda item: order.index(item[0][0]))
    names = [(task, _text(by_model)) for (task, _, _), by_model in groups]
    times, seen = Counter(names), Counter[Any]()
    found: list[Series] = []
    for name, ((task, protocol, _), by_model) in zip(names, groups, strict=True):
        seen[name] += 1
        number = seen[name] if times[name] > 1 else None
        title = _titled(PRINTED[task].title, name[1], number)
        found.append(Series(task, title, name[1], number, _how(protocol, by_model), by_model))
    return found


def _text(by_model: Mapping[str, Result]) -> str | None:
    return next(iter(by_model.values())).inputs.get("text")


def _titled(title: str, text: str | None, number: int | None) -> str:
    title = title if text is None else f"{title} ({text})"
    return title if number is None else f"{title} {number}"


def _shared(result: Result) -> dict[str, Any]:
    return {key: value for key, value in result.inputs.items() if key not in _OF_THE_MODEL}


def _how(protocol: str, by_model: Mapping[str, Result]) -> str:
    """Return how numbers were got: the protocol, and whatever plain inputs it does not say."""
    inputs = _shared(next(iter(by_model.values())))
    plain = [
        f"{key} {value}"
        for key, value in inputs.items()
        if key not in _IN_THE_TITLE and value is not None and not isinstance(value, dict | list)
    ]
    return "; ".join([protocol, *plain])


def score_table(measured: Sequence[Series], labels: Mapping[str, str]) -> str | None:
    """Return a table of models (rows) and tasks (columns); `None` if there is nothing to print.

    Args:
        measured: What to print.
        labels: How each model is called in the table, in order; those without results are left out.
    """
    columns = [(title, metric, part) for part in measured for title, metric in part.columns]
    rows = [
        [label, *(part.cell(model, metric) for _, metric, part in columns)]
        for model, label in labels.items()
        if any(model in part.results for part in measured)
    ]
    return table(["Model", *(title for title, _, _ in columns)], rows) if rows else None


def category_tables(measured: Sequence[Series], labels: Mapping[str, str]) -> dict[str, str]:
    """Return a table of models and categories for each series that tells categories apart (`accuracy/facts`)."""
    found: dict[str, str] = {}
    for part in measured:
        for title, metric in part.columns:
            prefix = f"{metric.key}/"
            keys = sorted({k for r in part.results.values() for k in r.metrics if k.startswith(prefix)})
            keys = [key for key in keys if not key.endswith("_stderr")]
            rows = [
                [label, *(_category(metric, part.results[model], key) for key in keys)]
                for model, label in labels.items()
                if model in part.results
            ]
            if keys:
                found[title] = table(["Model", *(key.removeprefix(prefix) for key in keys)], rows)
    return found


def _category(metric: Metric, result: Result, key: str) -> str:
    return metric.show(result.metrics, key) if key in result.metrics else NOTHING
