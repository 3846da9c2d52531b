"""Megatron's checkpoint directories: `mp_rank_TT[_PPP]/model_optim_rng.pt` for each tensor and pipeline rank.

The layout is that of epfLLM/Megatron-LLM (megatron/checkpointing.py, tools/checkpoint_util.py), with which the
published models were trained. Here tensors are whole and layers are counted over the whole model.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamero.checkpoint.hf import Spec, Tensors
from llamero.checkpoint.pickles import PickleFile, PickleWriter, leaves
from llamero.core.errors import LlameroError

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "encoder.final_layernorm.weight"
HEAD = "lm_head"
TIED_HEAD = "word_embeddings_for_head.weight"
"""The copy of a tied embedding on the last of several pipeline ranks."""

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_NOT_WEIGHTS = {"args", "checkpoint_version", "iteration", "rng_state"}
_TRAINING_STATE = {"optimizer", "opt_param_scheduler", "lr_scheduler"}


class Split(NamedTuple):
    """How tensor ranks share a tensor."""

    axis: int | None
    """Dimension, None where each rank has all."""
    parts: int = 1
    """Tensors that lie in it one after the other, each of which is shared by itself."""


SPLITS: dict[str, Split] = {
    EMBEDDING: Split(0),
    HEAD: Split(0),
    TIED_HEAD: Split(0),
    FINAL_NORM: Split(None),
    "input_layernorm.weight": Split(None),
    "post_attention_layernorm.weight": Split(None),
    "self_attention.query_key_value.weight": Split(0),
    "self_attention.query_key_value.bias": Split(0),
    "self_attention.dense.weight": Split(1),
    "self_attention.dense.bias": Split(None),
    "mlp.dense_h_to_4h.weight": Split(0, parts=2),
    "mlp.dense_h_to_4h.bias": Split(0, parts=2),
    "mlp.dense_4h_to_h.weight": Split(1),
    "mlp.dense_4h_to_h.bias": Split(None),
}
"""Every tensor there is; those of a layer without its number."""


class Layout(NamedTuple):
    """Over how many ranks a model is spread."""

    tensor: int
    pipeline: int


@dataclass(frozen=True)
class MegatronDirectory:
    """What is in a checkpoint; tensors are put together when they are asked for."""

    args: Mapping[str, Any]
    tensors: Tensors
    layout: Layout
    passed_over: tuple[str, ...]
    """What the files hold beside weights."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: one place in the file of each tensor rank."""

    files: tuple[PickleFile, ...]
    place: tuple[str, ...]
    split: Split


def is_megatron(directory: Path) -> bool:
    """Return whether a directory holds a Megatron checkpoint."""
    return (directory / TRACKER).exists() or any(directory.glob("mp_rank_*"))


def open_megatron(directory: Path) -> MegatronDirectory:
    """Return the content of a checkpoint, of its last iteration if there are several."""
    grid = _grid(_iteration(directory))
    stages = [tuple(PickleFile(path) for path in stage) for stage in grid]
    first = stages[0][0]
    layout = Layout(len(stages[0]), len(stages))
    args = _args(first, layout)
    places: dict[str, _Place] = {}
    specs: dict[str, Spec] = {}
    layers = 0
    for stage in stages:
        found = _stage(stage, layers)
        for name, (place, spec) in found.items():
            if name in places:
                raise LlameroError(f"tensor `{name}` is on two pipeline ranks", where=stage[0].path)
            places[name], specs[name] = place, spec
        layers += len({match[1] for name in found if (match := _LAYER.fullmatch(name))})
    files = {name: place.files[0].path for name, place in places.items()}
    passed_over = sorted({str(key) for stage in stages for key in stage[0].content} & _TRAINING_STATE)
    tensors = Tensors(directory, files, specs, partial(_read, places))
    return MegatronDirectory(args, tensors, layout, tuple(passed_over))


