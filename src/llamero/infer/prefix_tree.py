"""Requests as one tree of tokens, walked in depth, so that what sequences begin with alike is computed once.

All sequences are sorted; neighbours share what they begin with. The nodes of the tree, numbered as a walk in depth
meets them, are cut into passes of neighbours. Whatever a pass needs from before it lies on one path from a root, that
of its first node, so the keys and values of one path and of one pass are all that is ever kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, " tokens"]

Range = tuple[int, int]
"""First node, and the end."""


LEAST = 8
"""A pass may end after this part of its tokens, where not much is needed afterwards."""

SHALLOW = 16
"""Positions that do not matter in that."""


@dataclass(frozen=True)
class Sequences:
    """One sequence that the model is to see, and what is asked of it."""

    ids: Ids
    """Context and continuation without its last token, which predicts nothing."""
    asked: Ids
    """The continuation: its first token is predicted by the last one of the context."""
    length: int
    """What decides the frequencies of the positions; only sequences of the same share anything."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A forest of tokens; nodes are numbered as a walk in depth meets them."""

    ids: Int[np.ndarray, " nodes"]
    """Token of each node."""
    depths: Int[np.ndarray, " nodes"]
    """Position of each node in its sequence."""
    parents: Int[np.ndarray, " nodes"]
    """-1 for a root."""
    lengths: Int[np.ndarray, " nodes"]
    """What decides the frequencies at each node."""
    asked_nodes: Int[np.ndarray, " asked"]
    """Nodes that predict, ascending."""
    asked_ids: Int[np.ndarray, " asked"]
    """The token whose probability is asked there."""
    asked_places: Int[np.ndarray, " asked"]
    """Number of the sequence that it belongs to."""

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, node: int) -> list[Range]:
        """Return the ancestors of a node as ranges of neighbours, from the root on."""
        heads, found = self._heads, []
        at = int(self.parents[node])
        while at >= 0:
            head = int(heads[np.searchsorted(heads, at, side="right") - 1])
            found.append((head, at + 1))
            at = int(self.parents[head])
        return found[::-1]

    @property
    def _heads(self) -> Int[np.ndarray, " chains"]:
        """Nodes that do not follow the node before them."""
        known = self.__dict__.get("heads")
        if known is None:
            known = np.flatnonzero(self.parents != np.arange(-1, len(self) - 1))
            if len(self) and (not len(known) or known[0]):
                known = np.concatenate(([0], known))
            self.__dict__["heads"] = known
        return known

    def passes(self, tokens: int) -> list[Range]:
        """Return runs of at most so many nodes that make up the tree.

        A pass rather ends where little of its path is needed afterwards, unless hardly anything would be left of it.
        """
        heads, found, start = self._heads, [], 0
        while start < len(self):
            stop = min(start + tokens, len(self))
            if stop < len(self):
                low, high = np.searchsorted(heads, [start + tokens // LEAST + 1, stop + 1])
                if low < high:
                    depths = self.depths[heads[low:high]]
                    shallow = np.flatnonzero(depths <= depths.min() + SHALLOW)
                    stop = int(heads[low + shallow[-1]])
            found.append((start, stop))
            start = stop
        return found


def grow(sequences: Sequence[Sequences]) -> PrefixTree:
    """Return the tree of some sequences; an empty one for none."""
    keys = [sequence.ids.astype(">u4").tobytes() for sequence in sequences]  # in this form bytes sort as tokens do
    order = sorted(range(len(keys)), key=lambda place: (sequences[place].length, keys[place]))
    path = np.zeros(max((len(s.ids) for s in sequences), default=0), dtype=np.int64)
    parts: list[tuple[Ids, Ids, Ids, int]] = []
    asked: list[tuple[Ids, Ids, int]] = []
    total, last = 0, None
    for place in order:
        this = sequences[place]
        shared = _common(last, this)
        count = len(this.ids) - shared
        if count:
            path[shared : len(this.ids)] = np.arange(total, total + count)
            parents = path[shared - 1 : len(this.ids) - 1].copy() if shared else np.r_[-1, path[: count - 1]]
            depths = np.arange(shared, len(this.ids), dtype=np.int32)
            parts.append((this.ids[shared:].astype(np.int32), depths, parents.astype(np.int32), this.length))
            total += count
        first = len(this.ids) - len(this.asked)
        asked.append((path[first : len(this.ids)].copy(), this.asked, place))
        last = this
    return _built(parts, asked)


def _common(a: Sequences | None, b: Sequences) -> int:
    """Return with how many tokens two sequences begin alike."""
    if a is None or a.length != b.length:
        return 0
    shorter = min(len(a.ids), len(b.ids))
    differ = a.ids[:shorter] != b.ids[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def _built(parts: list[tuple[Ids, Ids, Ids, int]], asked: list[tuple[Ids, Ids, int]]) -> PrefixTree:
    ids, depths, parents = (np.concatenate([np.empty(0, np.int32), *(part[i] for part in parts)]) for i in range(3))
    lengths = np.repeat(
        np.array([part[3] for part in parts], dtype=np.int64), np.array([len(part[0]) for part in parts], dtype=int)
    )
    nodes = np.concatenate([np.empty(0, np.int64), *(nodes for nodes, _, _ in asked)])
    targets = np.concatenate([np.empty(0, np.int64), *(targets for _, targets, _ in asked)])
    places = np.repeat(
        np.array([place for _, _, place in asked], dtype=np.int64), np.array([len(n) for n, _, _ in asked], dtype=int)
    )
    order = np.argsort(nodes, kind="stable")
    return PrefixTree(ids, depths, parents, lengths, nodes[order], targets[order], places[order])


def needed(tree: PrefixTree, passes: Sequence[Range], wanted: set[int]) -> list[int]:
    """Return the passes that must run so that the wanted ones can, in order: those that computed their paths too."""
    starts = np.array([start for start, _ in passes])
    missing, seen = sorted(wanted), set(wanted)
    while missing:
        number = missing.pop()
        for start, stop in tree.path(passes[number][0]):
            first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
            new = set(range(int(first), int(last) + 1)) - seen
            seen |= new
            missing += new
    return sorted(seen)


def shares(tree: PrefixTree, passes: Sequence[Range], wanted: Sequence[int], count: int) -> list[list[int]]:
    """Return the wanted passes, in order, in parts of about equal cost that need little of each other.

    Args:
        tree: The tree.
        passes: Its passes.
        wanted: Those to share out, ascending.
        count: How many parts; some are empty if there are fewer passes.
    """
    costs = np.cumsum([passes[number][1] - passes[number][0] for number in wanted], dtype=float)
    borders = [0]
    for part in range(1, count):
        goal = costs[-1] * part / count if len(costs) else 0.0
        near = np.flatnonzero(abs(np.r_[0.0, costs] - goal) <= 0.05 * (costs[-1] if len(costs) else 0) / count)
        near = near[(near >= borders[-1]) & (near < len(wanted))]
        if len(near):
            depth = [tree.depths[passes[wanted[at]][0]] for at in near]
            border = int(near[int(np.argmin(depth))])
        else:
            border = int(np.searchsorted(costs, goal))
        borders.append(max(border, borders[-1]))
    borders.append(len(wanted))
    return [list(wanted[start:stop]) for start, stop in pairwise(borders)]


def local_parents(tree: PrefixTree, here: Range) -> Int[np.ndarray, " keys"]:
    """Return parents among the keys of a pass: those of its path, then its own nodes."""
    start, stop = here
    path = int(tree.depths[start])
    parents = tree.parents[start:stop]
    own = np.where(parents >= start, parents - start + path, tree.depths[start:stop] - 1)
    return np.concatenate((np.arange(-1, path - 1), own))


def slots(tree: PrefixTree, before: Range, node: int) -> Iterator[tuple[int, int, int]]:
    """Yield (depth, node within the pass, how many) of what a pass leaves on the path of a later node."""
    for start, stop in tree.path(node):
        first = max(start, before[0])
        if first < min(stop, before[1]):
            yield int(tree.depths[first]), first - before[0], min(stop, before[1]) - first
