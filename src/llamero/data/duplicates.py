"""Samples that say nearly the same: MinHash over passages of five words (Broder 1997), candidates by bands (LSH).

Two signatures agree in as many places, on average, as the sets of passages have in common (Jaccard similarity); with
128 places the estimate has a standard deviation of at most 0.045. Texts that are equal word for word have equal
signatures, so they are always found.

Of samples that resemble each other the first stays: a sample is a duplicate if it resembles an earlier one that is not
a duplicate itself. So whatever is left out resembles something that stays, and the order in which bands are looked
through does not matter. Resembling is not handed on from one sample to the next.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from llamero.corpus import overlap
from llamero.corpus.samples import Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from llamero.corpus.samples import Sample

PLACES = 128
"""Numbers of a signature."""
WORDS = 5
"""Words of a passage."""
_AT_ONCE = 1 << 15
"""Passages hashed at once: few enough to stay in the processor's cache."""
_ROWS = 1 << 14
"""Signatures read at once."""
_MISSED = 0.01
"""Share of the pairs that are just as similar as the threshold which no band may bring together."""
_EXAMPLES = 5
"""Examples of each pair of sources."""
_FACTORS, _SUMMANDS = np.random.RandomState(20231121).randint(0, 1 << 32, (2, PLACES), np.uint32)
_FACTORS |= np.uint32(1)


def texts_of(sample: Sample) -> str:
    """Return what is compared of a sample: all that is said in it but the system message, which many samples share."""
    if isinstance(sample, Chat):
        return "\n".join(message.text for message in sample.messages if message.role != "system")
    return sample.text