def _iteration(directory: Path) -> Path:
    """Return the directory of the iteration that the tracker names."""
    tracker = directory / TRACKER
    if not tracker.exists():
        return directory
    said = tracker.read_text(encoding="utf-8").strip()
    if said != "release" and not said.isdecimal():
        raise LlameroError(f"neither `release` nor a number: {said!r}", where=tracker)
    found = directory / (said if said == "release" else f"iter_{int(said):07}")
    if not found.is_dir():
        raise LlameroError(f"names `{found.name}`, which is not there", where=tracker)
    return found


def _grid(directory: Path) -> list[list[Path]]:
    """Return the files, by pipeline rank and then by tensor rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in directory.glob("mp_rank_*"):
        match = _RANK.fullmatch(path.name)
        if not match:
            raise LlameroError("not the directory of a rank", where=path)
        found[int(match[2] or 0), int(match[1])] = path
    if not found:
        raise LlameroError("no mp_rank_* directory here", where=directory)
    stages, tensor = (max(rank[axis] for rank in found) + 1 for axis in (0, 1))
    missing = [(p, t) for p in range(stages) for t in range(tensor) if (p, t) not in found]
    if missing:
        names = ", ".join(_rank_name(t, p, stages) for p, t in missing)
        raise LlameroError(f"ranks are missing: {names}", where=directory, fix="fetch them again")
    return [[_rank_file(found[p, t]) for t in range(tensor)] for p in range(stages)]


def _rank_name(tensor: int, pipeline: int, stages: int) -> str:
    return f"mp_rank_{tensor:02}" + (f"_{pipeline:03}" if stages > 1 else "")


def _rank_file(directory: Path) -> Path:
    alone = directory / "model_rng.pt"  # its name where each data-parallel rank saves its share of the optimizer
    return alone if alone.exists() else directory / "model_optim_rng.pt"


def _args(file: PickleFile, layout: Layout) -> dict[str, Any]:
    content = file.content
    if not isinstance(content, dict) or "args" not in content or not isinstance(content.get("model"), dict):
        problem = "it has a virtual pipeline" if isinstance(content, dict) and "model0" in content else "no `args`"
        raise LlameroError(f"not a checkpoint that can be read: {problem} or no `model` in it", where=file.path)
    args = content["args"]
    args = dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args)
    version = content.get("checkpoint_version", 0)
    if version < 2:
        raise LlameroError(
            f"checkpoint_version {version}: before 2.0 the rows of query_key_value had another order", where=file.path
        )
    for key, found in zip(("tensor_model_parallel_size", "pipeline_model_parallel_size"), layout, strict=True):
        if args.get(key, found) != found:
            raise LlameroError(
                f"`{key}` is {args[key]}, but there are files for {found}",
                where=file.path,
                fix="fetch the missing ones",
            )
    return args


def _stage(files: tuple[PickleFile, ...], layers_before: int) -> dict[str, tuple[_Place, Spec]]:
    """Return the tensors of a pipeline rank."""
    shares = [_shares(file, layers_before) for file in files]
    found: dict[str, tuple[_Place, Spec]] = {}
    for name in dict.fromkeys(name for share in shares for name in share):
        specs = [share[name][1] if name in share else None for share in shares]
        odd = next((n for n, spec in enumerate(specs) if spec != specs[0]), None)
        if odd is not None or specs[0] is None:
            raise LlameroError(
                f"tensor `{name}` is {_say(specs[odd or 0])} here, in {files[0].path.parent.name} {_say(specs[0])}",
                where=files[odd or 0].path,
                fix="take all ranks from one and the same checkpoint",
            )
        split = split_of(name)
        shape = tuple(size * len(files) if dim == split.axis else size for dim, size in enumerate(specs[0].shape))
        place = _Place(files, shares[0][name][0], split)
        found[name] = place, Spec(shape, specs[0].dtype)
    return found


def _say(spec: Spec | None) -> str:
    return "not there" if spec is None else f"{spec.shape} {str(spec.dtype).removeprefix('torch.')}"


def _shares(file: PickleFile, layers_before: int) -> dict[str, tuple[tuple[str, ...], Spec]]:
    """Return place and shape of every tensor of a file, by its name in the whole model."""
    content = file.content
    unknown = set(content) - _NOT_WEIGHTS - _TRAINING_STATE - {"model"}
    if unknown:
        raise LlameroError(f"unknown content: {', '.join(sorted(map(str, unknown)))}", where=file.path)
    found: dict[str, tuple[tuple[str, ...], Spec]] = {}
    for place, value in leaves(content["model"]):
        name = _name(place, layers_before)
        if not isinstance(value, Tensor) or not is_known(name):
            raise LlameroError(f"`{'.'.join(place)}` is not a Llama's", where=file.path)
        found[name] = ("model", *place), Spec(tuple(value.shape), value.dtype)
    return found


def _name(place: tuple[str, ...], layers_before: int) -> str:
    """Return a tensor's name in the whole model; converters and trainers differ in what they call the layers."""
    name = ".".join(place).removeprefix("language_model.").replace(".attention.", ".self_attention.")
    if name.startswith("transformer."):
        name = "encoder." + name.removeprefix("transformer.")
    match = _LAYER.fullmatch(name)
    return f"encoder.layers.{layers_before + int(match[1])}.{match[2]}" if match else name


