"""Meta's `original/` directories: params.json and consolidated.NN.pth, one for each model-parallel rank.

Every rank holds its share of each tensor under the same name (meta-llama/llama, llama/model.py; meta-llama/llama3).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamero.checkpoint.hf import Spec, Tensors, read_json
from llamero.checkpoint.pickles import PickleFile, PickleWriter, leaves
from llamero.core.errors import LlameroError

AXES: dict[str, int | None] = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "norm": None,
    "attention_norm": None,
    "ffn_norm": None,
}
"""The dimension that the ranks share, None where each has all. `tok_embeddings` is shared over dimension 1 by Llama 1
and 2, over dimension 0 by Llama 3: its shapes tell."""

COMPUTED = "rope.freqs"
"""Frequencies that older files carry and every loader computes."""


@dataclass(frozen=True)
class MetaDirectory:
    """What is in a directory; tensors have Meta's names and are put together when they are asked for."""

    params: Mapping[str, Any]
    tensors: Tensors
    shards: int
    passed_over: tuple[str, ...]
    """Names of tensors that every loader computes."""


def is_meta(directory: Path) -> bool:
    """Return whether a directory holds weights in Meta's layout."""
    return any(directory.glob("consolidated.*.pth"))


def shard_path(directory: Path, number: int) -> Path:
    """Return the file of a rank."""
    return directory / f"consolidated.{number:02}.pth"


def open_meta(directory: Path) -> MetaDirectory:
    """Return the content of a directory, or say which shard is missing or does not fit the others."""
    params = read_json(directory / "params.json")
    files = [PickleFile(shard_path(directory, number)) for number in range(_count(directory))]
    specs = [_specs(file) for file in files]
    for file, found in zip(files, specs, strict=True):
        _refuse_other(file.path, found, files[0].path, specs[0])
    passed_over = tuple(name for name in specs[0] if name == COMPUTED)
    kept = {name: spec for name, spec in specs[0].items() if name != COMPUTED}
    _refuse_wrong_count(kept, len(files), params, directory)
    axes = {name: _axis(name, spec, len(files), params, directory) for name, spec in kept.items()}
    whole = {name: Spec(_times(spec.shape, axes[name], len(files)), spec.dtype) for name, spec in kept.items()}
    read = partial(_read, files, axes)
    paths = dict.fromkeys(whole, files[0].path)
    return MetaDirectory(params, Tensors(directory, paths, whole, read), len(files), passed_over)


def _count(directory: Path) -> int:
    found = {path.name for path in directory.glob("consolidated.*.pth")}
    missing = [name for n in range(len(found)) if (name := shard_path(directory, n).name) not in found]
    if missing or not found:
        raise LlameroError(
            f"shards are missing: {', '.join(missing) or 'all of consolidated.*.pth'}",
            where=directory,
            fix="fetch them again",
        )
    return len(found)


def _specs(file: PickleFile) -> dict[str, Spec]:
    found = dict(leaves(file.content))
    odd = [".".join(place) for place, value in found.items() if len(place) != 1 or not isinstance(value, Tensor)]
    if odd:
        raise LlameroError(f"the file holds more than named tensors: {', '.join(odd)}", where=file.path)
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for (name,), tensor in found.items()}


def _refuse_other(path: Path, found: Mapping[str, Spec], first: Path, expected: Mapping[str, Spec]) -> None:
    """Refuse a shard that does not hold what the first one does."""
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise LlameroError(
                f"tensor `{name}` is {_say(found.get(name))} here, in {first.name} {_say(expected.get(name))}",
                where=path,
                fix="take all shards from one and the same model",
            )


def _say(spec: Spec | None) -> str:
    return "not there" if spec is None else f"{spec.shape} {str(spec.dtype).removeprefix('torch.')}"


def _refuse_wrong_count(specs: Mapping[str, Spec], shards: int, params: Mapping[str, Any], directory: Path) -> None:
    """Refuse a directory whose last shards are missing: each has `dim / shards` columns of wo."""
    first = specs.get("layers.0.attention.wo.weight")
    if first is None or len(first.shape) != 2:
        raise LlameroError("tensor `layers.0.attention.wo.weight` is missing", where=shard_path(directory, 0))
    if first.shape[1] * shards != params.get("dim"):
        raise LlameroError(
            f"{shards} shards have {first.shape[1] * shards} columns of wo together, `dim` is {params.get('dim')}",
            where=directory,
            fix="fetch the missing shards, or the params.json of this model",
        )


def _axis(name: str, spec: Spec, shards: int, params: Mapping[str, Any], directory: Path) -> int | None:
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part == "tok_embeddings":
        return 1 if spec.shape[1] * shards == params.get("dim") else 0
    if part not in AXES or not name.endswith(".weight"):
        raise LlameroError(f"tensor `{name}` is not a Llama's", where=shard_path(directory, 0))
    return AXES[part]


def _times(shape: tuple[int, ...], axis: int | None, count: int) -> tuple[int, ...]:
    return tuple(size * count if dim == axis else size for dim, size in enumerate(shape))


def _read(files: list[PickleFile], axes: Mapping[str, int | None], path: Path, name: str) -> Tensor:
    pieces = [file.read((name,)) for file in files]
    axis = axes[name]
    if axis is not None:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
    for file, piece in zip(files, pieces, strict=True):
        if not torch.equal(piece.nan_to_num(), pieces[0].nan_to_num()):
            raise LlameroError(
                f"tensor `{name}` differs from that in {path.name}; all shards must have the same",
                where=file.path,
                fix="take all shards from one and the same model",
            )
    return pieces[0]


def write_meta(
    directory: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shards: int,
    embedding_axis: int,
) -> None:
    """Write the shards of a model; one whole tensor is held at a time.

    Args:
        directory: Where to.
        specs: Shape and dtype of every whole tensor, by Meta's name, in the order in which `tensors` brings them.
        tensors: The tensors.
        shards: How many; must divide what is shared.
        embedding_axis: Dimension over which the embedding is shared: 1 as in Llama 1 and 2, 0 as in Llama 3.
    """
    axes = {**AXES, "tok_embeddings": embedding_axis}
    axis_of = {name: axes[name.removesuffix(".weight").rpartition(".")[2]] for name in specs}
    with ExitStack() as stack:
        writers: list[PickleWriter] = []
        for number in range(shards):
            content = {
                name: Spec(_share(spec.shape, axis_of[name], shards), spec.dtype) for name, spec in specs.items()
            }
            writers.append(stack.enter_context(PickleWriter(shard_path(directory, number), content)))
        for name, tensor in tensors:
            axis = axis_of[name]
            pieces = [tensor] * shards if axis is None else tensor.chunk(shards, dim=axis)
            for writer, piece in zip(writers, pieces, strict=True):
                writer.add((name,), piece)


def _share(shape: tuple[int, ...], axis: int | None, count: int) -> tuple[int, ...]:
    return tuple(size // count if dim == axis else size for dim, size in enumerate(shape))


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a query or key projection in Meta's order.

    Hugging Face turns channel i with channel i + d/2, Meta with its neighbour.

    Args:
        rows: (heads · d, …), a weight or a bias.
        head_dim: Channels of a head, d.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a query or key projection in Hugging Face's order; undoes `pairs_from_halves`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
