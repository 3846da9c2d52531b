"""GGUF files, version 3: typed metadata and tensors in block formats, as llama.cpp reads and writes them.

Little-endian throughout: magic, version, counts; keys with typed values; a record per tensor (name, dimensions fastest
first, type, offset); then the data, each tensor aligned. A large model is split into files `NAME-00001-of-0000N.gguf`,
of which the first holds the metadata. Version 2 differs in nothing and is read too. What a file says of itself is read
here; `checkpoint.gguf` reads its tensors.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llamero.core.errors import LlameroError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "adapter_config.json")
"""Files beside which GGUF files of a directory are not what it stands for."""
VERSION = 3
READ_VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of tensor data where the metadata names no other."""

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")

MAX_DIMS = 4
"""Of a tensor."""


# -- types of tensors and of values


@dataclass(frozen=True)
class BlockType:
    """How the weights of a tensor are stored: blocks of so many weights in so many bytes."""

    name: str
    """As GGUF calls it."""
    number: int
    """Its id in a file."""
    block: int
    """Weights of a block."""
    size: int
    """Bytes of a block."""
    dtype: str | None = None
    """PyTorch's name of a weight's type, for types that are plain arrays."""

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that a weight takes, scales included."""
        return 8 * self.size / self.block

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of `width` weights, a multiple of the block."""
        if width % self.block:
            raise ValueError(f"{width} weights are no multiple of the {self.block} of a block of {self.name}")
        return width // self.block * self.size


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, "float32"),
        BlockType("F16", 1, 1, 2, "float16"),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q8_1", 9, 32, 40),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("Q8_K", 15, 256, 292),
        BlockType("IQ2_XXS", 16, 256, 66),
        BlockType("IQ2_XS", 17, 256, 74),
        BlockType("IQ3_XXS", 18, 256, 98),
        BlockType("IQ1_S", 19, 256, 50),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ3_S", 21, 256, 110),
        BlockType("IQ2_S", 22, 256, 82),
        BlockType("IQ4_XS", 23, 256, 136),
        BlockType("I8", 24, 1, 1, "int8"),
        BlockType("I16", 25, 1, 2, "int16"),
        BlockType("I32", 26, 1, 4, "int32"),
        BlockType("I64", 27, 1, 8, "int64"),
        BlockType("F64", 28, 1, 8, "float64"),
        BlockType("IQ1_M", 29, 256, 56),
        BlockType("BF16", 30, 1, 2, "bfloat16"),
        BlockType("TQ1_0", 34, 256, 54),
        BlockType("TQ2_0", 35, 256, 66),
        BlockType("MXFP4", 39, 32, 17),
        BlockType("NVFP4", 40, 64, 36),
        BlockType("Q1_0", 41, 128, 18),
    )
}
"""Every type of tensor whose bytes can be counted; which of them can be decoded is another matter."""

_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}

SCALARS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
"""Id of each type of number in the metadata, and the letter by which `struct` knows it."""

STRING, ARRAY = 8, 9
"""Ids of the other two types of metadata."""

_VALUES = {number: name for name, (number, _) in SCALARS.items()} | {STRING: "string"}


class Value(NamedTuple):
    """A value of the metadata with the type that it has in a file."""

    kind: str
    """A name of `SCALARS`, or `string`; of a list, that of its elements."""
    value: Any
    """A number, a truth, a text, or a list of these."""


class TensorSpec(NamedTuple):
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    """Rows first, as PyTorch has it; a file has it the other way round."""
    type: BlockType

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Return the bytes of its data."""
        return prod(self.shape[:-1]) * self.row_bytes


class Place(NamedTuple):
    """Where the data of a tensor is."""

    path: Path
    offset: int
    """Bytes from the beginning of the file."""


# -- reading


@dataclass(frozen=True)
class Header:
    """What a model in GGUF says of itself: all metadata, and where its tensors are."""

    paths: tuple[Path, ...]
    """Its files, in order."""
    values: Mapping[str, Value]
    """Of the first file."""
    specs: Mapping[str, TensorSpec]
    """Of every tensor, in the order of the files."""
    places: Mapping[str, Place] = field(repr=False)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata as plain values."""
        return {key: value.value for key, value in self.values.items()}


