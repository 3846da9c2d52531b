"""The files of a dataset in the making: they grow chunk by chunk, and go on where a killed run had got to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamero.core import files
from llamero.corpus import megatron
from llamero.corpus.megatron import Position
from llamero.data import stats
from llamero.data.lengthen import Joiner, Piece, Span
from llamero.data.stats import SourceStats
from llamero.data.tokenize import SPLITS, Encoded, Part
from llamero.text.messages import SCAFFOLD, Role

ROLE_DTYPE = np.uint16
"""Role files are what Megatron takes for a vocabulary of 16: u16."""
SPANS = "spans.jsonl"
CHECKPOINT = "tokenized-so-far.json"
LONG = "long documents"
"""Name under which the documents of a lengthened set are counted; they are made of several sources."""
SECONDS = 10.0
"""Between two checkpoints."""


class DatasetWriter:
    """Writes what workers made of a mixture's chunks, in their order.

    Args:
        out: Directory to write to; a checkpoint in it is gone on from.
        prefix: Begins the names of the files.
        dtype: Of the stored tokens.
        empty: Makes the counts of a source before anything is counted, by split and number.
        sources: How many there are.
        jsonl: Also write the rendered samples.
        decode: Makes text of tokens, for the samples of long documents; needed with `jsonl` and `length`.
        length: Make training documents of so many tokens of shorter ones; what each is made of goes to `spans.jsonl`.
    """

    def __init__(
        self,
        out: Path,
        *,
        prefix: str,
        dtype: type[np.integer[Any]],
        empty: Callable[[str, int], SourceStats],
        sources: int,
        jsonl: bool,
        length: int | None = None,
        decode: Callable[[NDArray[np.integer[Any]]], str] | None = None,
    ) -> None:
        self._out = out
        self._saved = time.monotonic()
        before = _recall(out / CHECKPOINT)
        self.chunks: int = before.get("chunks", 0)
        """Chunks that are in the files."""
        self.units: int = before.get("units", 0)
        """Units of them."""
        self.size: int = before.get("size", 0)
        """Bytes that these were read from."""
        self.counts = {split: [empty(split, number) for number in range(sources)] for split in SPLITS}
        for split, parts in before.get("counts", {}).items():
            self.counts[split] = [SourceStats.from_json(part) for part in parts]
        stem = f"{prefix}-" if prefix else ""
        starts = before.get("positions", {})
        self._pairs = {
            (split, kind): megatron.Writer(
                out / f"{stem}{split}-{kind}", dtype if kind == "text" else ROLE_DTYPE, start=Position(*start)
            )
            for split in SPLITS
            for kind in ("text", "role")
            for start in [starts.get(f"{split}-{kind}", (0, 0))]
        }
        sizes = before.get("lines", {})
        names = {split: f"{stem}{split}.jsonl" for split in SPLITS} if jsonl else {}
        names |= {"spans": SPANS} if length else {}
        self._lines = {key: _open_at(out / name, sizes.get(key, 0)) for key, name in names.items()}
        waiting = None if length is None or not before else _waiting(out / _waiting_name(self.chunks))
        self._joiner = None if length is None else Joiner(length, waiting)
        self._length, self._decode = length or 0, decode
        self.overlong: int = before.get("overlong", 0)
        """Long chats of more tokens than were asked for."""
        went_in = before.get("went_in", [])
        self.went_in: list[dict[str, Any]] = went_in or [{} for _ in range(sources)]
        """Of each source the samples, copies and tokens that long documents and chats were made of."""
        if length is not None and not before:
            self.counts["train"].append(SourceStats(LONG))

    def add(self, encoded: Encoded) -> int:
        """Append a chunk and return how many tokens it had."""
        tokens = sum(self._append(split, part) for split, part in encoded.parts.items())
        for split, part in encoded.parts.items():
            whole = self.counts[split][encoded.source]
            counted = self._before_joining(encoded.source, part.stats) if split == "train" else part.stats
            more = stats.total([whole, counted])
            self.counts[split][encoded.source] = replace(
                more, name=whole.name, layout=whole.layout, fraction=whole.fraction
            )
        self.chunks += 1
        self.units += encoded.units
        self.size += encoded.size
        if time.monotonic() - self._saved > SECONDS:
            self.checkpoint()
        return tokens

    def _before_joining(self, source: int, part: SourceStats) -> SourceStats:
        """Return what stays counted for a source: of a lengthened set, what is read and not what is written."""
        if self._joiner is None:
            return part
        went_in = self.went_in[source]
        for key in ("accepted", "repeated", "tokens"):
            went_in[key] = went_in.get(key, 0) + getattr(part, key)
        kept = {key: getattr(part, key) for key in ("rows", "left_out", "samples", "skipped", "skipped_tokens")}
        return SourceStats(part.name, **kept, languages=part.languages, unknown_tokens=part.unknown_tokens)

    def _append(self, split: str, part: Part) -> int:
        if not part.ids:
            return 0
        tokens = sum(ids.size for ids in part.ids)
        if split == "train" and self._joiner is not None:
            part = self._lengthened(part, self._joiner)
        if split in self._lines:
            self._lines[split].write("".join(part.lines).encode())
        if part.ids:
            lengths = [ids.size for ids in part.ids]
            self._pairs[split, "text"].add_many(np.concatenate(part.ids), lengths)
            self._pairs[split, "role"].add_many(np.concatenate(part.roles), lengths)
        return tokens

    def _lengthened(self, part: Part, joiner: Joiner) -> Part:
        """Return the long documents that a chunk completes, and its chats, which are long already."""
        made = Part(part.stats, lines=[] if self._decode else part.lines)
        number = self._pairs["train", "text"].position.documents
        lines = iter(part.lines)
        parts = zip(part.ids, part.roles, part.labels, part.spans, strict=True)
        for ids, roles, label, spans in parts:
            chat = (roles % SCAFFOLD != Role.TEXT).any()
            line = next(lines, "")
            whole = Piece(ids, roles, spans or [Span(0, ids.size, label, 0)])
            self.overlong += bool(chat) and ids.size > self._length
            for piece in [whole] if chat else joiner.add(ids, roles, label):
                self._count(piece)
                if self._decode is not None and "train" in self._lines:
                    text = json.dumps({"text": self._decode(piece.ids)}, ensure_ascii=False) + "\n"
                    made.lines.append(line if chat else text)
                made.ids.append(piece.ids)
                made.roles.append(piece.roles)
                said = {"document": number + len(made.ids) - 1, "spans": piece.spans}
                self._lines["spans"].write(json.dumps(said, ensure_ascii=False).encode() + b"\n")
        return made

    def _count(self, piece: Piece) -> None:
        """Count a document as it is written; its first token follows nothing, so it is not learned."""
        said = piece.roles % SCAFFOLD == Role.ASSISTANT
        turns = int(np.count_nonzero(said[1:] & ~said[:-1])) + int(said[:1].sum())
        learned = int(np.isin(piece.roles[1:], (Role.ASSISTANT, Role.TEXT)).sum())
        self.counts["train"][-1].add(piece.ids.size, learned, turns=turns)

    def checkpoint(self) -> None:
        """Force everything so far to disk, and note how far it is."""
        for file in self._lines.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "chunks": self.chunks,
            "units": self.units,
            "size": self.size,
            "overlong": self.overlong,
            "went_in": self.went_in,
            "positions": {f"{split}-{kind}": pair.checkpoint() for (split, kind), pair in self._pairs.items()},
            "lines": {split: file.tell() for split, file in self._lines.items()},
            "counts": {split: [part.to_json() for part in parts] for split, parts in self.counts.items()},
        }
        if self._joiner is not None:
            _store(self._out / _waiting_name(self.chunks), self._joiner.waiting)
        files.write_json(self._out / CHECKPOINT, state)
        for old in self._out.glob(_waiting_name("*")):
            if old.name != _waiting_name(self.chunks):
                old.unlink()
        self._saved = time.monotonic()

    @property
    def left_over(self) -> int:
        """Return the tokens that fill no long document."""
        return 0 if self._joiner is None else self._joiner.waiting.ids.size

    def forget(self) -> None:
        """Remove what only going on needed."""
        (self._out / CHECKPOINT).unlink()
        for old in self._out.glob(_waiting_name("*")):
            old.unlink()
        for pair in self._pairs.values():
            pair.forget()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.checkpoint()
        for pair in self._pairs.values():
            if kind is None:
                pair.close()
            else:
                pair.abandon()
        for file in self._lines.values():
            file.close()


def _waiting_name(chunks: int | str) -> str:
    return f"waiting-{chunks}.npz"


def _store(path: Path, waiting: Piece) -> None:
    """Write the beginning of a long document."""
    spans = np.frombuffer(json.dumps(waiting.spans).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, ids=waiting.ids, roles=waiting.roles, spans=spans)
        file.flush()
        os.fsync(file.fileno())


def _waiting(path: Path) -> Piece:
    with np.load(path) as found:
        spans = [Span(*span) for span in json.loads(found["spans"].tobytes())]
        return Piece(found["ids"], found["roles"], spans)


def _recall(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _open_at(path: Path, size: int) -> BinaryIO:
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file
