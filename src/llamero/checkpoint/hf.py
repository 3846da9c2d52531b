"""Hugging Face model directories: config.json, safetensors shards with their index, and the files beside them.

Tensors stream: reading holds one of them, or a part of one, at a time beside the model, writing holds one at a time.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamero.checkpoint.unfinished import UnfinishedFiles
from llamero.core import gguf
from llamero.core.errors import LlameroError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 5_000_000_000

Region = tuple[slice, ...]
"""A rectangle of a tensor: where it begins and ends in each dimension."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass
class Tensors:
    """The named tensors of a directory; each is read when it is asked for."""

    directory: Path
    files: dict[str, Path]
    """File of each tensor."""
    specs: dict[str, Spec]
    _read: Callable[[Path, str], Tensor] = field(repr=False)
    _read_part: Callable[[Path, str, Region], Tensor] | None = field(default=None, repr=False)
    """Reads no more than a region; without it the tensor is read and cut."""

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._file(name), name)

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a tensor; of a safetensors file nothing else is read."""
        path = self._file(name)
        return self._read(path, name)[region] if self._read_part is None else self._read_part(path, name, region)

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise LlameroError(f"tensor `{name}` is missing", where=self.directory)
        return self.files[name]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or say which file and line is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LlameroError("file is missing", where=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise LlameroError(f"not valid JSON: {error}", where=f"{path}:{line}") from error
    if not isinstance(value, dict):
        raise LlameroError(f"a JSON object is expected, found {type(value).__name__}", where=path)
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json."""
    if not (directory / "config.json").exists():
        _refuse_gguf(directory)
        raise LlameroError(
            "not a model directory: it has no config.json",
            where=directory,
            fix="give a Hugging Face model directory, or `owner/name` of the hub",
        )
    return read_json(directory / "config.json")


def _refuse_gguf(directory: Path) -> None:
    found = gguf.find(directory)
    if found is not None:
        raise LlameroError(
            "a model in GGUF, where a Hugging Face directory is needed",
            where=found,
            fix=f"llamero convert {found} DIRECTORY --to hf",
        )


def open_tensors(directory: Path) -> Tensors:
    """Return the tensors of a directory, from the first kind of file in `CONTAINERS` that it has."""
    _refuse_gguf(directory)
    for container in CONTAINERS:
        index = directory / container.index_name
        if index.exists():
            files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
            _refuse_missing(files, index)
            return container.open(directory, files, [])
        shards = sorted(directory.glob(container.pattern))
        if shards:
            return container.open(directory, None, shards)
    raise LlameroError(f"no weights: no {' and no '.join(c.pattern for c in CONTAINERS)}", where=directory)


def _refuse_missing(files: Mapping[str, Path], index: Path) -> None:
    missing = sorted({str(path.name) for path in files.values() if not path.exists()})
    if missing:
        raise LlameroError(
            f"shards named by the index are missing: {', '.join(missing)}",
            where=index,
            fix="download them again",
        )


def read_header(path: Path) -> dict[str, Spec]:
    """Return shape and dtype of every tensor of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        size = path.stat().st_size
        if length > size - 8:
            raise LlameroError(f"truncated safetensors file ({size} bytes)", where=path, fix="download it again")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LlameroError(f"broken safetensors header: {error}", where=path, fix="download it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise LlameroError(
            f"the header promises {8 + length + end} bytes, the file has {size}", where=path, fix="download it again"
        )
    return {name: Spec(tuple(e["shape"]), _dtype(e["dtype"], path)) for name, e in header.items()}


def _dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise LlameroError(f"dtype {name} is not known", where=path)
    return DTYPES[name]


def _safetensors(directory: Path, files: dict[str, Path] | None, shards: list[Path]) -> Tensors:
    specs: dict[str, Spec] = {}
    found: dict[str, Path] = {}
    for path in shards or sorted(set((files or {}).values())):
        for name, spec in read_header(path).items():
            if name in found and files is None:
                raise LlameroError(f"tensor `{name}` is also in {found[name].name}", where=path)
            if files is None or files.get(name) == path:
                specs[name], found[name] = spec, path
    for name, path in (files or {}).items():
        if name not in found:
            raise LlameroError(f"tensor `{name}` is not in the file that the index names", where=path)

    def read(path: Path, name: str, region: Region | None = None) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name) if region is None else file.get_slice(name)[region]
        except SafetensorError as error:
            raise LlameroError(f"tensor `{name}`: {error}", where=path, fix="download it again") from error

    return Tensors(directory, found, specs, read, read)


def _bins(directory: Path, files: dict[str, Path] | None, bins: list[Path]) -> Tensors:
    loaded = {path: _load_bin(path) for path in bins or sorted(set((files or {}).values()))}
    found = files or {name: path for path, tensors in loaded.items() for name in tensors}
    for name, path in found.items():
        if name not in loaded[path]:
            raise LlameroError(f"tensor `{name}` is not in the file that the index names", where=path)
    specs = {name: Spec(tuple(loaded[path][name].shape), loaded[path][name].dtype) for name, path in found.items()}
    return Tensors(directory, found, specs, lambda path, name: loaded[path][name])


def _load_bin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle; `weights_only`: no code in it is ever run, `mmap`: tensors wait on disk."""
    try:
        with zipfile.ZipFile(path):  # a broken archive is found here, before torch guesses at an older format
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise LlameroError(
            "not a whole PyTorch file (or one written before PyTorch 1.6)",
            where=path,
            fix="download it again; an older file must be converted to safetensors",
        ) from error
    except pickle.UnpicklingError as error:
        raise LlameroError(
            f"the file wants to do more than hold tensors, so it was not read: {str(error).splitlines()[0]}",
            where=path,
            fix="do not trust it; use a safetensors edition of the model",
        ) from error
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if len(tensors) != len(loaded):
        raise LlameroError("the file holds more than named tensors", where=path)
    return tensors


