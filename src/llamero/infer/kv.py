"""A cache of keys and values in pages, so that rows of any length come and go without holes.

Kwon et al. 2023, arXiv:2309.06180. One pool per layer; a row owns a list of pages that is the same in all of them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.model.attention import Pages
from llamero.model.config import LlamaConfig

PAGE = 16
"""Tokens of a page."""


class PagedCache:
    """Keys and values of many rows; `reserve` room for new tokens, then run the model with it.

    Args:
        config: Shape of the model.
        dtype: Dtype of keys and values.
        device: Where they live.
        pages: Pages to begin with.
        limit: Most pages there may ever be; `None` lets the pool grow while there is memory.
        page: Tokens of a page.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        pages: int = 64,
        limit: int | None = None,
        page: int = PAGE,
    ) -> None:
        self.page = page
        self.limit = limit
        pages = pages if limit is None else min(pages, limit)
        shape = (pages, page, config.num_kv_heads, config.head_dim)
        self._pools = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]
        self._free = list(range(pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_row = 0
        self._slots: Int[Tensor, " tokens"] = torch.empty(0, dtype=torch.long, device=device)

    @property
    def pages(self) -> int:
        """Pages there are, used and free."""
        return len(self._pools[0][0])

    @property
    def free_pages(self) -> int:
        """Pages that no row owns."""
        return len(self._free)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows there are."""
        return tuple(self._lengths)

    def length(self, row: int) -> int:
        """Return how many tokens of a row are cached."""
        return self._lengths[row]

    def add(self) -> int:
        """Begin an empty row and return its number."""
        row = self._next_row
        self._next_row += 1
        self._pages[row], self._lengths[row] = [], 0
        return row

    def copy(self, row: int) -> int:
        """Begin a row with all that another one has cached, and return its number."""
        self._grow(len(self._pages[row]))
        other = self.add()
        self._pages[other] = [self._free.pop() for _ in self._pages[row]]
        self._lengths[other] = self._lengths[row]
        for pools in self._pools:
            for pool in pools:
                pool[self._pages[other]] = pool[self._pages[row]]
        return other

    def remove(self, row: int) -> None:
        """Forget a row; its pages are free again."""
        self._free.extend(reversed(self._pages.pop(row)))
        del self._lengths[row]

    def reserve(self, rows: Sequence[int], new: Sequence[int]) -> Pages:
        """Make room for new tokens and return the layout of the forward pass that brings them.

        Nothing changes if there is no room.

        Args:
            rows: Rows that take part, each once.
            new: How many tokens each of them gets, at least one.
        """
        if len(set(rows)) != len(rows) or min(new, default=1) < 1:
            raise ValueError(f"rows {rows} must differ and get at least one token each, not {new}")
        missing = [
            -(-(self._lengths[row] + count) // self.page) - len(self._pages[row])
            for row, count in zip(rows, new, strict=True)
        ]
        self._grow(sum(missing))
        for row, count in zip(rows, missing, strict=True):
            self._pages[row].extend(self._free.pop() for _ in range(count))
        self._slots = self._slots_of(rows, new)
        for row, count in zip(rows, new, strict=True):
            self._lengths[row] += count
        return Pages(self._table(rows), tuple(self._lengths[row] for row in rows), tuple(new))

    def extend(
        self, layer: int, k: Float[Tensor, "tokens kv d"], v: Float[Tensor, "tokens kv d"]
    ) -> tuple[Float[Tensor, "pages page kv d"], Float[Tensor, "pages page kv d"]]:
        """Write the keys and values of the reserved tokens and return the layer's pools."""
        keys, values = self._pools[layer]
        keys.flatten(0, 1)[self._slots] = k
        values.flatten(0, 1)[self._slots] = v
        return keys, values

    def _slots_of(self, rows: Sequence[int], new: Sequence[int]) -> Int[Tensor, " tokens"]:
        """Return where in the flattened pool each new token goes."""
        slots = [
            self._pages[row][position // self.page] * self.page + position % self.page
            for row, count in zip(rows, new, strict=True)
            for position in range(self._lengths[row], self._lengths[row] + count)
        ]
        return torch.tensor(slots, device=self._slots.device)

    def _table(self, rows: Sequence[int]) -> Int[Tensor, "rows pages"]:
        longest = max(len(self._pages[row]) for row in rows)
        padded = [self._pages[row] + [0] * (longest - len(self._pages[row])) for row in rows]
        return torch.tensor(padded, device=self._slots.device)

    def _grow(self, needed: int) -> None:
        """Have at least `needed` free pages, or say that there is no room."""
        if needed <= len(self._free):
            return
        old = self.pages
        wanted = old + needed - len(self._free)
        if self.limit is not None and wanted > self.limit:
            raise LlameroError(
                f"the key/value cache is full: {needed} more pages of {self.page} tokens are needed, "
                f"{len(self._free) + self.limit - old} of {self.limit} are left",
                fix="run fewer or shorter sequences at a time, or allow more pages",
            )
        new = max(wanted, 2 * old) if self.limit is None else min(max(wanted, 2 * old), self.limit)
        for layer, (keys, values) in enumerate(self._pools):
            more = (new - old, *keys.shape[1:])
            self._pools[layer] = (torch.cat((keys, keys.new_zeros(more))), torch.cat((values, values.new_zeros(more))))
        self._free[:0] = range(new - 1, old - 1, -1)
