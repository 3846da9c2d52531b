"""Hugging Face model directories: config.json, safetensors shards with their index, and the files beside them.

Tensors stream: reading holds one of them at a time beside the model, writing holds one at a time.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise LlameroError(f"tensor `{name}` is missing", where=self.directory)
        return self._read(self.files[name], name)


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
        raise LlameroError(
            "not a model directory: it has no config.json",
            where=directory,
            fix="give a Hugging Face model directory, or `owner/name` of the hub",
        )
    return read_json(directory / "config.json")


def open_tensors(directory: Path) -> Tensors:
    """Return the tensors of a directory: safetensors, or `.bin` files read by torch's weights-only loader."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = directory / index_name
        if index.exists():
            files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
            _refuse_missing(files, index)
            return _safetensors(directory, files) if "safetensors" in index_name else _bins(directory, files)
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return _safetensors(directory, None, shards)
    bins = sorted(directory.glob("pytorch_model*.bin"))
    if bins:
        return _bins(directory, None, bins)
    raise LlameroError("no weights: neither *.safetensors nor pytorch_model*.bin", where=directory)


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
        header = json.loads(file.read(length))
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


def _safetensors(directory: Path, files: dict[str, Path] | None, shards: list[Path] | None = None) -> Tensors:
    specs: dict[str, Spec] = {}
    found: dict[str, Path] = {}
    for path in shards or sorted(set((files or {}).values())):
        for name, spec in read_header(path).items():
            if name in found and files is None:
                raise LlameroError(f"tensor `{name}` is also in {found[name].name}", where=path)
            if files is None or files.get(name) == path:
                specs[name], found[name] = spec, path
    for name in files or {}:
        if name not in found:
            raise LlameroError(f"tensor `{name}` is not in the file that the index names", where=files[name])  # type: ignore[index]

    def read(path: Path, name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise LlameroError(f"tensor `{name}`: {error}", where=path, fix="download it again") from error

    return Tensors(directory, found, specs, read)


def _bins(directory: Path, files: dict[str, Path] | None, bins: list[Path] | None = None) -> Tensors:
    loaded: dict[Path, dict[str, Tensor]] = {}
    for path in bins or sorted(set((files or {}).values())):
        # weights_only: nothing in a pickle is ever run; mmap: a tensor is read when it is used
        loaded[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found = files or {name: path for path, tensors in loaded.items() for name in tensors}
    specs = {name: Spec(tuple(loaded[path][name].shape), loaded[path][name].dtype) for name, path in found.items()}
    return Tensors(directory, found, specs, lambda path, name: loaded[path][name])


def write_tensors(
    directory: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write safetensors shards (and their index) and return their paths.

    Args:
        directory: Where to.
        specs: Name, shape and dtype of every tensor, in the order in which `tensors` brings them.
        tensors: The tensors; one is held at a time.
        stem: First part of the file names.
        shard_bytes: Largest shard; a tensor that is larger has a shard to itself.
    """
    shards = _plan(specs, shard_bytes)
    single = len(shards) == 1
    paths = [
        directory / (f"{stem}.safetensors" if single else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors")
        for i in range(len(shards))
    ]
    source = iter(tensors)
    for path, names in zip(paths, shards, strict=True):
        _write_shard(path, {name: specs[name] for name in names}, source)
    extra = next(source, None)
    if extra is not None:
        raise ValueError(f"tensor {extra[0]} was not announced")
    if not single:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: path.name for path, names in zip(paths, shards, strict=True) for name in names},
        }
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


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


def _write_shard(path: Path, specs: Mapping[str, Spec], source: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        offsets = [offset, offset + spec.nbytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected, spec in specs.items():
            name, tensor = next(source)
            if name != expected or Spec(tuple(tensor.shape), tensor.dtype) != spec:
                raise ValueError(f"announced {expected} {spec}, came {name} {tuple(tensor.shape)} {tensor.dtype}")
            data = tensor.detach().cpu().contiguous()
            if data.numel():
                file.write(data.view(-1).view(torch.uint8).numpy().data)
