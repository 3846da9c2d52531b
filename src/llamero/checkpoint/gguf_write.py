"""GGUF files in the making: everything about the tensors is known first, then their data comes one by one."""

import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamero.checkpoint.gguf import (
    ALIGNMENT,
    ARRAY,
    MAGIC,
    SCALARS,
    STRING,
    VERSION,
    TensorSpec,
    Value,
    dtype_of,
    padded,
    split_name,
)
from llamero.checkpoint.unfinished import UnfinishedFiles


class GgufWriter(UnfinishedFiles):
    """Writes a model as one GGUF file, or as several; no file has its name before it is whole.

    Args:
        directory: Where to.
        stem: Name of the file without `.gguf`.
        values: Metadata.
        specs: Shape and type of every tensor, in the order of the file.
        shard_bytes: Most bytes of tensors in one file; a larger tensor has a file to itself. All in one without it.
        written: As of `UnfinishedFiles`.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        values: Mapping[str, Value],
        specs: Mapping[str, TensorSpec],
        *,
        shard_bytes: int | None = None,
        written: Collection[str] | None = None,
    ) -> None:
        super().__init__(specs, written)
        shards = shares(specs, shard_bytes)
        count = len(shards)
        names = [split_name(stem, i, count) for i in range(count)] if count > 1 else [f"{stem}.gguf"]
        self.paths = [directory / name for name in names]
        self._specs = dict(specs)
        for number, (path, share) in enumerate(zip(self.paths, shards, strict=True)):
            split = _split_values(number, count, len(specs)) if count > 1 else {}
            text = header({**(values if number == 0 else {}), **split}, share)
            sizes = [(name, padded(spec.nbytes, ALIGNMENT)) for name, spec in share.items()]
            self.begin(path, text, sizes, length=len(text) + sum(size for _, size in sizes))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; the order does not matter.

        Args:
            name: Of the tensor.
            tensor: As `Gguf.__getitem__` returns it: of the type's dtype, or the bytes of its rows.
        """
        self.refuse_unknown(name)
        spec = self._specs[name]
        dtype = dtype_of(spec.type)
        shape = spec.shape if dtype is not None else (*spec.shape[:-1], spec.row_bytes)
        if tuple(tensor.shape) != shape or tensor.dtype != (dtype or torch.uint8):
            raise ValueError(f"announced {name} {spec}, came {tuple(tensor.shape)} {tensor.dtype}")
        self.put(name, tensor)


def sizes(values: Mapping[str, Value], specs: Mapping[str, TensorSpec], shard_bytes: int | None = None) -> list[int]:
    """Return the bytes of each file that a writer would make."""
    shards = shares(specs, shard_bytes)
    found = []
    for number, share in enumerate(shards):
        split = _split_values(number, len(shards), len(specs)) if len(shards) > 1 else {}
        text = header({**(values if number == 0 else {}), **split}, share)
        found.append(len(text) + sum(padded(spec.nbytes, ALIGNMENT) for spec in share.values()))
    return found


def shares(specs: Mapping[str, TensorSpec], shard_bytes: int | None) -> list[dict[str, TensorSpec]]:
    """Return which tensors each file has."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        size = padded(spec.nbytes, ALIGNMENT)
        if shard_bytes is not None and shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += size
    return shards


def _split_values(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {
        "split.no": Value("uint16", number),
        "split.count": Value("uint16", count),
        "split.tensors.count": Value("int32", tensors),
    }


def header(values: Mapping[str, Value], specs: Mapping[str, TensorSpec]) -> bytes:
    """Return what stands before the data of a file, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(values))]
    for key, value in values.items():
        parts += [_text(key), *_value(value)]
    offset = 0
    for name, spec in specs.items():
        dims = spec.shape[::-1]
        parts.append(_text(name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, spec.type.number, offset))
        offset += padded(spec.nbytes, ALIGNMENT)
    made = b"".join(parts)
    return made.ljust(padded(len(made), ALIGNMENT), b"\0")


def _value(value: Value) -> list[bytes]:
    number, letter = (STRING, "") if value.kind == "string" else SCALARS[value.kind]
    if not isinstance(value.value, list):
        return [struct.pack("<I", number), _scalar(letter, value.value)]
    head = struct.pack("<IIQ", ARRAY, number, len(value.value))
    if number == STRING:
        return [head, *(_text(text) for text in value.value)]
    return [head, struct.pack(f"<{len(value.value)}{letter}", *value.value)]


def _scalar(letter: str, value: Any) -> bytes:
    return struct.pack(f"<{letter}", value) if letter else _text(value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
