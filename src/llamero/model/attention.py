"""The one seam through which every caller asks for attention: `attend(q, k, v, layout)`.

A layout says which query may look at which key. Packed documents (training), a tree of shared prefixes
(evaluation) and the pages of a key/value cache (generation) are the three there are; each has a dense
mask that serves as its oracle, and a fast path where one exists.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.kernels import attention as kernels


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents that lie one after the other; each token sees its own document up to itself."""

    lengths: tuple[int, ...]
    """Tokens of each document; their sum is the number of queries and of keys."""

    @cached_property
    def mask(self) -> Bool[Tensor, "tokens tokens"]:
        """Dense form."""
        return kernels.same_document(self.lengths)


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree of tokens; each sees itself and its ancestors. The queries are the last of the keys."""

    parents: Int[Tensor, " keys"]
    """Index of each key's parent, -1 for a root; parents stand before their children."""
    queries: int
    """How many of the keys, counted from the end, ask."""

    @cached_property
    def mask(self) -> Bool[Tensor, "queries keys"]:
        """Dense form."""
        return kernels.tree_mask(self.parents, self.queries)


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
        return pool[self.table[row]].flatten(0, 1)[: self.lengths[row]]

    def row_mask(self, row: int) -> Bool[Tensor, "queries keys"]:
        """Return which keys of its row each query sees."""
        length, new = self.lengths[row], self.new[row]
        return torch.ones(new, length, dtype=torch.bool).tril(length - new)


Layout = Documents | Tree | Pages


def attend(
    q: Float[Tensor, "queries heads d"],
    k: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    layout: Layout,
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return the attention output and the float32 log-sum-exp of its scores.

    Args:
        q: Queries, already rotated.
        k: Keys, already rotated: (keys, kv, d), or the page pool (pages, page, kv, d) for `Pages`.
        v: Values, in the form of `k`.
        layout: Who sees whom.
    """
    match layout:
        case Documents():
            return kernels.documents(q, k, v, layout.lengths)
        case Tree():
            return kernels.masked(q, k, v, layout.mask.to(q.device))
        case Pages():
            return _attend_pages(q, k, v, layout)


def _attend_pages(q: Tensor, k: Tensor, v: Tensor, layout: Pages) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for row, part in enumerate(q.split(layout.new)):
        keys, values = layout.gather(k, row), layout.gather(v, row)
        if layout.new[row] == layout.lengths[row]:
            out, lse = kernels.documents(part, keys, values, (layout.lengths[row],))
        else:
            out, lse = kernels.masked(part, keys, values, layout.row_mask(row).to(q.device))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


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
