"""llama.cpp's importance matrices: the mean square of every input channel of every linear layer.

Two forms: since 2025 a GGUF file of sums and counts, before that a list of entries (name, calls, values summed over the
calls). Names are those of GGUF tensors.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.gguf import MAGIC, TYPES, Gguf, TensorSpec, Value, open_gguf
from llamero.checkpoint.gguf_write import GgufWriter
from llamero.core import files
from llamero.core.errors import LlameroError

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Importance of the input channels of linear layers."""

    mean_square: Mapping[str, Float[Tensor, " d"]]
    """By the names of GGUF tensors, float32."""
    chunks: int
    """Sequences that were looked at."""
    chunk_tokens: int
    """Tokens of a sequence; 0 where the file does not say."""
    datasets: tuple[str, ...] = ()
    """What the text was called; often a path on the machine of whoever looked."""


def read_imatrix(path: Path) -> Imatrix:
    """Return the importances of a file in either form.

    Raises:
        LlameroError: The file is none, is damaged, its values are no mean squares, or it is of a model with experts.
    """
    if not path.is_file():
        raise LlameroError("file is missing", where=path)
    with path.open("rb") as file:
        new = file.read(len(MAGIC)) == MAGIC
    found = _read_gguf(open_gguf(path), path) if new else _read_entries(path)
    for name, values in found.mean_square.items():
        if not bool(values.isfinite().all()) or bool((values < 0).any()):
            raise LlameroError(f"the importance of `{name}` is not finite, or negative", where=path)
    return found


def _read_gguf(file: Gguf, path: Path) -> Imatrix:
    metadata = file.metadata
    if metadata.get("general.type") != "imatrix":
        problem = f"a GGUF file of the type `{metadata.get('general.type')}`, not an importance matrix"
        raise LlameroError(problem, where=path, fix="give a file that llama-imatrix wrote")
    found = {}
    for name in file:
        if not name.endswith(SUMS):
            continue
        owner = name.removesuffix(SUMS)
        if owner + COUNTS not in file:
            raise LlameroError(f"`{owner}` has sums and no counts", where=path)
        sums, counts = file[name].float(), file[owner + COUNTS].float()
        if counts.numel() != 1:
            raise LlameroError(f"`{owner}` has {counts.numel()} experts; a Llama has none", where=path)
        if not float(counts.sum()) > 0:
            raise LlameroError(f"`{owner}` was never seen: its count is {float(counts.sum()):g}", where=path)
        found[owner] = (sums.flatten() / counts.flatten()).clone()
    if not found:
        raise LlameroError("holds no importances", where=path)
    chunks, tokens = metadata.get("imatrix.chunk_count", 0), metadata.get("imatrix.chunk_size", 0)
    return Imatrix(found, chunks, tokens, tuple(metadata.get("imatrix.datasets", ())))


def _read_entries(path: Path) -> Imatrix:
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise LlameroError(f"not a whole importance matrix ({len(data)} bytes)", where=path, fix="make it again")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries = number()
    if entries < 1:
        raise LlameroError(f"not an importance matrix: {entries} entries", where=path)
    found = {}
    for _ in range(entries):
        name = take(number()).decode("utf-8", "replace")
        calls, width = number(), number()
        values = np.frombuffer(take(4 * width), dtype="<f4") / np.float32(calls if calls > 0 else 1)
        found[name] = torch.from_numpy(values.astype(np.float32))
    chunks = number() if at < len(data) else 0
    dataset = take(number()).decode("utf-8", "replace") if at < len(data) else ""
    return Imatrix(found, chunks, 0, (dataset,) if dataset else ())


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write importances, as a GGUF file if the path ends so and else as the entries that every llama.cpp reads."""
    if path.suffix == ".gguf":
        _write_gguf(path, imatrix)
    else:
        files.write_atomically(path, _entries(imatrix))
        path.chmod(0o644)


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    values = {
        "general.type": Value("string", "imatrix"),
        "imatrix.datasets": Value("string", list(imatrix.datasets)),
        "imatrix.chunk_count": Value("uint32", imatrix.chunks),
        "imatrix.chunk_size": Value("uint32", imatrix.chunk_tokens),
    }
    tokens = float(imatrix.chunks * imatrix.chunk_tokens or 1)
    tensors: dict[str, Tensor] = {}
    for name, mean in sorted(imatrix.mean_square.items()):
        tensors[name + SUMS] = (mean.float() * tokens)[None]
        tensors[name + COUNTS] = torch.tensor([[tokens]])
    specs = {name: TensorSpec(tuple(tensor.shape), TYPES["F32"]) for name, tensor in tensors.items()}
    with GgufWriter(path.parent, path.stem, values, specs) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def _entries(imatrix: Imatrix) -> bytes:
    calls = imatrix.chunks or 1
    parts = [struct.pack("<i", len(imatrix.mean_square))]
    for name, mean in imatrix.mean_square.items():
        values = (mean.float() * calls).cpu().numpy().astype("<f4")
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, len(values)), values.tobytes()]
    dataset = ", ".join(imatrix.datasets).encode()
    return b"".join([*parts, struct.pack("<ii", imatrix.chunks, len(dataset)), dataset])
