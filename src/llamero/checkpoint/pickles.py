"""PyTorch files (`.pth`, `.pt`): read without running their code or filling memory, written tensor by tensor.

Such a file is a zip archive of stored entries: `data.pkl` is a pickle in which a tensor names its storage by number,
`data/<number>` are the bytes of the storages (torch/serialization.py, since PyTorch 1.6).
"""

import argparse
import ctypes
import io
import mmap
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llamero.checkpoint.hf import Spec
from llamero.core.errors import LlameroError

_HARMLESS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
    "numpy._core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
}
"""What else than tensors and numbers a file may hold: arguments, and the state of numpy's random numbers."""

_libc = ctypes.CDLL(None)

_ENUM = re.compile(r"megatron(\.\w+)*\.enums\.\w+")


class Choice:
    """Stands for a member of an enumeration whose package is not installed."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class PickleFile:
    """A PyTorch file; `content` is a tree whose tensors are mapped from disk.

    Args:
        path: The file.

    Raises:
        LlameroError: It is cut off, too old to be mapped, or wants to do more than hold data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = self._harmless()
        self.content = self._load()

    def read(self, place: tuple[str, ...]) -> Tensor:
        """Return a copy of the tensor at a place of the tree; the pages of the file leave memory again."""
        found = self.content
        for key in place:
            found = found[key]
        copy = found.clone(memory_format=torch.contiguous_format)
        _let_go(found.untyped_storage())
        return copy

    def _harmless(self) -> list[Any]:
        """Return what the file needs beside tensors and numbers, by name; refuse what could do harm."""
        try:
            with zipfile.ZipFile(self.path):  # a broken archive is found here, before torch guesses at older formats
                wanted = get_unsafe_globals_in_checkpoint(str(self.path))
        except FileNotFoundError as error:
            raise LlameroError("file is missing", where=self.path) from error
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, RuntimeError, EOFError, IndexError) as error:
            raise LlameroError(
                "not a whole PyTorch file (or one written before PyTorch 1.6, which cannot be read piece by piece)",
                where=self.path,
                fix="fetch it again; an older file must be loaded and saved again with a newer PyTorch",
            ) from error
        found = {name: Choice if _ENUM.fullmatch(name) else _HARMLESS.get(name) for name in wanted}
        harmful = sorted(name for name, stand_in in found.items() if stand_in is None)
        if harmful:
            raise LlameroError(
                f"the file wants to do more than hold tensors, so it was not read: it names {', '.join(harmful)}",
                where=self.path,
                fix="do not trust it; save the weights alone where that software is installed",
            )
        return [(stand_in, name) for name, stand_in in found.items()]

    def _load(self) -> Any:
        try:
            with safe_globals([*self._names, type(np.dtype("uint32"))]):  # the latter no file names: numpy makes it
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise LlameroError(
                f"not a readable PyTorch file: {str(error).splitlines()[0]}", where=self.path, fix="fetch it again"
            ) from error


def _let_go(storage: torch.UntypedStorage) -> None:
    """Drop the mapped pages of a storage that was only read; they would count as this process's memory."""
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def leaves(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every leaf of nested mappings with its place."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*place, str(key)))
    else:
        yield place, tree


class _Storage:
    def __init__(self, number: int, spec: Spec) -> None:
        self.number, self.spec = number, spec


class _Promised:
    """A tensor that will come."""

    def __init__(self, number: int, spec: Spec) -> None:
        self.storage, self.spec = _Storage(number, spec), spec


_REBUILD: Callable[..., Tensor] = torch.empty(0).__reduce_ex__(2)[0]  # pyright: ignore[reportAssignmentType]
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
}


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        count = obj.spec.nbytes // obj.spec.dtype.itemsize
        return "storage", _STORAGES[obj.spec.dtype], str(obj.number), "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Promised):
            return NotImplemented
        shape = obj.spec.shape
        strides = torch.empty(shape, device="meta").stride()
        return _REBUILD, (obj.storage, 0, shape, strides, False, OrderedDict())


class PickleWriter:
    """A PyTorch file in the making: its tensors come one by one, in the order in which the content names them.

    Args:
        path: The file.
        content: What `torch.load` will give, with a `Spec` for each tensor.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self._left: list[tuple[tuple[str, ...], Spec]] = []
        text = io.BytesIO()
        _Pickler(text, protocol=2).dump(self._promised(content, ()))
        self._left.reverse()  # the next one is the last
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", allowZip64=True)
        self._entry("data.pkl", text.getvalue())
        self._entry("byteorder", b"little")
        self._number = 0

    def add(self, place: tuple[str, ...], tensor: Tensor) -> None:
        """Write the next tensor."""
        if not self._left:
            raise ValueError(f"tensor {place} was not announced")
        expected, spec = self._left.pop()
        if place != expected or Spec(tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(f"announced {expected} {spec}, came {place} {tuple(tensor.shape)} {tensor.dtype}")
        self._entry(f"data/{self._number}", tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._number += 1

    def close(self) -> None:
        """Finish the file."""
        if self._left:
            self._abandon()
            raise ValueError(f"tensor {self._left[-1][0]} was announced and never came")
        self._entry("version", b"3\n")
        self._zip.close()
        self._file.close()

    def __enter__(self) -> "PickleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        self._zip.fp = None  # stays unfinished, also when it is forgotten
        self._file.close()

    def _promised(self, tree: Any, place: tuple[str, ...]) -> Any:
        if isinstance(tree, Mapping):
            return {key: self._promised(value, (*place, key)) for key, value in tree.items()}
        if not isinstance(tree, Spec):
            return tree
        self._left.append((place, tree))
        return _Promised(len(self._left) - 1, tree)

    def _entry(self, name: str, data: Any) -> None:
        """Write an entry whose bytes begin at a multiple of 64, as torch's do: they are used where they lie."""
        info = zipfile.ZipInfo(f"archive/{name}")
        ahead = self._file.tell() + 30 + len(info.filename) + 20 + 4  # header, name, field of sizes, our field
        padding = -ahead % 64
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as entry:
            entry.write(data)