def signature(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return a signature for each text, in rows.

    The words of a text of fewer than five are one passage. A text without words is told by its characters.
    """
    passages, starts = _passages(texts)
    ends = np.append(starts[1:], len(passages))
    signatures = np.empty((len(texts), PLACES), np.uint32)
    first = 0
    while first < len(texts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _AT_ONCE, "right")))
        block = passages[starts[first] : ends[last - 1]]
        for place in range(PLACES):
            mixed = block * _FACTORS[place] + _SUMMANDS[place]
            signatures[first:last, place] = np.minimum.reduceat(mixed, starts[first:last] - starts[first])
        first = last
    return signatures


def _passages(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return a number for every passage of the texts, at least one a text, and where those of each text start."""
    words = overlap.words(texts)
    counts = words.counts
    sizes = np.maximum(counts - WORDS + 1, 1)
    starts = np.cumsum(sizes) - sizes
    places = np.repeat(words.starts[:-1] - starts, sizes) + np.arange(sizes.sum())
    numbers = np.zeros(len(places), np.uint64)
    for length, found in overlap.passages(words.numbers, range(1, WORDS + 1)):
        there = np.repeat(counts == length if length < WORDS else counts >= WORDS, sizes)
        numbers[there] = found[places[there]]
    for text in np.flatnonzero(counts == 0).tolist():
        digest = blake2b(texts[text].strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
        numbers[starts[text]] = int.from_bytes(digest, "little")
    return (numbers >> np.uint64(32)).astype(np.uint32), starts


def find(signatures: NDArray[np.uint32], *, threshold: float) -> NDArray[np.int64]:
    """Return for each sample the number of the earlier one that it is a duplicate of, or -1 if it stays.

    Takes some 65 bytes a sample besides the signatures, which may be a memory map: they are read from front to back
    for each band (21 for a threshold of 0.8), and in pairs.

    Args:
        signatures: A row for each sample, from `signature`.
        threshold: Share of equal places from which two samples resemble each other.
    """
    same = np.full(len(signatures), -1, np.int64)
    rows = rows_of_a_band(threshold)
    bands = [slice(0, PLACES), *(slice(start, start + rows) for start in range(0, PLACES - rows + 1, rows))]
    while True:
        for band in bands:
            _look_through(signatures, same, band, threshold)
        out = np.flatnonzero(same >= 0)
        lost = out[same[same[out]] >= 0]  # what they resembled was itself left out later
        if not lost.size:
            return same
        same[lost] = -1


def rows_of_a_band(threshold: float) -> int:
    """Return the most places a band may have so that pairs at the threshold meet in one of the bands, 99 of 100."""
    fitting = [rows for rows in range(1, PLACES + 1) if (1 - threshold**rows) ** (PLACES // rows) <= _MISSED]
    return max(fitting, default=1)


def _look_through(signatures: NDArray[np.uint32], same: NDArray[np.int64], band: slice, threshold: float) -> None:
    """Mark in `same` what resembles an earlier sample that has the same numbers in a band."""
    staying = np.flatnonzero(same < 0)
    keys = _keys(signatures, staying, band)
    order = np.argsort(keys, kind="stable")
    numbers, keys = staying[order], keys[order]
    while len(numbers):
        new = np.ones(len(numbers), bool)
        new[1:] = keys[1:] != keys[:-1]
        first = numbers[np.flatnonzero(new)][np.cumsum(new) - 1]
        numbers, first, keys = numbers[~new], first[~new], keys[~new]
        alike = similarity(signatures, numbers, first) >= threshold
        same[numbers[alike]] = first[alike]
        numbers, keys = numbers[~alike], keys[~alike]  # the rest of each group, without its first


def _keys(signatures: NDArray[np.uint32], numbers: NDArray[np.int64], band: slice) -> NDArray[np.uint64]:
    """Return one number for what each of the samples has in a band."""
    keys = np.zeros(len(numbers), np.uint64)
    for block in _blocks(len(numbers)):
        for column in signatures[numbers[block], band].T:
            keys[block] = keys[block] * overlap.FACTOR + column
    return keys


def similarity(
    signatures: NDArray[np.uint32], these: NDArray[np.int64], those: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of equal places for pairs of samples."""
    shares = np.empty(len(these))
    for block in _blocks(len(these)):
        shares[block] = (signatures[these[block]] == signatures[those[block]]).mean(axis=1)
    return shares


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))


@dataclass
class Report:
    """What resembles what."""

    threshold: float
    dropped: bool
    """Whether duplicates are left out, or only reported."""
    samples: int
    """Samples compared."""
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Duplicates by their source and the source of the sample that stays."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first five of every pair of sources: `sample` and `same_as` (where they stand), `similarity`."""

    @property
    def within(self) -> int:
        """Return how many samples resemble one of their own source."""
        return sum(count for (source, other), count in self.pairs.items() if source == other)

    @property
    def across(self) -> int:
        """Return how many samples resemble one of another source."""
        return self.pairs.total() - self.within

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        pairs = [
            {"source": source, "same_as": other, "samples": count} for (source, other), count in self.pairs.items()
        ]
        return {
            "threshold": self.threshold,
            "dropped": self.dropped,
            "samples": self.samples,
            "within_sources": self.within,
            "across_sources": self.across,
            "pairs": pairs,
            "examples": self.examples,
        }


def report(
    signatures: NDArray[np.uint32],
    found: NDArray[np.int64],
    *,
    source: Callable[[int], str],
    where: Callable[[int], str],
    threshold: float,
    dropped: bool,
) -> Report:
    """Return the report of what `find` found.

    Args:
        signatures: What `find` was given.
        found: What it returned.
        source: Says of a sample, by its number, which source it is of.
        where: Says where it stands.
        threshold: What `find` was given.
        dropped: Whether duplicates are left out.
    """
    said = Report(threshold, dropped, len(found))
    for number in np.flatnonzero(found >= 0).tolist():
        first = int(found[number])
        pair = (source(number), source(first))
        if said.pairs[pair] < _EXAMPLES:
            share = similarity(signatures, np.array([number]), np.array([first]))
            example = {"sample": where(number), "same_as": where(first), "similarity": round(float(share[0]), 3)}
            said.examples.append(example)
        said.pairs[pair] += 1
    return said
