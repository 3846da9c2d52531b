"""The one seam through which every caller asks for attention: `attend(q, k, v, layout)`.

A layout says which query may look at which key. Packed documents (training), a tree of shared prefixes
(evaluation) and the pages of a key/value cache (generation) are the three there are; each has a dense
mask that serves as its oracle, and a fast path where one exists.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.kernels import attention as kernels
from llamero.model import tree_blocks
from llamero.model.device import brought
from llamero.model.tree_blocks import Block


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents that lie one after the other; each token sees its own document up to itself."""

    lengths: tuple[int, ...]
    """Tokens of each document; their sum is the number of queries and of keys."""
    borders: Int[Tensor, " borders"] | None = None
    """Where each begins, and where the last ends, int32, on the device of the queries: `on` gives them. With them
    attention does not look at `lengths`, so that one compiled program serves all batches."""
    longest: int = 0
    """At least the tokens of the longest document; with `borders`."""

    def on(self, device: torch.device | str) -> "Documents":
        """Return them with what attention needs on a device, once for all layers."""
        borders = torch.tensor(np.cumsum([0, *self.lengths], dtype=np.int32))
        return Documents(self.lengths, brought(borders, device), kernels.rounded_up(max(self.lengths)))

    @cached_property
    def positions(self) -> Int[Tensor, " tokens"]:
        """Position of each token in its document."""
        lengths = np.asarray(self.lengths)
        before = np.cumsum(lengths) - lengths
        return torch.tensor(np.arange(lengths.sum()) - np.repeat(before, lengths))

    @cached_property
    def mask(self) -> Bool[Tensor, "tokens tokens"]:
        """Dense form."""
        return kernels.same_document(self.lengths)


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree (or several) of tokens; each sees itself and its ancestors. The queries are the last of the keys."""

    parents: Int[Tensor, " keys"]
    """Index of each key's parent, -1 for a root; parents stand before their children."""
    queries: int
    """How many of the keys, counted from the end, ask."""

    @cached_property
    def mask(self) -> Bool[Tensor, "queries keys"]:
        """Dense form."""
        return kernels.tree_mask(self.parents, self.queries)

    @cached_property
    def bias(self) -> Float[Tensor, "1 queries keys"]:
        """Dense form, to be added to the scores."""
        return _bias(self.mask)

    @cached_property
    def blocks(self) -> tuple[tuple[Block, Tensor | None], ...] | None:
        """The calls of attention that make it up, with their masks to be added to scores; own blocks come first."""
        prices = tree_blocks.CPU if self.parents.device.type == "cpu" else tree_blocks.CUDA
        found = tree_blocks.blocks(self.parents.tolist(), self.queries, prices)
        return None if found is None else tuple((block, self._bias_of(block)) for block in found)

    def _bias_of(self, block: Block) -> Float[Tensor, "1 queries keys"] | None:
        return None if block.mask is None else _bias(torch.from_numpy(block.mask).to(self.parents.device))


