"""Checkpoints to resume from: weights, optimizer and step, whole or not there.

A checkpoint is a directory `step-00000200` in the format of `torch.distributed.checkpoint`: every process writes what
it holds, and any other layout reads from it what it needs. It is written beside and renamed. Data order and learning
rate are functions of the step, so nothing else need be kept for a resumed run to end in the same bits.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.parallel.world import World

KEEP = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Weights = Mapping[str, nn.Parameter]


def save(
    directory: Path, *, step: int, weights: Weights, optimizer: torch.optim.Optimizer, world: World, keep: int = KEEP
) -> None:
    """Write the checkpoint after `step` steps and remove all but the last ones; every process takes part."""
    final = directory / f"step-{step:08}"
    partial = final.with_name(final.name + ".partial")
    if world.speaks:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    state = _state(weights, lambda parameter, key: optimizer.state[parameter][key])
    _with_plain_errors(lambda: save_state(state, storage_writer=FileSystemWriter(partial), no_dist=world.size == 1))
    world.barrier()
    mine = sorted(path for path in partial.iterdir() if path.name.endswith(".distcp"))[world.rank :: world.size]
    sums = world.gather({path.name: files.sha256(path) for path in mine})
    if world.speaks:
        about = {"step": step, "sha256": {name: value for part in sums for name, value in sorted(part.items())}}
        files.write_json(partial / "state.json", about)
        files.sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in _finished(directory)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(directory: Path, *, weights: Weights, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Fill weights and optimizer from the last checkpoint and return its step; 0 where there is none.

    Raises:
        LlameroError: If a file of it is damaged, or it is of another model.
    """
    last = world.told(next(iter(reversed(_finished(directory))), None))
    if last is None:
        return 0
    about = hf.read_json(last / "state.json")
    if last.name != f"step-{about['step']:08}":
        raise LlameroError(f"the checkpoint says step {about['step']}", where=last, fix="remove this directory")
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
    state = _state(weights, lambda parameter, key: fresh[parameter][key])
    reader = FileSystemReader(last)
    stored = reader.read_metadata().state_dict_metadata
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(about.size) for name, about in stored.items() if isinstance(about, TensorStorageMetadata)}
    complete = {name for part in world.gather(list(wanted)) for name in part}
    if complete != set(found) or any(found[name] != shape for name, shape in wanted.items()):
        raise LlameroError("the checkpoint is of a model of another shape", where=last, fix="remove this directory")
    with torch.no_grad():
        _with_plain_errors(lambda: load_state(state, storage_reader=reader, no_dist=world.size == 1))
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


def _state(weights: Weights, moment: Callable[[nn.Parameter, str], Tensor]) -> dict[str, Any]:
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
            fix="remove this directory: the run goes on from the checkpoint before it",
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


def _finished(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if not path.name.endswith(".partial"))
