"""SentencePiece BPE models (Llama, Llama 2) as `tokenizers` models that give the same ids.

SentencePiece merges, of all neighbours in a text, the two whose union is the piece with the highest score.
The same order comes out of a list of merges sorted by the score of the piece they make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SPACE = "▁"
"""How SentencePiece writes a space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What a piece is, by SentencePiece's numbers."""

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Scored(NamedTuple):
    """A piece of a vocabulary."""

    text: str
    score: float
    type: int
    """One of the numbers above."""


class Converted(NamedTuple):
    """A backend and the names that the model file gives to its control tokens."""

    backend: tokenizers.Tokenizer
    bos: str | None
    eos: str | None
    unk: str
    pad: str | None


def looks_like_sentencepiece(head: bytes) -> bool:
    """True if a file begins as a SentencePiece model does: with its first piece."""
    return head[:1] == b"\x0a"


def from_sentencepiece(path: Path) -> Converted:
    """Return the tokenizer of a SentencePiece BPE model.

    Raises:
        LlameroError: The file is damaged, is no BPE model, or uses what this conversion does not reproduce.
    """
    _refuse_what_differs(path)
    processor = _load(path)
    pieces = [
        Scored(processor.IdToPiece(i), processor.GetScore(i), _type(processor, i))
        for i in range(processor.GetPieceSize())
    ]

    def name(i: int) -> str | None:
        return pieces[i].text if i >= 0 else None

    unk = processor.unk_id()
    return Converted(
        from_pieces(pieces, unk=unk),
        name(processor.bos_id()),
        name(processor.eos_id()),
        pieces[unk].text,
        name(processor.pad_id()),
    )


def scores_of(path: Path) -> dict[str, float]:
    """Return the score of every piece of a SentencePiece model, by its text."""
    processor = _load(path)
    return {processor.IdToPiece(i): processor.GetScore(i) for i in range(processor.GetPieceSize())}


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise LlameroError(
            f"not a readable SentencePiece model ({error})", where=path, fix="fetch the file again"
        ) from error
    return processor


def from_pieces(pieces: Sequence[Scored], *, unk: int, dummy_space: bool = True) -> tokenizers.Tokenizer:
    """Return the model of a vocabulary, the position of a piece being its id.

    Args:
        pieces: The vocabulary.
        unk: Id of the piece that stands for what no other can write.
        dummy_space: A text, and what follows a special token, begins with a space that nobody wrote.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(scores, {text: ids[text] for text in scores}),
            unk_token=pieces[unk].text,
            fuse_unk=True,
            byte_fallback=any(piece.type == BYTE for piece in pieces),
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if dummy_space else spaces
    read = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if dummy_space else read)
    special = [piece.text for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return backend


def _type(processor: sentencepiece.SentencePieceProcessor, i: int) -> int:
    if processor.IsControl(i):
        return CONTROL
    if processor.IsUnknown(i):
        return UNKNOWN
    if processor.IsByte(i):
        return BYTE
    return UNUSED if processor.IsUnused(i) else NORMAL


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, best piece first.

    Control, unknown and byte pieces never come out of a merge, as SentencePiece never makes them from text.
    """
    found: list[tuple[float, int, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, ids[piece], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _refuse_what_differs(path: Path) -> None:
    """Raise if the model is no BPE model, or changes texts in a way that the conversion does not copy."""
    try:
        parts = dict(_fields(path.read_bytes()))
        trainer = dict(_fields(_part(parts, 2)))
        normalizer = dict(_fields(_part(parts, 3)))
    except (IndexError, ValueError) as error:
        raise LlameroError(
            "neither a SentencePiece model nor a file of tiktoken ranks",
            where=path,
            fix="fetch the file again",
        ) from error
    kind = MODEL_TYPES[_number(trainer, 3, default=1)]
    if kind != "bpe":
        raise LlameroError(
            f"a SentencePiece model of type {kind}; only BPE models are read (Llama and Llama 2 are such)",
            where=path,
            fix="give a directory with a tokenizer.json, which every kind of tokenizer can have",
        )
    changes = {
        "a character map (NFKC or other)": bool(_part(normalizer, 2)),
        "no dummy prefix": not _number(normalizer, 3, default=1),
        "removal of extra spaces": bool(_number(normalizer, 4, default=1)),
        "spaces as suffix": bool(_number(trainer, 24, default=0)),
        "user-defined symbols": any(
            _number(dict(_fields(value)), 3, default=1) == USER_DEFINED
            for field, value in _fields(path.read_bytes())
            if field == 1 and isinstance(value, bytes)
        ),
    }
    unknown = [name for name, present in changes.items() if present]
    if unknown:
        raise LlameroError(
            f"a SentencePiece model with {', '.join(unknown)}, which this conversion does not reproduce",
            where=path,
            fix="give a directory with a tokenizer.json",
        )


Field = int | bytes


def _fields(message: Field) -> Iterator[tuple[int, Field]]:
    """Yield (field number, value) of a protocol buffer: numbers as int, all else as bytes."""
    if isinstance(message, int):
        raise ValueError("a number where a message was expected")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise IndexError("cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at


def _part(message: dict[int, Field], field: int) -> bytes:
    value = message.get(field, b"")
    if isinstance(value, int):
        raise ValueError(f"field {field} is a number")
    return value


def _number(message: dict[int, Field], field: int, *, default: int) -> int:
    value = message.get(field, default)
    if isinstance(value, bytes):
        raise ValueError(f"field {field} is no number")
    return value
