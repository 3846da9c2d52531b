"""Megatron's indexed datasets: `.bin` holds tokens back to back, `.idx` says where each document lies.

The layout, little-endian: magic `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of sequences N,
u64 number of document boundaries D, i32[N] lengths, i64[N] byte offsets, i64[D] boundaries (0..N here:
one sequence is one document, so that every Megatron reader agrees on their number).
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

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


class Writer:
    """Writes documents one by one; `.idx` is written when the block ends without an error.

    Args:
        stem: Path without suffix: `stem.bin` and `stem.idx`.
        dtype: Dtype of the stored numbers.
    """

    def __init__(self, stem: Path, dtype: type[np.integer[Any]]) -> None:
        self._stem = stem
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._bin = _beside(stem, ".bin").open("wb")
        self._lengths: list[int] = []

    def add(self, values: ArrayLike) -> None:
        """Append one document."""
        array = np.asarray(values)
        if array.size and (array.min() < 0 or array.max() > np.iinfo(self._dtype).max):
            raise ValueError(f"{array.min()}..{array.max()} does not fit into {self._dtype}")
        self._bin.write(array.astype(self._dtype).tobytes())
        self._lengths.append(array.size)

    def close(self) -> None:
        """Finish both files."""
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate(([0], ends[:-1])).astype("<i8") if lengths.size else np.zeros(0, "<i8")
        code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == self._dtype)
        with _beside(self._stem, ".idx").open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, lengths.size, lengths.size + 1))
            file.write(lengths.tobytes() + offsets.tobytes() + np.arange(lengths.size + 1, dtype="<i8").tobytes())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()


class Reader(Sequence[NDArray[np.integer[Any]]]):
    """The documents of a `.bin`/`.idx` pair, read through memory maps."""

    def __init__(self, stem: Path) -> None:
        idx, data = _beside(stem, ".idx"), _beside(stem, ".bin")
        for path in (idx, data):
            if not path.exists():
                raise LlameroError("file of a tokenized dataset is missing", where=path)
        raw = idx.read_bytes()
        if not raw.startswith(MAGIC) or len(raw) < len(MAGIC) + 25:
            raise LlameroError("not a Megatron index (wrong first bytes)", where=idx)
        version, code, count, boundaries = struct.unpack_from("<QBQQ", raw, len(MAGIC))
        start = len(MAGIC) + 25
        if version != 1 or code not in CODES or len(raw) < start + 12 * count + 8 * boundaries:
            raise LlameroError(f"broken Megatron index (version {version}, dtype {code}, {count} documents)", where=idx)
        dtype = np.dtype(CODES[code]).newbyteorder("<")
        self.lengths = np.frombuffer(raw, "<i4", count, start)
        self.offsets = np.frombuffer(raw, "<i8", count, start + 4 * count)
        expected = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
        if data.stat().st_size != expected:
            raise LlameroError(f"the index promises {expected} bytes, the file has {data.stat().st_size}", where=data)
        self._data = np.memmap(data, dtype, "r") if expected else np.zeros(0, dtype)
        self._starts = self.offsets // dtype.itemsize
        ends = self.offsets + self.lengths.astype(np.int64) * dtype.itemsize
        if count and (self.lengths.min() < 0 or self.offsets.min() < 0 or ends.max() > expected):
            raise LlameroError("broken Megatron index: a document lies outside the data", where=idx)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.integer[Any]]:  # type: ignore[override]
        start = self._starts[index]
        return self._data[start : start + self.lengths[index]]
