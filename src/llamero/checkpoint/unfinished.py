"""Files of weights in the making: under another name until they are whole, and gone on with after a kill."""

import os
from pathlib import Path

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
            self._file = place.open("r+b")
            if self._file.read(len(beginning)) != beginning:
                self._file.close()
                raise LlameroError(
                    "what was begun there is not what is made now", where=place, fix=f"remove {path.parent}"
                )
            return
        self._file = self._beside.open("wb")
        self._beside.chmod(0o644)  # whatever the umask: a release is for everybody to read
        self._file.write(beginning)
        if length is not None:
            self._file.truncate(length)
        self._file.flush()

    def write(self, offset: int, tensor: Tensor) -> None:
        """Write the bytes of a tensor."""
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            self._dirty = True
            self._file.seek(offset)
            self._file.write(data.view(-1).view(torch.uint8).numpy().data)

    def sync(self) -> None:
        """Force what was written to disk."""
        if self._dirty:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._dirty = False

    def finish(self) -> None:
        """Give the whole file its name."""
        self._file.flush()
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
