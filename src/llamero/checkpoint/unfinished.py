"""Files of weights in the making: under another name until they are whole, and gone on with after a kill."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llamero.core.errors import LlameroError


class UnfinishedFile:
    """A file whose beginning and length are known before its tensors come.

    Args:
        path: What it is called when it is whole; until then it stands beside.
        beginning: What comes before the tensors.
        length: Of the whole file, where it ends with padding.
        begun: Whether an earlier process, or another one, has begun it.

    Raises:
        LlameroError: What was begun is not there, or is another file.
    """

    def __init__(self, path: Path, beginning: bytes, *, length: int | None = None, begun: bool = False) -> None:
        self._path, self._beside = path, path.with_name(f".{path.name}.new")
        self._dirty = False
        if begun:
            place = self._beside if self._beside.exists() else path
            if not place.exists():
                raise LlameroError("what was begun there is gone", where=place, fix=f"remove {path.parent}")
            with place.open("rb") as file:
                same = file.read(len(beginning)) == beginning
            if not same:
                raise LlameroError(
                    "what was begun there is not what is made now", where=place, fix=f"remove {path.parent}"
                )
            self._file = place.open("r+b", buffering=0)
            return
        self._file = self._beside.open("wb", buffering=0)  # of several processes none writes more than its tensors
        self._beside.chmod(0o644)  # whatever the umask: a release is for everybody to read
        self._write(0, memoryview(beginning))
        if length is not None:
            self._file.truncate(length)

    def write(self, offset: int, tensor: Tensor) -> None:
        """Write the bytes of a tensor."""
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            self._dirty = True
            self._write(offset, data.view(-1).view(torch.uint8).numpy().data)

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):  # one call writes at most 2 GiB
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def sync(self) -> None:
        """Force what was written to disk."""
        if self._dirty:
            os.fsync(self._file.fileno())
            self._dirty = False

    def finish(self) -> None:
        """Give the whole file its name."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._beside.exists():
            self._beside.replace(self._path)

    def close(self) -> None:
        """Close it and leave it unfinished."""
        self._file.close()

    def remove(self) -> None:
        """Close it and remove it, unless it is finished."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


class UnfinishedFiles:
    """Files whose tensors come in any order, each once; no file has its name before all are whole.

    Args:
        names: Of all tensors.
        written: Those that an earlier writer of the same files has written and synced; its unfinished files are gone
            on with. `None`: they are begun.
    """

    def __init__(self, names: Iterable[str], written: Collection[str] | None) -> None:
        self.begun = written is not None
        """Whether files of an earlier writer are gone on with."""
        self.missing = dict.fromkeys(name for name in names if name not in (written or ()))
        """Names of the tensors that have not come."""
        self._files: list[UnfinishedFile] = []
        self._places: dict[str, tuple[UnfinishedFile, int]] = {}
        self._unsynced: list[str] = []

    def begin(self, path: Path, beginning: bytes, sizes: Sequence[tuple[str, int]], *, length: int | None) -> None:
        """Begin a file, or go on with it; arguments as of `UnfinishedFile`.

        Args:
            path: What it is called when it is whole.
            beginning: What comes before the tensors.
            sizes: Its tensors and the bytes from the start of each to that of the next.
            length: Of the whole file, where it ends with padding.
        """
        file, at = UnfinishedFile(path, beginning, length=length, begun=self.begun), len(beginning)
        self._files.append(file)
        for name, size in sizes:
            self._places[name] = file, at
            at += size

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place."""
        file, offset = self._places[name]
        file.write(offset, tensor)
        self._unsynced.append(name)
        del self.missing[name]

    def note(self, names: Iterable[str]) -> None:
        """Wait no longer for tensors that another process has written and synced."""
        for name in names:
            self.missing.pop(name, None)

    def refuse_unknown(self, name: str) -> None:
        """Refuse a tensor that nobody waits for."""
        if name not in self.missing:
            raise ValueError(f"tensor {name} was not announced, or came before")

    def sync(self) -> list[str]:
        """Force to disk what was written since the last time, and return the names of these tensors."""
        for file in self._files:
            file.sync()
        names, self._unsynced = self._unsynced, []
        return names

    def close(self) -> None:
        """Finish the files and give them their names."""
        if self.missing:
            self.abandon()
            raise ValueError(f"tensors were announced and never came: {', '.join(sorted(self.missing))}")
        for file in self._files:
            file.finish()

    def abandon(self) -> None:
        """Close what is open and leave it unfinished."""
        for file in self._files:
            file.close()

    def remove(self) -> None:
        """Close what is open and remove what is unfinished."""
        for file in self._files:
            file.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.remove()  # nothing, where it is finished