@dataclass(frozen=True, eq=False)
class Pages:
    """Rows of a batch whose keys lie in pages of a shared pool: k and v are (pages, page, kv, d).

    The new tokens of a row are the last of its keys and see all keys up to themselves.
    """

    table: Int[Tensor, "rows pages"]
    """Pages of each row, in order."""
    lengths: tuple[int, ...]
    """Keys of each row, the new ones included."""
    new: tuple[int, ...]
    """Queries of each row; q holds them row after row."""

    def gather(self, pool: Float[Tensor, "pages page kv d"], row: int) -> Float[Tensor, "keys kv d"]:
        """Return the keys (or values) of one row in order."""
        pages = -(-self.lengths[row] // pool.shape[1])
        return pool[self.table[row, :pages]].flatten(0, 1)[: self.lengths[row]]

    def row_mask(self, row: int) -> Bool[Tensor, "queries keys"]:
        """Return which keys of its row each query sees."""
        length, new = self.lengths[row], self.new[row]
        return torch.ones(new, length, dtype=torch.bool).tril(length - new)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First query of each row."""
        return tuple(accumulate(self.new, initial=0))[:-1]

    @cached_property
    def single(self) -> tuple[int, ...]:
        """Rows that ask for one token: they go together."""
        return tuple(row for row, new in enumerate(self.new) if new == 1)

    @cached_property
    def single_queries(self) -> Int[Tensor, " rows"]:
        """Where the queries of those rows are."""
        return torch.tensor([self.starts[row] for row in self.single], device=self.table.device)

    @cached_property
    def single_rows(self) -> Int[Tensor, " rows"]:
        """Those rows, for the table."""
        return torch.tensor(self.single, device=self.table.device)

    @cached_property
    def single_longest(self) -> int:
        """Most keys among those rows."""
        return max(self.lengths[row] for row in self.single)

    @cached_property
    def single_bias(self) -> Float[Tensor, "rows 1 keys"]:
        """-inf behind the end of the shorter ones of those rows."""
        lengths = torch.tensor([self.lengths[row] for row in self.single])
        seen = torch.arange(self.single_longest) < lengths[:, None]
        return _bias(seen)[0][:, None].to(self.table.device)


Layout = Documents | Tree | Pages


def _bias(mask: Bool[Tensor, "queries keys"]) -> Float[Tensor, "1 queries keys"]:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[None]


def attend(
    q: Float[Tensor, "queries heads d"],
    k: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    layout: Layout,
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return the attention output and the float32 log-sum-exp of its scores (float64 for inputs of that).

    Args:
        q: Queries, already rotated.
        k: Keys, already rotated: (keys, kv, d), or the page pool (pages, page, kv, d) for `Pages`.
        v: Values, in the form of `k`.
        layout: Who sees whom.
    """
    if isinstance(layout, Documents):
        if layout.borders is None:
            return kernels.documents(q, k, v, layout.lengths)
        return kernels.packed(q, k, v, layout.borders, layout.longest)
    if isinstance(layout, Tree):
        return _attend_tree(q, k, v, layout)
    return _attend_pages(q, k, v, layout)


def _attend_tree(q: Tensor, k: Tensor, v: Tensor, layout: Tree) -> tuple[Tensor, Tensor]:
    if layout.blocks is None:
        return _one(*kernels.batched(q[None], k[None], v[None], layout.bias))
    first, parts = len(k) - len(q), []
    for block, bias in layout.blocks:
        (start, stop), (begin, end) = block.queries, block.keys
        here = slice(start - first, stop - first)
        parts.append((here, _attend_block(q[here], k[begin:end], v[begin:end], block, bias)))
    if len(parts) == 1:
        return parts[0][1]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=kernels.wide_dtype(q.dtype), device=q.device)
    for (block, _), (here, part) in zip(layout.blocks, parts, strict=True):
        out[here], lse[here] = part if block.own else kernels.merge((out[here], lse[here]), part)
    return out, lse


def _attend_block(q: Tensor, k: Tensor, v: Tensor, block: Block, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if block.lengths:
        return kernels.documents(q, k, v, block.lengths)
    if bias is not None:
        return _one(*kernels.batched(q[None], k[None], v[None], bias))
    return kernels.whole(q, k, v)


def _attend_pages(q: Tensor, k: Tensor, v: Tensor, layout: Pages) -> tuple[Tensor, Tensor]:
    if len(layout.single) == len(layout.new):
        return _attend_single(q, k, v, layout)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=kernels.wide_dtype(q.dtype), device=q.device)
    if layout.single:
        where = layout.single_queries
        out[where], lse[where] = _attend_single(q[where], k, v, layout)
    for row, new in enumerate(layout.new):
        if new > 1:
            here = slice(layout.starts[row], layout.starts[row] + new)
            keys, values = layout.gather(k, row), layout.gather(v, row)
            out[here], lse[here] = _attend_row(q[here], keys, values)
    return out, lse


def _attend_single(
    q: Float[Tensor, "rows heads d"], k: Tensor, v: Tensor, layout: Pages
) -> tuple[Float[Tensor, "rows heads d"], Float[Tensor, "rows heads"]]:
    """Attend for the rows that ask for one token, padded to the longest of them."""
    longest = layout.single_longest
    pages = layout.table[layout.single_rows, : -(-longest // k.shape[1])]
    keys, values = (pool[pages].flatten(1, 2)[:, :longest] for pool in (k, v))  # (rows, keys, kv, d)
    out, lse = kernels.batched(q[:, None], keys, values, layout.single_bias)
    return out[:, 0], lse[:, 0]


def _attend_row(
    q: Float[Tensor, "queries heads d"], k: Float[Tensor, "keys kv d"], v: Float[Tensor, "keys kv d"]
) -> tuple[Tensor, Tensor]:
    """Attend for the last tokens of one row: to what was there before without a mask, to each other causally."""
    new, before = len(q), len(k) - len(q)
    own = kernels.documents(q, k[before:], v[before:], (new,))
    if not before:
        return own
    return kernels.merge(kernels.whole(q, k[:before], v[:before]), own)


def _one(out: Float[Tensor, "1 ..."], lse: Float[Tensor, "1 ..."]) -> tuple[Tensor, Tensor]:
    return out[0], lse[0]


def attend_plain(
    q: Float[Tensor, "queries heads d"], k: Float[Tensor, "..."], v: Float[Tensor, "..."], layout: Layout
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return what `attend` must return, by the dense mask alone."""
    if not isinstance(layout, Pages):
        return kernels.masked(q, k, v, layout.mask.to(q.device))
    rows = [
        kernels.masked(part, layout.gather(k, row), layout.gather(v, row), layout.row_mask(row).to(q.device))
        for row, part in enumerate(q.split(layout.new))
    ]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
