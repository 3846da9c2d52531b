"""What became of every sample of a mixture: as text in the published layout, and in full as JSON.

The text is that of Open-Assistant's pretokenizer (model/pretokenizer), as the cards of released models print it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from llamero.core.errors import LlameroError
from llamero.corpus.dataset import SPLITS

RULE = "-----------------"
QUANTILES = (50, 90, 99)
"""Percentiles of the lengths that the JSON names `p50` and so on."""


@dataclass(frozen=True)
class Block:
    """The statistics of one source, as they are published."""

    name: str
    samples: int
    """After selection."""
    fraction: float
    """Share of the source that the recipe takes."""
    accepted: int
    processed: int
    accepted_tokens: int
    skipped: int
    shortest: int
    longest: int
    average: float

    def to_text(self) -> str:
        """Return the block, with a newline behind its last line."""
        accepted, skipped = _share(self.accepted, self.processed), _share(self.skipped, self.processed)
        return (
            f"## Stats for '{self.name}' ({self.samples} samples ({self.fraction:.1%}))\n"
            f"{RULE}\n"
            f"  Accepted: {self.accepted}/{self.processed} ({accepted:.1%})\n"
            f"  Accepted tokens: {self.accepted_tokens}\n"
            f"  Skipped: {self.skipped} ({skipped:.1%})\n"
            f"  Min tokens per sample: {self.shortest}\n"
            f"  Max tokens per sample: {self.longest}\n"
            f"  Avg tokens per sample: {self.average}\n"
            f"{RULE}\n"
        )


@dataclass(frozen=True)
class Stats:
    """A statistics file: one block per source, and the total."""

    title: str
    """Path and beginning of the names of the files it is about."""
    blocks: tuple[Block, ...]


_TITLE = re.compile(r"^# Stats for (.*)$", re.MULTILINE)
_HEAD = re.compile(r"^## Stats for ", re.MULTILINE)
_BLOCK = re.compile(
    rf"""## Stats for '(?P<name>.*)' \((?P<samples>\d+) samples \((?P<fraction>[\d.]+)%\)\)
{RULE}
  Accepted: (?P<accepted>\d+)/(?P<processed>\d+) \([\d.]+%\)
  Accepted tokens: (?P<accepted_tokens>\d+)
  Skipped: (?P<skipped>\d+) \([\d.]+%\)
  Min tokens per sample: (?P<shortest>\d+)
  Max tokens per sample: (?P<longest>\d+)
  Avg tokens per sample: (?P<average>[\d.e+]+)
{RULE}
"""
)


def parse(text: str) -> Stats:
    """Return the statistics that a text in the published layout holds.

    Raises:
        LlameroError: It has no title, no block, or a block that is not in the layout.
    """
    title = _TITLE.search(text)
    starts = [head.start() for head in _HEAD.finditer(text)]
    if title is None or not starts:
        raise LlameroError("no statistics: a title `# Stats for …` and blocks `## Stats for …` are expected")
    return Stats(title[1], tuple(_parse_block(text, start) for start in starts))


def _parse_block(text: str, start: int) -> Block:
    found = _BLOCK.match(text, start)
    if found is None:
        head = text[start:].partition("\n")[0]
        line = text.count("\n", 0, start) + 1
        raise LlameroError(f"the block {head!r} is not in the published layout", where=f"line {line}")
    counts = {key: int(found[key]) for key in found.groupdict() if key not in ("name", "fraction", "average")}
    return Block(name=found["name"], fraction=float(found["fraction"]) / 100, average=float(found["average"]), **counts)


def text(stats: Stats) -> str:
    """Return a statistics file."""
    return f"\n# Stats for {stats.title}\n\n" + "".join(f"{block.to_text()}\n" for block in stats.blocks)


class Bar(NamedTuple):
    """Documents of `start` to `stop` - 1 tokens."""

    start: int
    stop: int
    documents: int


class Lengths:
    """How many documents are how long, in four steps to each doubling; below 8 tokens every length counts alone.

    Args:
        counts: Documents of each step, by the step's number.
    """

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._counts = Counter(counts or {})

    def add(self, tokens: int, count: int = 1) -> None:
        """Count `count` documents of `tokens` tokens."""
        self._counts[_step(tokens)] += count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lengths) and self._counts == other._counts

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(self._counts + other._counts)

    def bars(self) -> list[Bar]:
        """Return every step from the first to the last that has documents, empty ones between them included."""
        if not self._counts:
            return []
        steps = range(min(self._counts), max(self._counts) + 1)
        return [Bar(_start(step), _start(step + 1), self._counts[step]) for step in steps]

    def quantile(self, share: float) -> int:
        """Return an estimate, within a step of the truth, of the length that this share of documents do not exceed."""
        rank = max(1, math.ceil(share * self._counts.total()))
        before = 0
        for bar in self.bars():
            if before + bar.documents >= rank:
                return bar.start + (bar.stop - 1 - bar.start) * (rank - before) // bar.documents
            before += bar.documents
        return 0

    def to_json(self) -> dict[str, int]:
        """Return the documents of each step that has any, by the step's least length."""
        return {str(_start(step)): count for step, count in sorted(self._counts.items())}

    @classmethod
    def from_json(cls, said: Mapping[str, int]) -> Lengths:
        """Return what `to_json` wrote."""
        return cls({_step(int(start)): count for start, count in said.items()})


