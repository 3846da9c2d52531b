"""Packing documents into rows of a given capacity: best fit over the whole set, longest first.

Johnson 1974, "Fast algorithms for bin packing"; done for all documents of one length at once, because lengths are few.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Rows(Sequence[NDArray[np.int64]]):
    """Rows of document numbers, in two flat arrays.

    Args:
        documents: Of all rows, one row after the other.
        offsets: Where each row begins in `documents`, and where the last ends.
    """

    def __init__(self, documents: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self.documents, self.offsets = documents, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.documents[self.offsets[row] : self.offsets[row + 1]]


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> Rows:
    """Return rows of document numbers; no row holds more than `capacity` tokens, no document is cut.

    Every document goes to the fullest row that still has room for it. Deterministic: of equal documents
    the first goes first, of rows with equal room the one that was filled last takes it.

    Args:
        lengths: Tokens of each document, at most `capacity` each; empty documents are left out.
        capacity: Tokens of a row.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    if sizes.size and sizes[-1] > capacity:
        raise ValueError(f"a document of {sizes[-1]} tokens does not fit into {capacity}")
    open_rows = _OpenRows(capacity)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        if size:
            open_rows.take(size, count)
    # longest first, which is the order in which the rows took them
    documents = np.argsort(-lengths.astype(np.int64), kind="stable")[: np.count_nonzero(lengths)]
    row = np.repeat(np.asarray(open_rows.took, dtype=np.int64), open_rows.how_many)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=open_rows.count))))
    return Rows(documents[np.argsort(row, kind="stable")], offsets)


class _OpenRows:
    """Rows by free space, and what they took."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        """Rows so far."""
        self.took: list[int] = []
        """Row that took the next documents, ..."""
        self.how_many: list[int] = []
        """... and how many it took."""
        self._capacity = capacity
        self._spaces: list[int] = []  # those that some row has, ascending
        self._rows: dict[int, list[int]] = {}  # of each such space, the row that was filled last at the end

    def take(self, size: int, count: int) -> None:
        """Give documents of one size to the fullest rows that have room for them, then to new rows.

        A row that takes one is then fuller than all others that have room, so it takes the next ones too.
        """
        first = last = bisect_left(self._spaces, size)
        left: list[tuple[int, list[int]]] = []
        while count and last < len(self._spaces):
            space = self._spaces[last]
            rows = self._rows[space]
            takers = rows[: -_ceil(count, space // size) - 1 : -1]
            del rows[-len(takers) :]
            count -= self._fill(takers, space, size, count, left)
            last += not rows
        for space in self._spaces[first:last]:
            del self._rows[space]
        del self._spaces[first:last]
        if count:
            takers = list(range(self.count, self.count + _ceil(count, self._capacity // size)))
            self.count += len(takers)
            self._fill(takers, self._capacity, size, count, left)
        for space, rows in left:
            self._put(space, rows)

    def _fill(self, takers: list[int], space: int, size: int, count: int, left: list[tuple[int, list[int]]]) -> int:
        """Return how many of `count` documents the rows take; what space they have left is appended to `left`."""
        each = space // size
        full = min(len(takers), count // each)
        self.took += takers
        self.how_many += [each] * full
        left.append((space - each * size, takers[:full]))
        if full == len(takers):
            return full * each
        rest = count - full * each  # fewer than the last row has room for
        self.how_many.append(rest)
        left.append((space - rest * size, takers[full:]))
        return count

    def _put(self, space: int, rows: list[int]) -> None:
        if not space or not rows:
            return
        if space in self._rows:
            self._rows[space] += rows
        else:
            self._rows[space] = rows
            insort(self._spaces, space)


def _ceil(count: int, each: int) -> int:
    return -(-count // each)
