"""Training samples that hold test questions: passages of n words shared with test sets, and whole short questions.

Passages of 13 words are what GPT-3 was cleaned by (Brown et al. 2020, appendix C), 8 words what later reports use
besides. A sample is found by a test item if it holds, in the order and without regard to case and punctuation,

- 13 words in a row of one of its questions or answers, or
- n words in a row of a question, if what is found makes up two fifths of what is searched for of it, or
- the whole of a question that has 5 to n - 1 words.

Passages that say nothing are not searched for: those that more than four test items share ("which of the following is
true"), and those of fewer than n / 2 different words with a letter in them (numbers, tables). A test item whose
questions are all too short or say nothing is counted as not searched for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks, overlap, rows
from llamero.corpus.samples import Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from llamero.corpus.samples import Sample

SHORTEST = 5
"""Words of the shortest question that is searched for: shorter ones are asked by chance."""
LONG = 13
"""Words in a row that are proof by themselves."""
SHARE = 0.4
"""Share of a question that shorter passages must make up."""
COMMON = 4
"""Test items that may share a passage."""
_EXAMPLES = 20
_SHOWN = 300


@dataclass(frozen=True)
class TestText:
    """What a test item consists of."""

    __test__ = False  # not a test of pytest

    test: str
    """Name of the test set."""
    id: str
    """Which item of it."""
    questions: tuple[str, ...]
    """What is asked."""
    answers: tuple[str, ...] = ()
    """Answers and choices: facts that others may state too, so only a long passage of one counts."""


@dataclass(frozen=True)
class Match:
    """The test item that a sample shares most with."""

    test: str
    id: str
    start: int
    """First character of the shared passage in the sample."""
    stop: int
    passage: str
    """The passage as it stands in the sample, cut after 300 characters."""
    words: int
    """Words in a row that are shared."""
    share: float
    """Share of what is searched for of the question or answer that was found, here and elsewhere in the sample."""


def texts_of(sample: Sample) -> str:
    """Return what is searched of a sample: everything in it, because the model reads all of it, learned or not."""
    if isinstance(sample, Chat):
        return "\n".join(message.text for message in sample.messages)
    return sample.text


# -- test sets ---------------------------------------------------------------------------------------------------------


def _arc(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for row in benchmarks.arc_challenge(directory, "test"):
        yield row.id, (row.question,), row.choices


def _hellaswag(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for row in benchmarks.hellaswag_validation(directory):
        yield str(row.id), (f"{row.ctx_a} {row.ctx_b}",), row.endings


def _mmlu(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for subject in benchmarks.mmlu_subjects(directory):
        for number, row in enumerate(benchmarks.mmlu(directory, subject, "test"), 1):
            yield f"{subject} {number}", (row.question,), row.choices


def _truthfulqa(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield the questions of both editions where both are there; they differ in answers."""
    files = {name: directory / "truthfulqa" / file for name, file in benchmarks.TRUTHFULQA_FILES.items()}
    editions = [name for name, file in files.items() if file.is_file()] or ["2021"]
    answers: dict[str, tuple[str, ...]] = {}
    for edition in editions:
        for row in benchmarks.truthfulqa(directory, edition):  # type: ignore[arg-type]
            answers[row.question] = (*answers.get(row.question, ()), *row.mc2_choices)
    for number, (question, choices) in enumerate(answers.items(), 1):
        yield str(number), (question,), tuple(dict.fromkeys(choices))