def _kind(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[2] if match else name


def is_known(name: str) -> bool:
    """Return whether a Llama has a tensor of this name."""
    return _kind(name) in SPLITS


def split_of(name: str) -> Split:
    """Return how tensor ranks share a tensor."""
    return SPLITS[_kind(name)]


def _read(places: Mapping[str, _Place], path: Path, name: str) -> Tensor:
    place = places[name]
    pieces = [file.read(place.place) for file in place.files]
    if place.split.axis is not None:
        return join(pieces, place.split)
    for file, piece in zip(place.files, pieces, strict=True):
        if not torch.equal(piece.nan_to_num(), pieces[0].nan_to_num()):
            raise LlameroError(
                f"tensor `{name}` differs from that in {path.parent.name}; all tensor ranks must have the same",
                where=file.path,
                fix="take all ranks from one and the same checkpoint",
            )
    return pieces[0]


def join(pieces: list[Tensor], split: Split) -> Tensor:
    """Return a whole tensor from the shares of the ranks."""
    if len(pieces) == 1:
        return pieces[0]
    assert split.axis is not None
    shares = [piece.chunk(split.parts, dim=split.axis) for piece in pieces]
    return torch.cat([share[part] for part in range(split.parts) for share in shares], dim=split.axis)


def share(tensor: Tensor, split: Split, *, rank: int, ranks: int, size: int) -> Tensor:
    """Return what a rank has of a tensor.

    Args:
        tensor: All of it.
        split: How it is shared.
        rank: Which one.
        ranks: How many.
        size: Size that the tensor shall have along the shared dimension; its last row is repeated up to there.
    """
    if split.axis is None:
        return tensor
    if split.parts > 1:
        return torch.cat([part.chunk(ranks, split.axis)[rank] for part in tensor.chunk(split.parts, split.axis)])
    step = size // ranks
    start, stop = rank * step, (rank + 1) * step
    there = tensor.shape[split.axis]
    if stop <= there:
        return tensor.narrow(split.axis, start, step)
    last = tensor[-1:].expand(stop - max(start, there), *tensor.shape[1:])
    return torch.cat([tensor[start:], last])


def group_heads(q: Tensor, k: Tensor, v: Tensor, *, kv_heads: int) -> Tensor:
    """Return query_key_value: for each key/value head its query heads, then itself, then its value head.

    Args:
        q: (heads · d, …), rows in Meta's order, as those of `k`.
        k: (kv_heads · d, …).
        v: (kv_heads · d, …).
        kv_heads: How many.
    """
    groups = [rows.unflatten(0, (kv_heads, -1)) for rows in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def ungroup_heads(qkv: Tensor, *, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values; undoes `group_heads`."""
    groups = qkv.unflatten(0, (kv_heads, -1))
    q, k, v = groups.split([groups.shape[1] - 2 * head_dim, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def write_megatron(
    directory: Path,
    args: Mapping[str, Any],
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    layout: Layout,
) -> None:
    """Write a release checkpoint; one whole tensor is held at a time.

    Args:
        directory: Where to; it gets `release/` and the file that names it.
        args: Arguments of the model, saved with every rank.
        specs: Shape (vocabulary padded) and dtype of every whole tensor, in the order in which `tensors` brings them.
        tensors: The tensors; rows that the vocabulary lacks are copies of its last one.
        layout: Over how many ranks; must divide what is shared.
    """
    layers = len({match[1] for name in specs if (match := _LAYER.fullmatch(name))})
    per_stage = layers // layout.pipeline
    homes = {name: _home(name, per_stage, layout) for name in specs}
    with ExitStack() as stack:
        writers = {
            (rank, stage): stack.enter_context(
                PickleWriter(_new_file(directory, rank, stage, layout), _content(args, specs, homes, stage, layout))
            )
            for rank in range(layout.tensor)
            for stage in range(layout.pipeline)
        }
        for name, tensor in tensors:
            stage, place = homes[name]
            split = split_of(name)
            size = 0 if split.axis is None else specs[name].shape[split.axis]
            for rank in range(layout.tensor):
                piece = share(tensor, split, rank=rank, ranks=layout.tensor, size=size)
                writers[rank, stage].add(place, piece)
    (directory / TRACKER).write_text("release", encoding="utf-8")


def _new_file(directory: Path, rank: int, stage: int, layout: Layout) -> Path:
    path = directory / "release" / _rank_name(rank, stage, layout.pipeline) / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    return path


def _home(name: str, per_stage: int, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """Return the pipeline rank of a tensor and its place in the files of that rank."""
    model = "model", "language_model"
    match = _LAYER.fullmatch(name)
    if match:
        stage, local = divmod(int(match[1]), per_stage)
        return stage, (*model, "encoder", f"layers.{local}.{match[2]}")
    last = layout.pipeline - 1
    return {
        EMBEDDING: (0, (*model, "embedding", "word_embeddings", "weight")),
        FINAL_NORM: (last, (*model, "encoder", "final_layernorm.weight")),
        HEAD: (last, (*model, HEAD)),
        TIED_HEAD: (last, ("model", "word_embeddings_for_head", "weight")),
    }[name]


def _content(
    args: Mapping[str, Any],
    specs: Mapping[str, Spec],
    homes: Mapping[str, tuple[int, tuple[str, ...]]],
    stage: int,
    layout: Layout,
) -> dict[str, Any]:
    """Return the tree that a rank's file holds."""
    content: dict[str, Any] = {"iteration": "release", "checkpoint_version": 3.0, "args": argparse.Namespace(**args)}
    for place, spec in _here(specs, homes, stage, layout):
        *path, leaf = place
        branch = content
        for key in path:
            branch = branch.setdefault(key, {})
        branch[leaf] = spec
    return content


def _here(
    specs: Mapping[str, Spec], homes: Mapping[str, tuple[int, tuple[str, ...]]], stage: int, layout: Layout
) -> Iterator[tuple[tuple[str, ...], Spec]]:
    """Yield place and shape of a rank's share of every tensor on a pipeline rank."""
    for name, spec in specs.items():
        home, place = homes[name]
        if home == stage:
            axis = split_of(name).axis
            shape = tuple(size // layout.tensor if dim == axis else size for dim, size in enumerate(spec.shape))
            yield place, Spec(shape, spec.dtype)
