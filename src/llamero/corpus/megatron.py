"""Megatron's indexed datasets: `.bin` holds tokens back to back, `.idx` says where each document lies.

The layout, little-endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of sequences N,
u64 number of document boundaries D, i32[N] lengths, i64[N] byte offsets, i64[D] boundaries (0..N here:
one sequence is one document, so that every Megatron reader agrees on their number).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamero.core.errors import LlameroError

MAGIC = b"MMIDIDX\x00\x00"
CODES: dict[int, type[np.integer[Any]]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SMALL_VOCABULARY = 65500
"""Below it token ids are stored as u16, from it on as i32: Megatron's rule."""


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Return the dtype in which ids of a vocabulary are stored."""
    return np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32


def _beside(stem: Path, suffix: str) -> Path:
    """Return the file of a pair; a dot in the stem (`llama3.1-text`) is part of its name."""
    return stem.with_name(stem.name + suffix)


class Position(NamedTuple):
    """How far a pair is written: what a resumed writer goes on from."""

    documents: int
    tokens: int


START = Position(0, 0)


class Writer:
    """Writes documents; `.idx` is written when the block ends without an error.

    Lengths wait in a file of their own (`.lengths`) until then, so that memory does not grow with the corpus.

    Args:
        stem: Path without suffix: `stem.bin` and `stem.idx`.
        dtype: Dtype of the stored numbers.
        start: Where an earlier writer of the same pair had got to; what it wrote after that is cut off.
    """

    def __init__(self, stem: Path, dtype: type[np.integer[Any]], *, start: Position = START) -> None:
        self._stem = stem
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.position = start
        """How far it is."""
        self._bin = _open_at(_beside(stem, ".bin"), start.tokens * self._dtype.itemsize)
        self._lengths = _open_at(_beside(stem, ".lengths"), start.documents * _LENGTH.itemsize)

    def add(self, values: ArrayLike) -> None:
        """Append one document."""
        array = np.asarray(values)
        self.add_many(array, [array.size])

    def add_many(self, values: NDArray[Any], lengths: ArrayLike) -> None:
        """Append documents that lie back to back in `values`."""
        if values.size and (values.min() < 0 or values.max() > np.iinfo(self._dtype).max):
            raise ValueError(f"{values.min()}..{values.max()} does not fit into {self._dtype}")
        each = np.asarray(lengths, dtype=_LENGTH)
        if each.sum(dtype=np.int64) != values.size:
            raise ValueError(f"{values.size} tokens, the lengths add up to {each.sum(dtype=np.int64)}")
        self._bin.write(values.astype(self._dtype, copy=False).tobytes())
        self._lengths.write(each.tobytes())
        documents, tokens = self.position
        self.position = Position(documents + each.size, tokens + values.size)

    def checkpoint(self) -> Position:
        """Force everything so far to disk and return how far that is."""
        for file in (self._bin, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        return self.position

    def close(self) -> None:
        """Finish both files; the waiting lengths stay, so that a writer can still go on from a checkpoint."""
        self._bin.close()
        self._lengths.close()
        waiting = _beside(self._stem, ".lengths")
        count = self.position.documents
        code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == self._dtype)
        with _beside(self._stem, ".idx").open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, count, count + 1))
            for lengths in _blocks(waiting):
                file.write(lengths.tobytes())
            offset = 0
            for lengths in _blocks(waiting):
                ends = offset + np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
                file.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
            for first in range(0, count + 1, _BLOCK):
                file.write(np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").tobytes())

    def abandon(self) -> None:
        """Close both files as they are."""
        self._bin.close()
        self._lengths.close()

    def forget(self) -> None:
        """Remove the waiting lengths of a finished pair."""
        _beside(self._stem, ".lengths").unlink()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
            self.forget()
        else:
            self.abandon()


_LENGTH = np.dtype("<i4")
_BLOCK = 1 << 20


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for writing behind its first `size` bytes."""
    if size == 0:
        return path.open("wb")
    if not path.exists() or path.stat().st_size < size:
        raise LlameroError(f"{size} bytes of it were written before, they are not there", where=path)
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _blocks(path: Path) -> Iterator[NDArray[np.int32]]:
    """Yield the lengths that wait in a file."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK * _LENGTH.itemsize):
            yield np.frombuffer(block, _LENGTH)


class Reader(Sequence[NDArray[np.integer[Any]]]):
    """The documents of a `.bin`/`.idx` pair, read through memory maps."""

    def __init__(self, stem: Path) -> None:
        idx, data = _beside(stem, ".idx"), _beside(stem, ".bin")
        for path in (idx, data):
            if not path.exists():
                raise LlameroError("file of a tokenized dataset is missing", where=path)
        with idx.open("rb") as file:
            head = file.read(_HEAD)
        if not head.startswith(MAGIC) or len(head) < _HEAD:
            raise LlameroError("not a Megatron index (wrong first bytes)", where=idx)
        version, code, count, boundaries = struct.unpack_from("<QBQQ", head, len(MAGIC))
        if version != 1 or code not in CODES or idx.stat().st_size < _HEAD + 12 * count + 8 * boundaries:
            raise LlameroError(f"broken Megatron index (version {version}, dtype {code}, {count} documents)", where=idx)
        dtype = np.dtype(CODES[code]).newbyteorder("<")
        self.lengths = _mapped(idx, "<i4", count, _HEAD)
        """Tokens of each document."""
        self.offsets = _mapped(idx, "<i8", count, _HEAD + 4 * count)
        """First byte of each document in `.bin`."""
        expected = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
        if data.stat().st_size != expected:
            raise LlameroError(f"the index promises {expected} bytes, the file has {data.stat().st_size}", where=data)
        self.flat = _mapped(data, dtype, expected // dtype.itemsize, 0)
        """All tokens, back to back."""
        self.starts = self.offsets // dtype.itemsize
        """First token of each document in `flat`."""
        ends = self.offsets + self.lengths.astype(np.int64) * dtype.itemsize
        if count and (self.lengths.min() < 0 or self.offsets.min() < 0 or ends.max() > expected):
            raise LlameroError("broken Megatron index: a document lies outside the data", where=idx)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.integer[Any]]:  # type: ignore[override]
        start = self.starts[index]
        return self.flat[start : start + self.lengths[index]]


_HEAD = len(MAGIC) + struct.calcsize("<QBQQ")


def _mapped(path: Path, dtype: Any, count: int, offset: int) -> NDArray[Any]:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
