"""What people see of a tokenized dataset: its statistics, and samples drawn from it, token by token."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llamero.core import artifact, progress
from llamero.core.errors import LlameroError
from llamero.corpus.packing import best_fit_decreasing
from llamero.data import stats
from llamero.data.stats import SourceStats
from llamero.text.messages import SCAFFOLD, Role
from llamero.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llamero.corpus.dataset import Dataset
    from llamero.text.tokenizer import Tokenizer

LEARNED = (int(Role.ASSISTANT), int(Role.TEXT))
"""Roles of tokens that training learns from."""
HEAD, TAIL = 320, 160
"""Tokens shown of the beginning and of the end of a sample that is longer than both."""


# -- statistics


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Return the summary of a dataset: as its making wrote it, else counted from its files.

    Its keys are those of an artifact's summary: for each split the `sources` and the `total`.
    """
    if (dataset.directory / artifact.MANIFEST).exists():
        return dict(artifact.read(dataset.directory).summary)
    written = dataset.directory / "stats.json"
    if written.exists():
        return json.loads(written.read_text(encoding="utf-8"))
    counted = {split: _count(dataset, split) for split in dataset.splits}
    summary: dict[str, Any] = {"mixture": dataset.directory.name}
    for split, part in counted.items():
        summary[split] = {"sources": [part.to_json()], "total": stats.total([part]).to_json()}
    return summary


def _count(dataset: Dataset, split: str) -> SourceStats:
    """Return what can be counted of somebody else's dataset; memory does not grow with it."""
    tokens, roles = dataset.tokens(split), dataset.roles(split)
    name = dataset.stem(split, "text").name
    part = SourceStats(name, layout="tokenized", samples=len(tokens), rows=len(tokens))
    lengths = progress.track(tokens.lengths, f"count {name}", unit="documents")
    for number, length in enumerate(map(int, lengths)):
        supervised = length if roles is None else int(np.isin(roles[number], LEARNED).sum())
        part.add(length, supervised)
    return part


def find_tokenizer(dataset: Dataset) -> Tokenizer | None:
    """Return the tokenizer that an artifact was made with, from beside it; None for any other dataset.

    Raises:
        LlameroError: It is no longer there.
    """
    if not (dataset.directory / artifact.MANIFEST).exists():
        return None
    digest = artifact.read(dataset.directory).parents["tokenizer"]
    directory = dataset.directory.resolve().parent / f"tokenizer-{digest[: artifact.DIGITS]}"
    if not directory.is_dir():
        raise LlameroError("the tokenizer of this dataset is gone", where=directory, fix="name one with --tokenizer")
    return load_tokenizer(directory)


class AtLength(NamedTuple):
    """What becomes of documents that are learned at a sequence length, the ends of longer ones cut off."""

    longer: int
    """Documents that are cut."""
    lost: int
    """Tokens that are cut off."""
    rows: int
    """Rows that they are packed into."""
    fill: float
    """Share of the places of these rows that hold a token."""


def at_length(dataset: Dataset, split: str, sequence: int) -> AtLength:
    """Return what becomes of a split at a sequence length; a document of n tokens takes n - 1 places."""
    lengths = np.maximum(dataset.tokens(split).lengths.astype(np.int64) - 1, 0)
    kept = np.minimum(lengths, sequence)
    rows = len(best_fit_decreasing(kept, sequence))
    fill = float(kept.sum() / (rows * sequence)) if rows else 0.0
    return AtLength(int((lengths > sequence).sum()), int((lengths - kept).sum()), rows, fill)


# -- samples


class Piece(NamedTuple):
    """A token, or the several that spell one character."""

    text: str
    learned: bool
    """The loss counts it."""
    scaffold: bool
    """The template wrote it."""
    special: bool
    """It is a special token."""


class Turn(NamedTuple):
    """Pieces in a row of one speaker."""

    speaker: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Sample:
    """A document as it can be shown, the middle of a long one left out."""

    number: int
    """In its split, from 0."""
    tokens: int
    learned: int
    head: tuple[Turn, ...]
    cut: int
    """Tokens that are not shown, between head and tail."""
    tail: tuple[Turn, ...]


def draw(dataset: Dataset, split: str, summary: Mapping[str, Any], *, seed: int, count: int) -> dict[str, list[int]]:
    """Return numbers of randomly drawn documents of each source, or of the whole where sources were mixed.

    Copies of a document that is drawn already are passed over, so there may be fewer than `count`.
    """
    tokens = dataset.tokens(split)
    found: dict[str, list[int]] = {}
    for name, documents in _by_source(summary[split]["sources"], len(tokens)).items():
        pick = random.Random(f"{seed}/{split}/{name}")
        drawn: dict[bytes, int] = {}
        for number in pick.sample(documents, min(len(documents), 4 * count)):
            drawn.setdefault(tokens[number].tobytes(), number)
        found[name] = list(drawn.values())[:count]
    return {name: numbers for name, numbers in found.items() if numbers}