def read_header(path: Path) -> Header:
    """Return what a GGUF file says of itself; of a split model any part may be named and all are opened.

    Raises:
        LlameroError: If the file is none, is truncated, of another version or byte order, holds a type that is not
            known or a tensor beyond its end, or if another part of a split model is missing or does not belong to it.
    """
    first, *rest = _parts(path)
    values, specs, places = _read_file(first)
    for number, part in enumerate(rest, 1):
        part_values, part_specs, part_places = _read_file(part)
        _check_part(part_values, number, len(rest) + 1, part)
        for name in part_specs:
            if name in specs:
                raise LlameroError(f"tensor `{name}` is also in {places[name].path.name}", where=part)
        specs |= part_specs
        places |= part_places
    if rest or "split.count" in values:
        _check_part(values, 0, len(rest) + 1, first)
        announced = values.get("split.tensors.count", Value("int32", len(specs))).value
        if announced != len(specs):
            raise LlameroError(f"{announced} tensors are announced, the files have {len(specs)}", where=first)
    return Header((first, *rest), values, specs, places)


def find(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for; `None` if it stands for something else.

    A file is one by its first bytes or its suffix, a directory if it holds one model in GGUF and no other weights. Of a
    split model it is the first part.

    Raises:
        LlameroError: If a directory holds several, so that one of them must be named.
    """
    if path.is_file():
        with path.open("rb") as file:
            found = [path] if path.suffix == SUFFIX or file.read(len(MAGIC)) == MAGIC else []
    elif any(True for pattern in OTHER_WEIGHTS for _ in path.glob(pattern)):
        found = []
    else:
        found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    models = sorted({_first_part(each) for each in found})
    if len(models) > 1:  # an importance matrix or a part for images is no model
        models = [each for each in models if read_header(each).metadata.get("general.type", "model") == "model"]
    if len(models) > 1:
        raise LlameroError(
            f"holds {len(models)} models in GGUF: {', '.join(each.name for each in models)}",
            where=path,
            fix="name one of them",
        )
    return models[0] if models else None


def _first_part(path: Path) -> Path:
    found = SPLIT_NAME.fullmatch(path.name)
    return path if found is None else path.with_name(split_name(found["stem"], 0, int(found["count"])))


def _parts(path: Path) -> list[Path]:
    """Return all files of the model that a file belongs to."""
    if not path.is_file():
        raise LlameroError("file is missing", where=path)
    found = SPLIT_NAME.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    paths = [path.with_name(split_name(found["stem"], part, count)) for part in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise LlameroError(f"parts of the model are missing: {', '.join(missing)}", where=path, fix="download them")
    return paths


def split_name(stem: str, part: int, count: int) -> str:
    """Return the name of a file of a split model.

    Args:
        stem: First part of the name.
        part: Number of the file, from 0.
        count: Files there are.
    """
    return f"{stem}-{part + 1:05}-of-{count:05}.gguf"


def _check_part(values: Mapping[str, Value], number: int, count: int, path: Path) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        found = values[key].value if key in values else None
        if found != expected:
            raise LlameroError(
                f"`{key}` is {found}, the file's name makes it {expected}",
                where=path,
                fix="give the files the names they had when they were written",
            )


def _read_file(path: Path) -> tuple[dict[str, Value], dict[str, TensorSpec], dict[str, Place]]:
    size = path.stat().st_size
    if size < len(MAGIC) + 4:
        raise LlameroError(f"not a GGUF file ({size} bytes)", where=path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        _check_version(cursor)
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        values: dict[str, Value] = {}
        for _ in range(keys):
            key = cursor.text()
            if key in values:
                raise LlameroError(f"key `{key}` stands there twice", where=path)
            values[key] = cursor.value(key)
        return values, *_read_tensors(cursor, tensors, _alignment(values, path), size)


def _check_version(cursor: "_Cursor") -> None:
    magic, version = cursor.take(4), cursor.number("I")
    if magic != MAGIC:
        raise LlameroError(
            f"not a GGUF file: it begins with {magic!r}",
            where=cursor.path,
            fix="older GGML files (`ggml`, `ggjt`) must be converted by the llama.cpp of their time",
        )
    if version in READ_VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in READ_VERSIONS:
        raise LlameroError("a big-endian GGUF file", where=cursor.path, fix="convert it to little-endian bytes")
    raise LlameroError(
        f"GGUF version {version} is not read here",
        where=cursor.path,
        fix=f"versions {' and '.join(map(str, READ_VERSIONS))} are; write the file anew with a current llama.cpp",
    )


def _alignment(values: Mapping[str, Value], path: Path) -> int:
    alignment = values.get("general.alignment", Value("uint32", ALIGNMENT)).value
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise LlameroError(f"`general.alignment` is {alignment}, must be a power of 2 from 8 up", where=path)
    return alignment


def _read_tensors(
    cursor: "_Cursor", count: int, alignment: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, Place]]:
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name = cursor.text()
        if name in specs:
            raise LlameroError(f"tensor `{name}` stands there twice", where=cursor.path)
        specs[name], offsets[name] = cursor.spec(name), cursor.number("Q")
        if offsets[name] % alignment:
            problem = f"tensor `{name}` begins at byte {offsets[name]}, no multiple of {alignment}"
            raise LlameroError(problem, where=cursor.path)
    start = padded(cursor.at, alignment)
    for name, spec in specs.items():
        end = start + offsets[name] + spec.nbytes
        if end > size:
            raise LlameroError(
                f"tensor `{name}` would end at byte {end}, the file has {size}",
                where=cursor.path,
                fix="the file is truncated or damaged: download it again",
            )
    return specs, {name: Place(cursor.path, start + offset) for name, offset in offsets.items()}


def padded(size: int, alignment: int) -> int:
    """Return the next multiple of `alignment`."""
    return -(-size // alignment) * alignment


class _Cursor:
    """Takes the header of a file apart, from its beginning on."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self.path = data, path
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self._need(count)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, letter: str) -> Any:
        """Return the next number, of a type of `struct`."""
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def text(self) -> str:
        """Return the next text; bytes that are no UTF-8 are kept as lone surrogates."""
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, key: str) -> Value:
        """Return the next value of the metadata."""
        number = self.number("I")
        if number != ARRAY:
            return Value(self._kind(number, key), self._scalar(number))
        number, count = self.number("I"), self.number("Q")
        kind = self._kind(number, key)
        if number == STRING:
            self._need(8 * count)
            return Value(kind, [self.text() for _ in range(count)])
        letter = SCALARS[kind][1]
        data = self.take(count * struct.calcsize(f"<{letter}"))
        return Value(kind, list(struct.unpack(f"<{count}{letter}", data)))

    def spec(self, name: str) -> TensorSpec:
        """Return shape and type of the tensor whose record is next."""
        dims = self.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise LlameroError(f"tensor `{name}` has {dims} dimensions, 1 to {MAX_DIMS} are possible", where=self.path)
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        number = self.number("I")
        if number not in _BY_NUMBER:
            raise LlameroError(
                f"tensor `{name}` is of type {number}, which is not known",
                where=self.path,
                fix=f"known are: {', '.join(TYPES)}",
            )
        kind = _BY_NUMBER[number]
        if shape[-1] % kind.block:
            problem = f"rows of {shape[-1]} weights do not divide into blocks of {kind.block} ({kind.name})"
            raise LlameroError(f"tensor `{name}`: {problem}", where=self.path)
        return TensorSpec(shape, kind)

    def _kind(self, number: int, key: str) -> str:
        if number not in _VALUES:
            raise LlameroError(f"key `{key}` has a value of type {number}, which is not known", where=self.path)
        return _VALUES[number]

    def _scalar(self, number: int) -> bool | int | float | str:
        return self.text() if number == STRING else self.number(SCALARS[_VALUES[number]][1])

    def _need(self, count: int) -> None:
        if self.at + count > len(self._data):
            raise LlameroError(
                f"truncated GGUF file ({len(self._data)} bytes)", where=self.path, fix="download it again"
            )
