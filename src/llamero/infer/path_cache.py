"""Keys and values of the path that a walk in depth stands on, and of the pass that is being computed."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.model.config import LlamaConfig


def bytes_needed(config: LlamaConfig, dtype: torch.dtype, tokens: int) -> int:
    """Return the memory that a cache of so many tokens takes."""
    return 2 * config.num_layers * tokens * config.num_kv_heads * config.head_dim * dtype.itemsize


class PathCache:
    """A row of keys and values per layer: first those of a path, then those of the nodes of a pass.

    Args:
        config: Shape of the model.
        tokens: Most of a path and its pass together.
        dtype: Dtype of keys and values.
        device: Where they live.
    """

    def __init__(self, config: LlamaConfig, tokens: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (2, tokens, config.num_kv_heads, config.head_dim)
        self._rows = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._path = 0

    def begin(self, path: int) -> None:
        """Say how long the path is that the next pass hangs on; longer ones are cropped to it."""
        self._path = path

    def extend(
        self, layer: int, k: Float[Tensor, "tokens kv d"], v: Float[Tensor, "tokens kv d"]
    ) -> tuple[Float[Tensor, "keys kv d"], Float[Tensor, "keys kv d"]]:
        """Take what the nodes of the pass add, and return it behind the path."""
        end = self._path + len(k)
        keys, values = self._rows[layer][:, :end]
        keys[self._path :], values[self._path :] = k, v
        return keys, values

    def keep(self, parts: Iterable[tuple[int, int, int]]) -> None:
        """Move nodes of the pass onto the path, where they belong there.

        Args:
            parts: Position in the sequence, number within the pass and count of neighbours, first ones first.
        """
        for position, node, count in parts:
            if position != self._path + node:
                for rows in self._rows:
                    moved = rows[:, self._path + node : self._path + node + count].clone()  # they may overlap
                    rows[:, position : position + count] = moved
