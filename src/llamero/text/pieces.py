"""From pieces of a rendered conversation to ids, roles and masks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from llamero.text.messages import SCAFFOLD, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.text.tokenizer import Tokenizer


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


def tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Rendered:
    """Return a conversation's tokens.

    Ordinary text is tokenized in one go from special token to special token, as any software does that is given
    the whole text, but for one cut: where an answer begins. A model begins its answer behind a finished prompt,
    so no token may reach across. A token of markup and words is counted as words.
    """
    ids: list[int] = []
    roles: list[int] = []
    learned: list[bool] = []
    within = False  # ordinary text stands directly before
    for (special, _), run in groupby(pieces, key=lambda piece: (piece.special, piece.role == Role.ASSISTANT)):
        together = list(run)
        if special:
            ids += [_special_id(piece.text, tokenizer) for piece in together]
            roles += [piece.role for piece in together]
            learned += [piece.learned for piece in together]
            within = False
            continue
        continues = within or (bool(ids) and tokenizer.dummy_space == "first")
        text = "".join(piece.text for piece in together)
        if not text:
            continue
        encoded = tokenizer.encode_with_spans(text, continues=continues)
        owners = [piece for piece in together for _ in piece.text]  # of every character
        ids += encoded.ids
        for start, stop in encoded.spans:
            owner = owners[start]
            if owner.role >= SCAFFOLD:
                owner = next((other for other in owners[start:stop] if other.role < SCAFFOLD), owner)
            roles.append(owner.role)
            learned.append(owner.learned)
        within = True
    return Rendered("".join(piece.text for piece in pieces), tuple(ids), tuple(roles), tuple(learned))


def _special_id(token: str, tokenizer: Tokenizer) -> int:
    id = tokenizer.id(token)
    if id is None:
        raise ValueError(f"{token!r} is no token of this tokenizer")
    return id
