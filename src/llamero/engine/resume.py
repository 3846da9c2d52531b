"""Checkpoints to resume from: weights, optimizer and step, whole or not there.

A checkpoint is a directory `step-00000200` in the format of `torch.distributed.checkpoint`: every process writes what
it holds, and any other layout reads from it what it needs. It is written beside and renamed (engine/saving.py). Data
order and learning rate are functions of the step, so a resumed run needs nothing else to end in the same bits.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.model.weights import finite
from llamero.parallel.world import World, local

STATE = "state.json"
_NAME = re.compile(r"step-\d{8,}")
_BEFORE = "remove this directory: the run goes on from the checkpoint before it, or from the start"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Parameters = Mapping[str, nn.Parameter]


def load(
    directory: Path, *, weights: Parameters, optimizer: torch.optim.Optimizer, world: World, step: int | None = None
) -> int:
    """Fill weights and optimizer from the last checkpoint and return its step; 0 where there is none.

    Args:
        directory: Of the checkpoints.
        weights: This process's parameters by name.
        optimizer: Their AdamW.
        world: All processes, which all take part.
        step: Load the checkpoint after this step instead.

    Raises:
        LlameroError: If a file of it is damaged, its numbers are not finite, or it is of another model.
    """
    last = world.told(_chosen(directory, step) if world.speaks else None)
    if last is None:
        return 0
    about = _about(last)
    _refuse_damage(last, about["sha256"], world)
    fresh: dict[nn.Parameter, dict[str, Any]] = {
        parameter: {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        }
        for parameter in weights.values()
        if parameter.requires_grad
    }
    state = state_of(weights, lambda parameter, key: fresh[parameter][key])
    reader = FileSystemReader(last)
    _refuse_other_model(last, reader, state, world)
    with torch.no_grad():
        _with_plain_errors(lambda: load_state(state, storage_reader=reader, no_dist=world.size == 1))
    _refuse_not_finite(last, state, world)
    for parameter, moments in fresh.items():
        optimizer.state[parameter] = moments
    return about["step"]


def remove(directory: Path) -> None:
    """Remove all checkpoints; a kill half-way leaves nothing behind that looks like one."""
    aside = directory.with_name(directory.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
        shutil.rmtree(aside)


def state_of(weights: Parameters, moment: Callable[[nn.Parameter, str], Tensor]) -> dict[str, Any]:
    """Return all tensors of a checkpoint under their names in it; what is frozen is where the training started."""
    trained = {name: parameter for name, parameter in weights.items() if parameter.requires_grad}
    state: dict[str, Any] = {name: parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        state |= {f"optimizer.{name}.{key}": moment(parameter, key) for key in MOMENTS}
    return state


def _refuse_damage(checkpoint: Path, sums: dict[str, str], world: World) -> None:
    """Refuse a checkpoint with a file that is missing or is not what was written; processes share the reading."""
    damaged = [
        name
        for name, expected in list(sums.items())[world.rank :: world.size]
        if not (checkpoint / name).exists() or files.sha256(checkpoint / name) != expected
    ]
    said = [name for part in world.gather(damaged) for name in part]
    if said:
        raise LlameroError(
            f"{', '.join(said)}: not what was written, or missing",
            where=checkpoint,
            fix=_BEFORE,
        )


def _with_plain_errors(work: Callable[[], object]) -> None:
    """Do something with a checkpoint; what went wrong in it is raised as what it was, and no warning that we are alone.

    `CheckpointException` is no `Exception`, and hides a full disk in a list.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            work()
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def finished(directory: Path) -> list[Path]:
    """Return the finished checkpoints of a stage, oldest first."""
    return sorted(path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))


def loss_of(checkpoint: Path) -> float | None:
    """Return the validation loss of a finished checkpoint, if it was measured."""
    return _about(checkpoint).get("validation_loss")


def drop(checkpoint: Path) -> None:
    """Remove a finished checkpoint; a kill half-way leaves nothing behind that looks like one."""
    aside = checkpoint.with_name(checkpoint.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _chosen(directory: Path, step: int | None) -> Path | None:
    for old in directory.glob("step-*.removed"):  # of a removal that was cut off
        shutil.rmtree(old)
    there = finished(directory)
    if step is not None:
        there = [path for path in there if path.name == f"step-{step:08}"]
    return there[-1] if there else None


def _about(checkpoint: Path) -> dict[str, Any]:
    """Return what is said of a checkpoint beside it."""
    try:
        about = hf.read_json(checkpoint / STATE)
        step, _ = int(about["step"]), about["sha256"].items()
    except (LlameroError, KeyError, AttributeError, TypeError, ValueError) as error:
        said = error.problem if isinstance(error, LlameroError) else "it does not say what a checkpoint's does"
        raise LlameroError(f"not a whole checkpoint: {said}", where=checkpoint / STATE, fix=_BEFORE) from error
    if checkpoint.name != f"step-{step:08}":
        raise LlameroError(f"the checkpoint says step {step}", where=checkpoint, fix=_BEFORE)
    return about


def _refuse_other_model(checkpoint: Path, reader: FileSystemReader, state: dict[str, Any], world: World) -> None:
    stored = reader.read_metadata().state_dict_metadata
    found = {name: tuple(about.size) for name, about in stored.items() if isinstance(about, TensorStorageMetadata)}
    wanted = {name: tuple(size) for part in world.gather(_shapes(state)) for name, size in part.items()}
    if wanted == found:
        return
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    raise LlameroError(
        f"the checkpoint is of a model of another shape: `{odd[0]}` is {_shape(found.get(odd[0]))} in it and "
        f"{_shape(wanted.get(odd[0]))} in the model ({len(odd)} of {len(wanted)} tensors differ)",
        where=checkpoint,
        fix="go on with the model that it was made with, or remove this stage's checkpoints",
    )


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " × ".join(map(str, shape)) or "a number"


def _refuse_not_finite(checkpoint: Path, state: dict[str, Any], world: World) -> None:
    """Refuse numbers that no training goes on from; a checksum says only that they were written so."""
    odd = [name for name, value in state.items() if not finite(local(value))]
    said = sorted({name for part in world.gather(odd) for name in part})
    if said:
        more = f" and {len(said) - 1} other tensors" if len(said) > 1 else ""
        problem = f"`{said[0]}`{more} of the checkpoint: numbers that are not finite"
        raise LlameroError(problem, where=checkpoint, fix=_BEFORE)
