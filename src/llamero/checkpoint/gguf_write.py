"""GGUF files in the making: everything about the tensors is known first, then their data comes one by one."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

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


class GgufWriter:
    """Writes a model as one GGUF file, or as several; no file has its name before it is whole.

    Args:
        directory: Where to.
        stem: Name of the file without `.gguf`.
        values: Metadata.
        specs: Shape and type of every tensor, in the order of the file.
        shard_bytes: Most bytes of tensors in one file; a larger tensor has a file to itself. All in one without it.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        values: Mapping[str, Value],
        specs: Mapping[str, TensorSpec],
        *,
        shard_bytes: int | None = None,
    ) -> None:
        shards = shares(specs, shard_bytes)
        count = len(shards)
        names = [split_name(stem, i, count) for i in range(count)] if count > 1 else [f"{stem}.gguf"]
        self.paths = [directory / name for name in names]
        self._specs, self._missing = dict(specs), set(specs)
        self._beside = [path.with_name(f".{path.name}.new") for path in self.paths]
        self._files: list[BinaryIO] = []
        self._offsets: dict[str, tuple[BinaryIO, int]] = {}
        for number, share in enumerate(shards):
            split = _split_values(number, count, len(specs)) if count > 1 else {}
            self._begin(self._beside[number], {**(values if number == 0 else {}), **split}, share)

    def _begin(self, path: Path, values: Mapping[str, Value], specs: Mapping[str, TensorSpec]) -> None:
        text = header(values, specs)
        file = path.open("wb")
        self._files.append(file)
        path.chmod(0o644)  # whatever the umask: a release is for everybody to read
        file.write(text)
        at = len(text)
        for name, spec in specs.items():
            self._offsets[name] = file, at
            at += padded(spec.nbytes, ALIGNMENT)
        file.truncate(at)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; the order does not matter.

        Args:
            name: Of the tensor.
            tensor: As `Gguf.__getitem__` returns it: of the type's dtype, or the bytes of its rows.
        """
        if name not in self._missing:
            raise ValueError(f"tensor {name} was not announced, or came before")
        spec = self._specs[name]
        dtype = dtype_of(spec.type)
        shape = spec.shape if dtype is not None else (*spec.shape[:-1], spec.row_bytes)
        if tuple(tensor.shape) != shape or tensor.dtype != (dtype or torch.uint8):
            raise ValueError(f"announced {name} {spec}, came {tuple(tensor.shape)} {tensor.dtype}")
        file, offset = self._offsets[name]
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            file.seek(offset)
            file.write(data.view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Finish the files and give them their names."""
        if self._missing:
            self.abandon()
            raise ValueError(f"tensors were announced and never came: {', '.join(sorted(self._missing))}")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for beside, path in zip(self._beside, self.paths, strict=True):
            beside.replace(path)

    def abandon(self) -> None:
        """Close what is open and remove what is unfinished."""
        for file in self._files:
            file.close()
        for beside in self._beside:
            beside.unlink(missing_ok=True)

    def __enter__(self) -> "GgufWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


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
