"""Packing documents into rows of a given capacity: best fit over the whole set, longest first."""

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Return rows of document numbers; no row holds more than `capacity` tokens, no document is cut.

    Every document goes to the fullest row that still has room for it (O(n log capacity), by a tree
    over the free space of rows). Deterministic: of equal documents the first goes first, of rows with
    equal room the one that was filled last takes it.

    Args:
        lengths: Tokens of each document, at most `capacity` each; empty documents are left out.
        capacity: Tokens of a row.
    """
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise ValueError(f"a document of {longest} tokens does not fit into {capacity}")
    rows: list[list[int]] = []
    room = _Room(capacity)
    for document in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[document])
        if length == 0:
            break
        free = room.least_at_least(length)
        row = room.pop(free) if free else len(rows)
        if not free:
            rows.append([])
            free = capacity
        rows[row].append(document)
        if free > length:
            room.push(free - length, row)
    return rows


class _Room:
    """Rows by free space; finds the smallest space that is large enough, by a segment tree over spaces."""

    def __init__(self, capacity: int) -> None:
        self._size = 1 << (capacity + 1).bit_length()
        self._any = bytearray(2 * self._size)
        self._rows: list[list[int]] = [[] for _ in range(capacity + 1)]

    def push(self, space: int, row: int) -> None:
        self._rows[space].append(row)
        node = space + self._size
        while node and not self._any[node]:
            self._any[node] = 1
            node //= 2

    def pop(self, space: int) -> int:
        row = self._rows[space].pop()
        if not self._rows[space]:
            node = space + self._size
            self._any[node] = 0
            while node > 1 and not self._any[node ^ 1]:
                node //= 2
                self._any[node] = 0
        return row

    def least_at_least(self, space: int) -> int:
        """Return the smallest space ≥ `space` that some row has, 0 if none."""
        node = space + self._size
        if self._any[node]:
            return space
        while node > 1:  # climb until a right sibling has something, then go down its left edge
            if node % 2 == 0 and self._any[node + 1]:
                node += 1
                while node < self._size:
                    node = 2 * node if self._any[2 * node] else 2 * node + 1
                return node - self._size
            node //= 2
        return 0
