"""Activations that wait between two decoder layers: in memory, or in a file where there are too many of them."""

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.core import files

Transfer = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`."""

MEMORY_BYTES = 2 << 30
"""Activations of more bytes than this wait in a file."""


class Waiting:
    """One hidden state for every token, group after group; each group is read and overwritten as a whole.

    The file has no name: it is gone with the process that made it, however that ends.

    Args:
        lengths: Tokens of each group.
        width: Of a hidden state.
        dtype: Of the hidden states.
        directory: Where the file goes that is needed for more than `MEMORY_BYTES`; without it all are in memory.

    Raises:
        LlameroError: There is no room for the file.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, *, directory: Path | None) -> None:
        self._width, self._dtype = width, dtype
        *self._starts, total = accumulate(lengths, initial=0)
        self._lengths = list(lengths)
        self._file: int | None = None
        self._rows = torch.empty(0)
        size = total * width * dtype.itemsize
        self.in_file = directory is not None and size > MEMORY_BYTES
        if directory is not None and self.in_file:
            with files.disk_errors_named(directory):
                self._file, path = tempfile.mkstemp(dir=directory)
                weakref.finalize(self, os.close, self._file)
                Path(path).unlink()
                os.posix_fallocate(self._file, 0, size)  # a full disk is said now
        else:
            self._rows = torch.empty(total, width, dtype=dtype)

    def __getitem__(self, group: int) -> Float[Tensor, "tokens width"]:
        """Return the hidden states of a group; threads may read and write different groups at once."""
        here = slice(self._starts[group], self._starts[group] + self._lengths[group])
        if self._file is None:
            return self._rows[here]
        x = torch.empty(self._lengths[group], self._width, dtype=self._dtype)
        _whole(os.preadv, self._file, x, self._offset(group))
        return x

    def __setitem__(self, group: int, x: Float[Tensor, "tokens width"]) -> None:
        """Replace those of a group."""
        here = slice(self._starts[group], self._starts[group] + self._lengths[group])
        if self._file is None:
            self._rows[here] = x
        else:
            _whole(os.pwritev, self._file, x.to("cpu", self._dtype).contiguous(), self._offset(group))

    def _offset(self, group: int) -> int:
        return self._starts[group] * self._width * self._dtype.itemsize


def _whole(call: Transfer, file: int, x: Tensor, offset: int) -> None:
    """Read or write all bytes of a tensor: one call moves at most 2 GiB."""
    data = x.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(data):
        moved = call(file, [data[done:]], offset + done)
        if moved == 0:
            raise EOFError("the file of waiting activations was cut off")
        done += moved
