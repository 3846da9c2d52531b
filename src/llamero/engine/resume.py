"""Checkpoints to resume from: weights, optimizer and step, whole or not there.

A checkpoint is a directory `step-00000200` of safetensors files, written beside and renamed. Data order and
learning rate are functions of the step, so nothing else need be kept for a resumed run to end in the same bits.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError

KEEP = 2


def save(directory: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the checkpoint after `step` steps and remove all but the last two."""
    final = directory / f"step-{step:08}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = dict(model.named_parameters())
    _write(partial, "weights", weights)
    _write(partial, "optimizer", _moments(weights, optimizer))
    files.write_json(partial / "state.json", {"step": step})
    files.sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in _finished(directory)[:-KEEP]:
        shutil.rmtree(old)


def load(directory: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill model and optimizer from the last checkpoint and return its step; 0 where there is none."""
    finished = _finished(directory)
    if not finished:
        return 0
    last = finished[-1]
    weights = dict(model.named_parameters())
    stored = hf.open_tensors(last / "weights")
    if {name: stored[name].shape for name in stored} != {name: value.shape for name, value in weights.items()}:
        raise LlameroError("the checkpoint is of a model of another shape", where=last, fix="remove this directory")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(stored[name])
    moments = hf.open_tensors(last / "optimizer")
    for name, parameter in weights.items():
        state: dict[str, Any] = {
            key: moments[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")
        }
        state["step"] = moments[f"{name}.step"].to(parameter.device)
        optimizer.state[parameter] = state
    step = hf.read_json(last / "state.json")["step"]
    if last.name != f"step-{step:08}":
        raise LlameroError(f"the checkpoint says step {step}", where=last, fix="remove this directory")
    return step


def remove(directory: Path) -> None:
    """Remove all checkpoints; a kill half-way leaves nothing behind that looks like one."""
    aside = directory.with_name(directory.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
        shutil.rmtree(aside)


def _moments(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in weights.items()
        for key, value in optimizer.state[parameter].items()
    }


def _write(directory: Path, name: str, tensors: dict[str, Any]) -> None:
    (directory / name).mkdir()
    specs = {key: hf.Spec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    hf.write_tensors(directory / name, specs, tensors.items())


def _finished(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if not path.name.endswith(".partial"))
