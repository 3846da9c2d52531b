"""Activations that wait between two decoder layers: in memory, or in a file where there are too many of them.

Or in two files that outlive the process: what comes out of a layer is written beside what went into it.
"""

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
        self.layer: int | None = None
        """That the activations come before."""
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

    def turn(self) -> None:
        """Go on to the next layer."""
        self.layer = 0 if self.layer is None else self.layer + 1

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

    in_file = True

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
        after = 0 if self.layer is None else self.layer + 1
        _whole(os.pwritev, self._files[after % 2], x.to("cpu", self._dtype).contiguous(), self._offset(group))

    def turn(self) -> None:
        """Go on to the next layer: what was written is forced to disk and read from now on."""
        self.layer = 0 if self.layer is None else self.layer + 1
        os.fsync(self._files[self.layer % 2])
        self._turned(self.layer)

    def _offset(self, group: int) -> int:
        return self._starts[group] * self._width * self._dtype.itemsize