ALL = "all sources"
"""Stands for the source of documents that were made of several."""


def _by_source(sources: Sequence[Mapping[str, Any]], documents: int) -> dict[str, range]:
    """Return the documents of each source: they stand one source after the other."""
    sizes = [source["accepted"] + source["repeated"] for source in sources]
    if sum(sizes) != documents:  # made of several samples each
        return {ALL: range(documents)}
    ends = np.cumsum(sizes).tolist()
    return {source["name"]: range(end - size, end) for source, size, end in zip(sources, sizes, ends, strict=True)}


def samples(
    dataset: Dataset, split: str, drawn: Mapping[str, Sequence[int]], tokenizer: Tokenizer
) -> dict[str, list[Sample]]:
    """Return drawn documents as they can be shown.

    Raises:
        LlameroError: The tokenizer does not have their tokens.
    """
    tokens, roles = dataset.tokens(split), dataset.roles(split)

    def one(number: int) -> Sample:
        ids = tokens[number]
        if ids.size and int(ids.max()) >= len(tokenizer):
            raise LlameroError(
                f"document {number} has token {ids.max()}, the tokenizer has {len(tokenizer)}",
                where=dataset.stem(split, "text"),
                fix="give the tokenizer that it was made with",
            )
        return show(number, ids, np.full(ids.size, Role.TEXT) if roles is None else roles[number], tokenizer)

    return {source: [one(number) for number in numbers] for source, numbers in drawn.items()}


def show(number: int, ids: NDArray[np.integer[Any]], roles: NDArray[np.integer[Any]], tokenizer: Tokenizer) -> Sample:
    """Return a document as it can be shown."""
    document = _Document(ids.tolist(), roles.tolist(), tokenizer)
    if ids.size <= HEAD + TAIL:
        head, tail = document.pieces(range(ids.size)), []
    else:
        head, tail = document.pieces(range(HEAD)), document.pieces(range(ids.size - TAIL, ids.size))
    return Sample(
        number=number,
        tokens=ids.size,
        learned=int(np.isin(roles, LEARNED).sum()),
        head=_turns(head),
        cut=tail[0][0] - HEAD if tail else 0,
        tail=_turns(tail),
    )


def _turns(pieces: Sequence[tuple[int, int, Piece]]) -> tuple[Turn, ...]:
    by_speaker = groupby(pieces, key=lambda each: each[1] % SCAFFOLD)
    return tuple(Turn(_speaker(role), tuple(piece for _, _, piece in run)) for role, run in by_speaker)


def _speaker(role: int) -> str:
    return Role(role).name.lower() if role in set(Role) else f"role {role}"


_CHARACTER = 4
"""Most bytes, and so most tokens, of a character."""
_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not a whole character."""


class _Document:
    """Splits a document into pieces.

    A token is decoded behind those before it, because some decoders drop the space of what comes first.
    """

    def __init__(self, ids: list[int], roles: list[int], tokenizer: Tokenizer) -> None:
        self._ids, self._roles, self._tokenizer = ids, roles, tokenizer
        self._special = {tokenizer.id(token) for token in tokenizer.special_tokens}

    def pieces(self, shown: range) -> list[tuple[int, int, Piece]]:
        """Return the first token, the role and the piece of all that lies in this range."""
        found: list[tuple[int, int, Piece]] = []
        start = at = max(0, shown.start - 2 * _CHARACTER)  # where characters begin is known after a few tokens
        while at < shown.stop:
            before = slice(start, at)
            stop = self._end(before, at, shown.stop)
            if stop > shown.start:
                found.append((at, self._roles[at], self._piece(before, at, stop)))
            start, at = at, stop
        return found

    def _end(self, before: slice, at: int, limit: int) -> int:
        """Return where the character ends that a token begins; one role says all of it."""
        most = min(at + _CHARACTER, limit)
        most = next((other for other in range(at + 1, most) if self._roles[other] != self._roles[at]), most)
        ends = (stop for stop in range(at + 1, most) if not self._decode(before, at, stop).endswith(_UNFINISHED))
        return next(ends, most)

    def _piece(self, before: slice, at: int, stop: int) -> Piece:
        id, role = self._ids[at], self._roles[at]
        text = self._decode(before, at, stop)[len(self._decode(before, at, at)) :]
        text = text or self._tokenizer.backend.id_to_token(id) or f"#{id}"
        return Piece(visible(text), role in LEARNED, role >= SCAFFOLD, id in self._special)

    def _decode(self, before: slice, at: int, stop: int) -> str:
        return self._tokenizer.decode([*self._ids[before], *self._ids[at:stop]], skip_special=False)


def visible(text: str) -> str:
    """Return a text in which line ends are marked, and characters that cannot be seen or that act are spelled out."""
    return "".join(map(_visible, text))


_MARKS = {"\n": "↵\n", "\t": "⇥\t"}
_JOINERS = "\u200c\u200d"
"""Invisible, but part of how words and emoji are written."""


def _visible(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return f"\\u{{{ord(character):x}}}"
    return character
