"""From pieces of a rendered conversation to ids, roles and masks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llamero.text.messages import SCAFFOLD, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llamero.text.tokenizer import Tokenizer
    from llamero.text.words import Words

_ASSISTANT = int(Role.ASSISTANT)


class Piece(NamedTuple):
    """A stretch of a rendered conversation.

    Args:
        text: As it stands in the whole text.
        role: Of every token in it (`Role`, with `SCAFFOLD` for what the template wrote).
        learned: Whether the loss counts it.
        special: The text is one special token; else all of it is ordinary text, whatever it spells.
    """

    text: str
    role: int
    learned: bool
    special: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model sees it; the three tuples are as long as each other.

    Args:
        text: The whole, special tokens spelled out.
        ids: Its tokens.
        roles: Who said each token: a `Role`, plus `SCAFFOLD` where the template did.
        learned: Whether the loss counts it.
    """

    text: str
    ids: tuple[int, ...]
    roles: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class RenderedArrays:
    """The same in arrays, as long as each other and only to be read.

    Args:
        ids: Its tokens.
        roles: Who said each token, as in `Rendered`.
        learned: Whether the loss counts it.
        pieces: What it is made of, where it is a conversation.
    """

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    learned: NDArray[np.bool_]
    pieces: Sequence[Piece] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """The whole, special tokens spelled out."""
        return "".join(piece.text for piece in self.pieces)


def tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Rendered:
    """Return a conversation's tokens.

    Ordinary text is tokenized in one go from special token to special token, as any software does that is given
    the whole text, but for one cut: where an answer begins. A model begins its answer behind a finished prompt,
    so no token may reach across. A token of markup and words is counted as words.
    """
    found = tokenize_batch([pieces], tokenizer)[0]
    return Rendered(found.text, tuple(found.ids.tolist()), tuple(found.roles.tolist()), tuple(found.learned.tolist()))


def tokenize_batch(conversations: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[RenderedArrays]:
    """Return the tokens of each conversation, as `tokenize` does."""
    tokens = _Tokens(tokenizer)
    stretches = [0]
    for pieces in conversations:
        tokens.add(pieces)
        stretches.append(len(tokens.packed))
    sizes = np.fromiter((len(packed) // 4 for packed in tokens.packed), dtype=np.int64, count=len(tokens.packed))
    ids = np.frombuffer(b"".join(tokens.packed), dtype=np.int32)
    roles = np.repeat(np.array(tokens.roles, dtype=np.uint8), sizes)
    learned = np.repeat(np.array(tokens.learned, dtype=np.bool_), sizes)
    edges = np.concatenate([[0], sizes.cumsum()])[stretches].tolist()
    return [
        RenderedArrays(ids[start:stop], roles[start:stop], learned[start:stop], pieces)
        for pieces, (start, stop) in zip(conversations, pairwise(edges), strict=True)
    ]


class _Tokens:
    """Tokens in the order they are found, in stretches of one role."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.packed: list[bytes] = []  # int32
        self.roles: list[int] = []
        self.learned: list[bool] = []
        self._tokenizer, self._words = tokenizer, tokenizer.words
        self._special: dict[str, bytes] = {}

    def add(self, pieces: Sequence[Piece]) -> None:
        """Add the tokens of a conversation."""
        start = len(self.packed)
        run: list[Piece] = []  # ordinary text to tokenize in one go
        within = False  # ordinary text stands directly before the run
        for piece in pieces:
            if run and (piece.special or (piece.role == _ASSISTANT) != (run[0].role == _ASSISTANT)):
                within = self._add_text(run, within, start) or within
                run = []
            if piece.special:
                self._add(self._special.get(piece.text) or self._special_id(piece.text), piece)
                within = False
            else:
                run.append(piece)
        self._add_text(run, within, start)

    def _add(self, packed: bytes, piece: Piece) -> None:
        self.packed.append(packed)
        self.roles.append(piece.role)
        self.learned.append(piece.learned)

    def _add_text(self, run: Sequence[Piece], within: bool, start: int) -> bool:
        """Add ordinary text, where the conversation began with stretch `start`; return whether there was any."""
        run = [piece for piece in run if piece.text]
        if self._words is None:
            continues = within or (self._tokenizer.dummy_space == "first" and any(self.packed[start:]))
            if run:
                self._add_spans(run, "".join(piece.text for piece in run), 0, continues=continues)
        elif len(run) == 1:
            self._add(self._words.encode(run[0].text, continues=within), run[0])
        elif run:
            self._add_words(run, self._words, within=within)
        return bool(run)

    def _add_words(self, run: Sequence[Piece], words: Words, *, within: bool) -> None:
        """Add pieces each by itself, but for the words that reach from one into the next."""
        text = "".join(piece.text for piece in run)
        at = end = 0
        for piece in run:
            end += len(piece.text)
            if end <= at:
                continue
            first, last = words.around(text, end, since=at) if end < len(text) else (end, end)
            if first > at:
                self._add(words.encode(text[at:first], continues=within or at > 0), piece)
            if last > first:
                self._add_spans(run, text[first:last], first, continues=within or first > 0)
            at = last

    def _add_spans(self, run: Sequence[Piece], text: str, first: int, *, continues: bool) -> None:
        """Add text that several pieces share, which begins at their character `first`."""
        encoded = self._tokenizer.encode_with_spans(text, continues=continues)
        owners = _owners(run, first, first + len(text))
        for id, (start, stop) in zip(encoded.ids, encoded.spans, strict=True):
            owner = owners[start]
            if owner.role >= SCAFFOLD:
                owner = next((other for other in owners[start:stop] if other.role < SCAFFOLD), owner)
            self._add(_packed(id), owner)

    def _special_id(self, token: str) -> bytes:
        id = self._tokenizer.id(token)
        if id is None:
            raise ValueError(f"{token!r} is no token of this tokenizer")
        self._special[token] = _packed(id)
        return self._special[token]


def _owners(run: Sequence[Piece], first: int, last: int) -> list[Piece]:
    """Return the piece of each character from `first` to before `last`."""
    owners: list[Piece] = []
    at = 0
    for piece in run:
        end = at + len(piece.text)
        owners += [piece] * (min(end, last) - max(at, first))
        at = end
    return owners


def _packed(id: int) -> bytes:
    return id.to_bytes(4, sys.byteorder)
