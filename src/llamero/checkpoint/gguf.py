"""Tensors of GGUF files, as llama.cpp reads and writes them; what such a file says of itself is read by `core.gguf`.

Reading maps memory: a tensor costs nothing until it is looked at.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.core.gguf import (
    ALIGNMENT,
    ARRAY,
    MAGIC,
    SCALARS,
    SPLIT_NAME,
    STRING,
    TYPES,
    VERSION,
    BlockType,
    Header,
    Place,
    TensorSpec,
    Value,
    padded,
    read_header,
    split_name,
)

__all__ = [
    "ALIGNMENT",
    "ARRAY",
    "MAGIC",
    "SCALARS",
    "SPLIT_NAME",
    "STRING",
    "TYPES",
    "VERSION",
    "BlockType",
    "Gguf",
    "Place",
    "TensorSpec",
    "Value",
    "dtype_of",
    "open_gguf",
    "padded",
    "split_name",
]

_DTYPES: dict[str, torch.dtype] = {
    kind.dtype: getattr(torch, kind.dtype) for kind in TYPES.values() if kind.dtype is not None
}


def dtype_of(kind: BlockType) -> torch.dtype | None:
    """Return the dtype of a weight of a plain type, of another `None`."""
    return None if kind.dtype is None else _DTYPES[kind.dtype]


class Gguf(Header):
    """A model in GGUF: all metadata, and tensors that are read when they are asked for."""

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, mapped: of a plain type with its shape and dtype, of another the bytes of its rows.

        Raises:
            LlameroError: If there is no tensor of that name.
        """
        if name not in self.specs:
            raise LlameroError(f"tensor `{name}` is missing", where=self.paths[0])
        spec, place = self.specs[name], self.places[name]
        data = _mapped(place, spec.nbytes)
        dtype = dtype_of(spec.type)
        if dtype is not None:
            return data.view(dtype).view(spec.shape)
        return data.view(*spec.shape[:-1], spec.row_bytes)


def _mapped(place: Place, nbytes: int) -> Tensor:
    """Return bytes of a file; writing to them does not reach the file."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    before = place.offset % mmap.ALLOCATIONGRANULARITY
    with place.path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), before + nbytes, access=mmap.ACCESS_COPY, offset=place.offset - before)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=before)


def open_gguf(path: Path) -> Gguf:
    """Return what a GGUF file holds; of a split model any part may be named and all are opened.

    Raises:
        LlameroError: As `read_header` does.
    """
    header = read_header(path)
    return Gguf(header.paths, header.values, header.specs, header.places)