def _step(tokens: int) -> int:
    """Return the number of the step that a length belongs to."""
    if tokens < 4:
        return tokens
    doublings = tokens.bit_length() - 1
    return 4 * (doublings - 1) + ((tokens >> (doublings - 2)) & 3)


def _start(step: int) -> int:
    """Return the least length of a step."""
    return step if step < 4 else (4 + step % 4) << (step // 4 - 1)


@dataclass
class SourceStats:
    """Counts of one source in one split."""

    name: str
    layout: str = ""
    fraction: float = 1.0
    """Share of the source that the recipe takes."""
    rows: int = 0
    """Rows read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What never became a selected sample, by reason: rules of the layout, faulty rows, duplicates and so on."""
    samples: int = 0
    """Samples selected; each is accepted or skipped."""
    accepted: int = 0
    """Samples taken, each counted once."""
    repeated: int = 0
    """Further copies of them, where a source's weight takes samples more than once."""
    tokens: int = 0
    """Tokens written, those of copies included; so are all counts of tokens and turns, and the lengths."""
    supervised_tokens: int = 0
    unknown_tokens: int = 0
    """Tokens that stand for text which the vocabulary cannot spell."""
    turns: int = 0
    """Messages of the assistant."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Selected samples that were not taken, by reason."""
    skipped_tokens: int = 0
    """Tokens of those that were skipped after they had been tokenized."""
    shortest: int = 0
    longest: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    """Accepted samples by language, where rows name theirs."""
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def processed(self) -> int:
        """Return samples that were looked at."""
        return self.accepted + self.skipped.total()

    @property
    def documents(self) -> int:
        """Return documents written: samples and their copies."""
        return self.accepted + self.repeated

    def add(
        self, tokens: int, supervised: int, *, copies: int = 1, unknown: int = 0, turns: int = 0, language: str = ""
    ) -> None:
        """Count an accepted sample that is written `copies` times."""
        self.shortest = tokens if self.accepted == 0 else min(self.shortest, tokens)
        self.longest = max(self.longest, tokens)
        self.accepted += 1
        self.repeated += copies - 1
        self.tokens += copies * tokens
        self.supervised_tokens += copies * supervised
        self.unknown_tokens += copies * unknown
        self.turns += copies * turns
        self.lengths.add(tokens, copies)
        if language:
            self.languages[language] += 1

    def skip(self, reason: str, tokens: int = 0) -> None:
        """Count a selected sample that is not taken, with its tokens where they are known."""
        self.skipped[reason] += 1
        self.skipped_tokens += tokens

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count what does not become a selected sample."""
        self.left_out[reason] += count

    def block(self) -> Block:
        """Return what the published layout says of it."""
        average = self.tokens / self.documents if self.documents else 0.0
        return Block(
            name=self.name,
            samples=self.samples,
            fraction=self.fraction,
            accepted=self.accepted,
            processed=self.processed,
            accepted_tokens=self.tokens,
            skipped=self.skipped.total(),
            shortest=self.shortest,
            longest=self.longest,
            average=average,
        )

    def quantile(self, share: float) -> int:
        """Return an estimate of the length that this share of documents do not exceed."""
        return min(max(self.lengths.quantile(share), self.shortest), self.longest)

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and what follows from them."""
        return {
            "name": self.name,
            "layout": self.layout,
            "fraction": self.fraction,
            "rows": self.rows,
            "left_out": _by_number(self.left_out),
            "samples": self.samples,
            "processed": self.processed,
            "accepted": self.accepted,
            "repeated": self.repeated,
            "skipped": _by_number(self.skipped),
            "skipped_tokens": self.skipped_tokens,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "unknown_tokens": self.unknown_tokens,
            "turns": self.turns,
            "languages": _by_number(self.languages),
            "min_tokens": self.shortest,
            "max_tokens": self.longest,
            "avg_tokens": self.tokens / self.documents if self.documents else None,
            **{f"p{percent}": self.quantile(percent / 100) if self.documents else None for percent in QUANTILES},
            "lengths": self.lengths.to_json(),
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> SourceStats:
        """Return the counts that `to_json` wrote; what follows from them is made anew."""
        counters = {key: Counter(said[key]) for key in ("left_out", "skipped", "languages")}
        special = {"shortest", "longest", "lengths", *counters}
        plain = {each.name: said[each.name] for each in fields(cls) if each.name not in special}
        lengths = Lengths.from_json(said["lengths"])
        return cls(shortest=said["min_tokens"], longest=said["max_tokens"], lengths=lengths, **counters, **plain)


_NOT_ADDED = ("name", "layout", "fraction", "shortest", "longest")


def total(parts: Sequence[SourceStats]) -> SourceStats:
    """Return the sum of several sources."""
    whole = SourceStats("total")
    for key in (each.name for each in fields(SourceStats) if each.name not in _NOT_ADDED):
        setattr(whole, key, sum((getattr(part, key) for part in parts), start=getattr(whole, key)))
    filled = [part for part in parts if part.accepted]
    whole.shortest = min((part.shortest for part in filled), default=0)
    whole.longest = max((part.longest for part in filled), default=0)
    return whole


def published(title: str, parts: Sequence[SourceStats]) -> Stats:
    """Return what is published of a split: a block for each source, and one for all of them."""
    return Stats(title, tuple(part.block() for part in [*parts, total(parts)]))


def splits(summary: Mapping[str, Any]) -> list[str]:
    """Return the splits that there is something to say of, from the summary of a dataset."""
    found = [split for split in SPLITS if split in summary]
    return [split for split in found if summary[split]["total"]["processed"] or summary[split]["total"]["left_out"]]


def describe(summary: Mapping[str, Any], split: str) -> tuple[list[SourceStats], SourceStats]:
    """Return the sources and the total of a split, from the summary of a dataset.

    Raises:
        LlameroError: The summary does not say all that it should.
    """
    try:
        said = summary[split]
        return [SourceStats.from_json(part) for part in said["sources"]], SourceStats.from_json(said["total"])
    except KeyError as error:
        problem = f"the statistics do not say {error}: they were written by another version"
        raise LlameroError(problem, where=str(summary.get("mixture", "")), fix="make the dataset again") from error


def _by_number(counts: Counter[str]) -> dict[str, int]:
    """Return the counts, the largest first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