def _mt_bench(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for row in benchmarks.mt_bench(directory):
        yield str(row.id), row.turns, ()


def _gsm8k(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for number, row in enumerate(benchmarks.gsm8k(directory), 1):
        yield str(number), (row.question,), (row.answer,)


def _humaneval(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield the problems without their solutions: many people write the same few lines of code."""
    for row in benchmarks.humaneval(directory):
        yield row.id, (row.prompt,), ()


def _winogrande(directory: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for row in benchmarks.winogrande(directory):
        yield row.id, (row.sentence, *(row.sentence.replace("_", option) for option in row.options)), ()


class _Known(NamedTuple):
    title: str
    """As papers write it."""
    size: int
    """Items that the published test set has."""
    items: Callable[[Path], Iterable[tuple[str, tuple[str, ...], tuple[str, ...]]]]


KNOWN: dict[str, _Known] = {
    "arc_challenge": _Known("ARC-Challenge", 1172, _arc),
    "hellaswag": _Known("HellaSwag", 10042, _hellaswag),
    "mmlu": _Known("MMLU", 14042, _mmlu),
    "truthfulqa": _Known("TruthfulQA", 817, _truthfulqa),
    "mt_bench": _Known("MT-Bench", 80, _mt_bench),
    "gsm8k": _Known("GSM8K", 1319, _gsm8k),
    "humaneval": _Known("HumanEval prompts", 164, _humaneval),
    "winogrande": _Known("WinoGrande", 1267, _winogrande),
}
"""Test sets that are read from benchmark folders (corpus/benchmarks.py): only what is scored, no examples for prompts.
To add one: a reader there, a function above, a line here."""


def load_tests(against: Mapping[str, Path]) -> list[TestText]:
    """Return the items of test sets.

    Args:
        against: By name: the folder of a known benchmark or the folder that holds it; under any other name a folder of
            several benchmarks, of which all are taken; or a file of rows, whose texts are all searched for.
    """
    return [item for name, path in against.items() for item in (_folder if path.is_dir() else _file)(name, path)]


def _folder(name: str, path: Path) -> Iterator[TestText]:
    if name in KNOWN:
        found = {name: path if (path / name).is_dir() else path.absolute().parent}
        if path.absolute().name != name and not (path / name).is_dir():
            raise LlameroError(f"neither a folder called {name} nor one that holds it", where=path)
    else:
        found = {known: path for known in KNOWN if (path / known).is_dir()}
    if not found:
        fix = f"name a folder that holds one of {', '.join(KNOWN)}, or a file of texts"
        raise LlameroError("no known benchmark in it", where=path, fix=fix)
    for known, directory in found.items():
        for number, questions, answers in KNOWN[known].items(directory):
            yield TestText(known, number, questions, answers)


def _file(name: str, path: Path) -> Iterator[TestText]:
    for located in rows.rows(path):
        if located.row is None:
            raise LlameroError(located.problem, where=located.where)
        yield TestText(name, located.where, tuple(_strings(located.row)))


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


# -- search ------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A question or answer: what passages of one length are searched for of."""

    item: int
    length: int
    question: bool


class _Passages:
    """The passages of one length, to be looked up many at a time."""

    def __init__(self, numbers: NDArray[np.uint64], parts: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        order = np.argsort(numbers, kind="stable")
        self.numbers, self.parts, self.offsets = numbers[order], parts[order], offsets[order]
        bits = max(10, len(numbers).bit_length() + 5)
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)
        self._maybe[numbers >> self._shift] = True

    def look_up(self, numbers: NDArray[np.uint64]) -> Iterator[tuple[int, int, int]]:
        """Yield place, part and place in the part of every number that is known."""
        places = np.flatnonzero(self._maybe[numbers >> self._shift])
        low = np.searchsorted(self.numbers, numbers[places])
        known = self.numbers[np.minimum(low, len(self.numbers) - 1)] == numbers[places]
        places, low = places[known], low[known]
        high = np.searchsorted(self.numbers, numbers[places], "right")
        for place, first, last in zip(places.tolist(), low.tolist(), high.tolist(), strict=True):
            for part, offset in zip(self.parts[first:last].tolist(), self.offsets[first:last].tolist(), strict=True):
                yield place, part, offset


class Index:
    """The passages of test sets. Pickles, so that worker processes can have it.

    Args:
        tests: What to search for.
        ngram: Words of a passage.
    """

    def __init__(self, tests: Sequence[TestText], *, ngram: int = LONG) -> None:
        if ngram < SHORTEST:
            raise LlameroError(f"passages of {ngram} words are in every text", fix=f"take at least {SHORTEST}")
        self.ngram = ngram
        self.names = [(item.test, item.id) for item in tests]
        self.parts: list[_Part] = []
        texts: list[str] = []
        for number, item in enumerate(tests):
            for place, text in enumerate((*item.questions, *item.answers)):
                question = place < len(item.questions)
                length = _length(len(overlap.split(text)), question, ngram)
                self.parts.append(_Part(number, length, question))
                texts.append(text)
        self._tables = dict(_tables(self.parts, texts))
        self._words = _searched_words(len(texts), self._tables)
        searched = {part for table in self._tables.values() for part in table.parts.tolist()}
        asked = {self.parts[number].item for number in searched if self.parts[number].question}
        self.items = Counter(test for test, _ in self.names)
        """Items by test set."""
        self.not_searched = Counter(test for number, (test, _) in enumerate(self.names) if number not in asked)
        """Items by test set whose questions are too short or say nothing."""

    def find(self, texts: Sequence[str]) -> list[Match | None]:
        """Return for each text the test item that it holds most of, if it holds one."""
        words = overlap.words(texts)
        ends = words.starts[1:]
        hits: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for length, passages in overlap.passages(words.numbers, list(self._tables)):
            for place, part, offset in self._tables[length].look_up(passages):
                text = int(np.searchsorted(ends, place, "right"))
                if place + length <= ends[text]:
                    hits[text][part].append((place - int(words.starts[text]), offset))
        return [self._best(text, hits[number]) if number in hits else None for number, text in enumerate(texts)]

    def _best(self, text: str, found: Mapping[int, Sequence[tuple[int, int]]]) -> Match | None:
        best: tuple[float, int, int, int] | None = None
        for number, places in found.items():
            part = self.parts[number]
            start, words = _longest_run(sorted({place for place, _ in places}), part.length)
            covered = {word for _, offset in places for word in range(offset, offset + part.length)}
            share = len(covered) / int(self._words[number])
            if (words >= LONG or (part.question and share >= SHARE)) and (best is None or (share, words) > best[:2]):
                best = (share, words, start, number)
        if best is None:
            return None
        share, words, start, number = best
        spans = overlap.spans(text)
        first, last = spans[start][0], spans[start + words - 1][1]
        passage = text[first : min(last, first + _SHOWN)]
        return Match(*self.names[self.parts[number].item], first, last, passage, words, round(share, 3))


def _length(words: int, question: bool, ngram: int) -> int:
    """Return how long the passages are that are searched for of a text of so many words; 0 for none."""
    if not question:
        return LONG if words >= LONG else 0
    return min(words, ngram) if words >= SHORTEST else 0


def _longest_run(places: Sequence[int], length: int) -> tuple[int, int]:
    """Return where the longest run of passages at consecutive places starts, and how many words it has."""
    best, start = (places[0], length), places[0]
    for before, place in pairwise(places):
        if place != before + 1:
            start = place
        if place - start + length > best[1]:
            best = (start, place - start + length)
    return best


def _tables(parts: Sequence[_Part], texts: Sequence[str]) -> Iterator[tuple[int, _Passages]]:
    """Yield the passages to search for, by their length."""
    words = overlap.words(texts)
    lengths = sorted({part.length for part in parts if part.length})
    part_of_word = np.repeat(np.arange(len(parts)), words.counts)
    item_of_part = np.array([part.item for part in parts])
    length_of_part = np.array([part.length for part in parts])
    letters = np.array([any(map(str.isalpha, word)) for text in texts for word in overlap.split(text)], bool)
    for length, numbers in overlap.passages(words.numbers, lengths):
        part = part_of_word[: len(numbers)]
        whole = part == part_of_word[length - 1 :]
        places = np.flatnonzero(whole & (length_of_part[part] == length))
        common = _common(numbers[whole], item_of_part[part[whole]])
        places = places[~np.isin(numbers[places], common) & _telling(words.numbers, letters, places, length)]
        if places.size:
            yield length, _Passages(numbers[places], part[places], places - words.starts[part[places]])


def _searched_words(parts: int, tables: Mapping[int, _Passages]) -> NDArray[np.int64]:
    """Return how many words of each part lie in passages that are searched for."""
    found = np.zeros(parts, np.int64)
    for length, table in tables.items():
        order = np.lexsort((table.offsets, table.parts))
        part, offset = table.parts[order], table.offsets[order]
        new = np.full(len(part), length)
        new[1:] = np.where(part[1:] == part[:-1], np.minimum(np.diff(offset), length), length)
        np.add.at(found, part, new)
    return found


def _common(numbers: NDArray[np.uint64], items: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the passages that stand in more test items than `COMMON`."""
    order = np.lexsort((items, numbers))
    numbers, items = numbers[order], items[order]
    new = np.ones(len(numbers), bool)
    new[1:] = (numbers[1:] != numbers[:-1]) | (items[1:] != items[:-1])
    found, counts = np.unique(numbers[new], return_counts=True)
    return found[counts > COMMON]


def _telling(
    numbers: NDArray[np.uint64], letters: NDArray[np.bool_], places: NDArray[np.int64], length: int
) -> NDArray[np.bool_]:
    """Return for the passage at each place whether half as many different words with a letter are in it as words."""
    said = np.where(letters, numbers, np.uint64(0))
    inside = np.sort(said[places[:, None] + np.arange(length)], axis=1)
    different = (inside[:, 1:] != inside[:, :-1]).sum(1) + 1 - (inside[:, 0] == 0)
    return different * 2 >= length


# -- report ------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was searched for and found."""

    ngram: int
    dropped: bool
    """Whether samples that share something are left out, or only reported."""
    items: dict[str, int]
    """Items by test set."""
    not_searched: dict[str, int]
    """Items by test set whose questions are too short or say nothing."""
    samples: int = 0
    """Samples searched."""
    found: Counter[str] = field(default_factory=Counter)
    """Samples by the test set that they share most with."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By test set, the first samples found: `sample` (where), `item`, `passage`, `words`, `share`."""

    @classmethod
    def of(cls, index: Index, *, dropped: bool) -> Report:
        """Return a report of an index in which nothing is counted yet."""
        return cls(index.ngram, dropped, dict(index.items), dict(index.not_searched))

    def add(self, where: Sequence[str], matches: Sequence[Match | None]) -> None:
        """Count samples, given where each stands and what `Index.find` said of it."""
        self.samples += len(matches)
        for place, match in zip(where, matches, strict=True):
            if match is None:
                continue
            self.found[match.test] += 1
            shown = self.examples.setdefault(match.test, [])
            if len(shown) < _EXAMPLES:
                said = {"item": match.id, "passage": match.passage, "words": match.words, "share": match.share}
                shown.append({"sample": place, **said})

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        tests = {
            test: {
                "items": count,
                "published_items": KNOWN[test].size if test in KNOWN else None,
                "not_searched": self.not_searched.get(test, 0),
                "samples": self.found[test],
                "examples": self.examples.get(test, []),
            }
            for test, count in self.items.items()
        }
        return {"ngram": self.ngram, "dropped": self.dropped, "samples": self.samples, "tests": tests}


def statement(report: Report) -> str:
    """Return what a model card says of a report: what was searched for, what was found, and what was not checked."""
    count, found = f"{report.samples:,}", report.found.total()
    sets = _listed([_titled(test, items) for test, items in report.items.items()])
    shared = f"a {LONG}-word passage"
    if report.ngram < LONG:
        shared += f", {report.ngram} words in a row that are two fifths of a question,"
    shared += f" or a whole shorter question with the tests {sets}"
    if not found:
        said = f"None of {count} training samples shares {shared}."
    elif report.dropped:
        said = f"No training sample shares {shared}; {found:,} of {count} samples read did, and {_was(found)} removed."
    else:
        share, it = ("shares", "It") if found == 1 else ("share", "They")
        said = f"{found:,} of {count} training samples {share} {shared}. {it} {_was(found)} kept."
    said += f" Passages that more than {COMMON} test questions share or that are mostly numbers do not count"
    if skipped := sum(report.not_searched.values()):
        questions = f"{skipped:,} test question{'' if skipped == 1 else 's'}"
        said += f"; {questions} with no others, or of fewer than {SHORTEST} words, {_was(skipped)} not searched for"
    return f"{said}."


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _titled(test: str, items: int) -> str:
    if test not in KNOWN:
        return f"{test} ({items:,})"
    known = KNOWN[test]
    return f"{known.title} ({items:,})" if items >= known.size else f"{known.title} ({items:,} of {known.size:,})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
