"""Activations that wait between two decoder layers: in memory, or on disk.

There in two files that outlive the process: what comes out of a layer is written beside what went into it. Of
several processes each reads and writes groups of its own, in the same files.
"""

import os
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


class Waiting:
    """One hidden state for every token, group after group; each group is read and overwritten as a whole.

    Args:
        name: Of the stream; it does not matter here.
        lengths: Tokens of each group.
        width: Of a hidden state.
        dtype: Of the hidden states.
    """

    def __init__(self, name: str, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._lengths, self._width, self._dtype = list(lengths), width, dtype
        self._groups: dict[int, Tensor] = {}
        self.layer: int | None = None
        """That the activations come before."""

    def __getitem__(self, group: int) -> Float[Tensor, "tokens width"]:
        """Return the hidden states of a group; threads may read and write different groups at once."""
        return self._groups[group]

    def __setitem__(self, group: int, x: Float[Tensor, "tokens width"]) -> None:
        """Replace those of a group."""
        if group not in self._groups:
            self._groups[group] = torch.empty(self._lengths[group], self._width, dtype=self._dtype)
        self._groups[group].copy_(x)

    def sync(self) -> None:
        """Do nothing: there is no disk."""

    def turn(self) -> None:
        """Go on to the next layer."""
        self.layer = 0 if self.layer is None else self.layer + 1


def _whole(call: Transfer, file: int, x: Tensor, offset: int) -> None:
    """Read or write all bytes of a tensor: one call moves at most 2 GiB."""
    data = x.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(data):
        moved = call(file, [data[done:]], offset + done)
        if moved == 0:
            raise EOFError("the file of waiting activations was cut off")
        done += moved


class KeptWaiting:
    """Activations like `Waiting`, in two files in turn, so that a killed pass goes on with the layer it was at.

    What is read is what came before a layer; what is written comes after it, until `turn`.

    Args:
        lengths: Tokens of each group.
        width: Of a hidden state.
        dtype: Of the hidden states.
        directory: Where the files go.
        name: What they are called.
        layer: That an earlier process turned to; `None`: begin anew.
        turned: Told of each layer before which the activations are on disk.

    Raises:
        LlameroError: There is no room for the files.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        directory: Path,
        name: str,
        layer: int | None = None,
        turned: Callable[[int], None],
    ) -> None:
        self._width, self._dtype = width, dtype
        *self._starts, total = accumulate(lengths, initial=0)
        self._lengths, self._turned = list(lengths), turned
        self.layer = layer
        """That the activations come before; `None` where they have not been written."""
        self._files: list[int] = []
        with files.disk_errors_named(directory):
            for number in range(2):
                handle = os.open(directory / f"{name}.{number}", os.O_RDWR | os.O_CREAT, 0o600)
                self._files.append(handle)
                weakref.finalize(self, os.close, handle)
                os.posix_fallocate(handle, 0, max(1, total * width * dtype.itemsize))  # a full disk is said now

    def __getitem__(self, group: int) -> Float[Tensor, "tokens width"]:
        """Return the hidden states of a group before the layer; threads may read and write at once."""
        assert self.layer is not None
        x = torch.empty(self._lengths[group], self._width, dtype=self._dtype)
        _whole(os.preadv, self._files[self.layer % 2], x, self._offset(group))
        return x

    def __setitem__(self, group: int, x: Float[Tensor, "tokens width"]) -> None:
        """Write those after it."""
        _whole(os.pwritev, self._files[self._after % 2], x.to("cpu", self._dtype).contiguous(), self._offset(group))

    def sync(self) -> None:
        """Force to disk what was written; all processes that write do so before any turns."""
        os.fsync(self._files[self._after % 2])

    def turn(self) -> None:
        """Go on to the next layer: what was written is read from now on."""
        self.layer = self._after
        self._turned(self.layer)

    @property
    def _after(self) -> int:
        """Return the layer before which the activations that are being written come."""
        return 0 if self.layer is None else self.layer + 1

    def _offset(self, group: int) -> int:
        return self._starts[group] * self._width * self._dtype.itemsize