class Container(NamedTuple):
    """A kind of file that weights come in."""

    pattern: str
    """Names of such files."""
    index_name: str
    """Name of the file that says which tensor is in which file, where there are several."""
    open: Callable[[Path, dict[str, Path] | None, list[Path]], Tensors]
    """Takes the directory and either the file of each tensor or the files."""


CONTAINERS = (
    Container("*.safetensors", "model.safetensors.index.json", _safetensors),
    Container("pytorch_model*.bin", "pytorch_model.bin.index.json", _bins),
)
"""Every kind of file there is, the preferred one first. To add one: a function above and a line here; what a
release carries along is decided in `publish/place.py`, what is downloaded in `core/download.py`."""


class ShardWriter(UnfinishedFiles):
    """Safetensors shards (and their index) in the making; no file has its name before it is whole.

    Args:
        directory: Where to.
        specs: Name, shape and dtype of every tensor, in the order of the files.
        stem: First part of the file names.
        shard_bytes: Largest shard; a tensor that is larger has a shard to itself.
        written: As of `UnfinishedFiles`.

    Raises:
        LlameroError: The unfinished files are not those of this writer.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, Spec],
        *,
        stem: str = "model",
        shard_bytes: int = SHARD_BYTES,
        written: Collection[str] | None = None,
    ) -> None:
        super().__init__(specs, written)
        self._specs = dict(specs)
        shards = _plan(specs, shard_bytes)
        count = len(shards)
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self.paths = [directory / name for name in (names if count > 1 else [f"{stem}.safetensors"])]
        self._index = directory / f"{stem}.safetensors.index.json" if count > 1 else None
        self._shard = {name: shard for shard, members in enumerate(shards) for name in members}
        for path, members in zip(self.paths, shards, strict=True):
            sizes = [(name, specs[name].nbytes) for name in members]
            self.begin(path, _beginning({name: specs[name] for name in members}), sizes, length=None)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; the order does not matter."""
        self.refuse_unknown(name)
        spec = self._specs[name]
        if Spec(tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(f"announced {name} {spec}, came {tuple(tensor.shape)} {tensor.dtype}")
        self.put(name, tensor)

    def close(self) -> None:
        """Finish the files, give them their names and write the index."""
        super().close()
        if self._index is not None:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {name: self.paths[shard].name for name, shard in self._shard.items()},
            }
            self._index.write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    directory: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write safetensors shards (and their index) and return their paths; one tensor is held at a time.

    Args:
        directory: Where to.
        specs: Name, shape and dtype of every tensor, in the order of the files.
        tensors: The tensors.
        stem: First part of the file names.
        shard_bytes: Largest shard; a tensor that is larger has a shard to itself.
    """
    with ShardWriter(directory, specs, stem=stem, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
    return writer.paths


def file_bytes(specs: Mapping[str, Spec], *, shard_bytes: int = SHARD_BYTES) -> list[int]:
    """Return the size of each file that a `ShardWriter` makes of these tensors, headers included."""
    shards = [{name: specs[name] for name in names} for names in _plan(specs, shard_bytes)]
    return [len(_beginning(part)) + sum(spec.nbytes for spec in part.values()) for part in shards]


def _beginning(specs: Mapping[str, Spec]) -> bytes:
    """Return what stands in a safetensors file before its tensors: a length and the header, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        offsets = [offset, offset + spec.nbytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _plan(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.nbytes
    return shards
