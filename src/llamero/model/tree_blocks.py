"""Attention over a forest of tokens as few calls: each query sees a few stretches of neighbouring keys.

What a forest's tokens share is a stem that most of them see whole. So a query attends to what it sees in blocks: to
its own neighbourhood (causally, or under a small mask), and to each stem before it without any mask; the blocks are
merged by their log-sum-exp. How the forest is cut is decided by counting what the calls would cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from llamero.kernels.attention import chains

Mask = Bool[np.ndarray, "queries keys"]


class Prices(NamedTuple):
    """What things cost beside one query looking at one key."""

    call: float
    """Calling attention once."""
    merge: float
    """Merging one query's share of a block."""
    small: int
    """Nodes of a tree that is not worth looking into."""


CPU = Prices(call=16_000, merge=48, small=48)
CUDA = Prices(call=100_000, merge=100, small=128)


@dataclass(frozen=True)
class Block:
    """Neighbouring queries that attend to neighbouring keys in one call; both in the numbering of the keys."""

    queries: tuple[int, int]
    """First one, and the end."""
    keys: tuple[int, int]
    """First one, and the end."""
    lengths: tuple[int, ...] = ()
    """Of documents, if that is what they are, each causal; the keys are the queries then."""
    mask: Mask | None = None
    """Who sees whom, where not all see all."""

    @property
    def own(self) -> bool:
        """Return whether the queries see themselves in it: each query is in one such block."""
        return bool(self.lengths) or self.mask is not None


Chain = tuple[int, int, int]
"""First node, end, and the parent of the first."""


class _Plan(NamedTuple):
    cost: float
    blocks: list[Block]

    def __add__(self, other: "_Plan") -> "_Plan":  # type: ignore[override]
        return _Plan(self.cost + other.cost, [*self.blocks, *other.blocks])


class _Tree(NamedTuple):
    """Neighbouring chains that no other chain of their region hangs on."""

    chains: list[Chain]
    end: int
    """Behind the last key of the trunk that all its roots see; -1 if its roots do not see the same."""

    @property
    def start(self) -> int:
        return self.chains[0][0]

    @property
    def stop(self) -> int:
        return self.chains[-1][1]


NOTHING = _Plan(0, [])


def blocks(parents: Sequence[int], queries: int, prices: Prices = CPU) -> list[Block] | None:
    """Return the blocks of a forest, `None` where keys that do not ask are no single chain: one mask must do then.

    Args:
        parents: Index of each key's parent, -1 for a root; parents stand before their children.
        queries: How many of the keys, counted from the end, ask.
        prices: Of the device.
    """
    first = len(parents) - queries
    if list(parents[:first]) != list(range(-1, first - 1)):
        return None
    found = []
    for start, stop, parent in chains(parents):
        if start < first < stop:
            found.append((first, stop, first - 1))
        elif start >= first:
            found.append((start, stop, parent))
    plan = _region(found, (0, first), prices)
    return sorted(plan.blocks, key=lambda block: not block.own)


def _region(found: list[Chain], trunk: tuple[int, int], prices: Prices) -> _Plan:
    """Return how to attend for trees that hang on a trunk, a chain of keys: to the trunk and to themselves."""
    if not found:
        return NOTHING
    trees = list(_trees(found, trunk))
    count, keys = found[-1][1] - found[0][0], found[-1][1] - trunk[0]
    at_once = count * keys + prices.call
    if any(tree.end < 0 for tree in trees) or (count <= prices.small and at_once <= 2 * prices.call):
        return _Plan(at_once, [_masked(found, trunk[0])])
    total = NOTHING
    for same in _alike(trees):
        total += _stem(same, trunk[0], prices) + _own(same, prices)
    return total if total.cost < at_once else _Plan(at_once, [_masked(found, trunk[0])])


def _trees(found: list[Chain], trunk: tuple[int, int]) -> Iterator[_Tree]:
    region = found[0][0]
    trees: list[list[Chain]] = []
    for chain in found:
        together = [chain]
        while trees and region <= chain[2] < together[0][0]:  # it hangs on an earlier tree
            together = [*trees.pop(), *together]
        trees.append(together)
    for tree in trees:
        ends = {max(parent + 1, trunk[0]) for _, _, parent in tree if parent < region}
        yield _Tree(tree, ends.pop() if len(ends) == 1 else -1)


def _alike(trees: list[_Tree]) -> Iterator[list[_Tree]]:
    """Yield neighbouring trees that hang on the same key."""
    same: list[_Tree] = []
    for tree in trees:
        if same and same[-1].end != tree.end:
            yield same
            same = []
        same.append(tree)
    yield same


def _stem(same: list[_Tree], start: int, prices: Prices) -> _Plan:
    """Return how to attend to what all of them see of their trunk."""
    queries, keys = (same[0].start, same[-1].stop), (start, same[0].end)
    if keys[0] == keys[1]:
        return NOTHING
    count = queries[1] - queries[0]
    return _Plan(count * (keys[1] - keys[0]) + prices.call + count * prices.merge, [Block(queries, keys)])


def _own(same: list[_Tree], prices: Prices) -> _Plan:
    """Return how neighbouring trees attend to themselves."""
    total, small = NOTHING, []
    for tree in same:
        count = tree.stop - tree.start
        within = sum(other.stop - other.start for other in small)
        if count <= prices.small and 2 * count * within <= prices.call:
            small.append(tree)
            continue
        total += _bundle(small, prices)
        small = [tree] if count <= prices.small else []
        if not small:
            total += _large(tree, prices)
    return _joined(total + _bundle(small, prices))


def _bundle(trees: list[_Tree], prices: Prices) -> _Plan:
    """Return how small trees attend to themselves under one mask."""
    if not trees:
        return NOTHING
    found = [chain for tree in trees for chain in tree.chains]
    start, stop = found[0][0], found[-1][1]
    if len(found) == 1:
        return _Plan((stop - start) ** 2 / 2 + prices.call, [Block((start, stop), (start, stop), (stop - start,))])
    return _Plan((stop - start) ** 2 + prices.call, [_masked(found, start)])


def _large(tree: _Tree, prices: Prices) -> _Plan:
    start, stop, _ = tree.chains[0]
    trunk = Block((start, stop), (start, stop), (stop - start,))
    plan = _Plan((stop - start) ** 2 / 2 + prices.call, [trunk]) + _region(tree.chains[1:], (start, stop), prices)
    at_once = (tree.stop - start) ** 2 + prices.call
    if len(tree.chains) == 1 or plan.cost < at_once:
        return plan
    return _Plan(at_once, [_masked(tree.chains, start)])


def _joined(plan: _Plan) -> _Plan:
    """Return the plan with neighbouring documents in one block."""
    done: list[Block] = []
    for block in plan.blocks:
        last = done[-1] if done else None
        if last and last.lengths and block.lengths and last.queries[1] == block.queries[0]:
            here = (last.queries[0], block.queries[1])
            done[-1] = Block(here, here, (*last.lengths, *block.lengths))
        else:
            done.append(block)
    return _Plan(plan.cost, done)


def _masked(found: list[Chain], start: int) -> Block:
    """Return one block for chains and for the trunk before them, which begins at `start`."""
    first, stop = found[0][0], found[-1][1]
    mask = np.zeros((stop - first, stop - start), dtype=bool)
    for begin, end, parent in found:
        rows = mask[begin - first : end - first]
        if parent >= first:
            rows[:] = mask[parent - first]
        elif parent >= start:
            rows[:, : parent + 1 - start] = True
        rows[:, begin - start : end - start] = np.tri(end - begin, dtype=bool)
    return Block((first, stop), (start, stop), mask=mask)
