"""AdamW with the usual exclusions (Loshchilov & Hutter 2019, arXiv:1711.05101), and its moments from stage to stage."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.engine.stage import StageConfig
from llamero.model.weights import finite_part
from llamero.parallel.spread import Spread, put_share
from llamero.parallel.world import World

MOMENTS = "optimizer"
"""Folder of the moments beside a model."""
SUMS = "sums.json"
"""Checksums of the files in it."""


def adamw(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return the optimizer of a stage; matrices decay, norms and biases (and embeddings, where asked) do not."""
    parameters = trained(model)
    spared = {
        name
        for name, parameter in parameters.items()
        if parameter.dim() < 2 or (not stage.weight_decay_embeddings and name.endswith("embed_tokens.weight"))
    }
    groups = [
        {"params": [p for name, p in parameters.items() if name not in spared], "weight_decay": stage.weight_decay},
        {"params": [p for name, p in parameters.items() if name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)


def save_moments(directory: Path, *, spread: Spread, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of the optimizer beside an exported model: `export_optimizer: true`."""
    trained = {name: spec for name, spec in spread.specs.items() if name in spread.trained}
    specs = {f"{name}.{key}": spec for key in ("exp_avg", "exp_avg_sq") for name, spec in trained.items()}
    specs |= {f"{name}.step": hf.Spec((), torch.float32) for name in trained}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            for name, value in spread.whole(lambda parameter, key=key: optimizer.state[parameter][key], trained=True):
                yield f"{name}.{key}", value

    if not spread.world.speaks:
        for _ in tensors():
            raise AssertionError("only the first process gets whole tensors")
        return
    (directory / MOMENTS).mkdir(parents=True, exist_ok=True)
    hf.write_tensors(directory / MOMENTS, specs, tensors())
    sums = {path.name: files.sha256(path) for path in sorted((directory / MOMENTS).glob("*.safetensors*"))}
    files.write_json(directory / MOMENTS / SUMS, {"sha256": sums})


def load_moments(directory: Path, *, spread: Spread, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that `save_moments` wrote beside a model; every process reads its share.

    Raises:
        LlameroError: If there is none, that of a model of another shape, one that is damaged, or not finite.
    """
    if not (directory / MOMENTS).is_dir():
        raise LlameroError(
            "no moments of an optimizer are kept beside this model",
            where=directory,
            fix="set `optimizer: fresh`, or `export_optimizer: true` on the stage before",
        )
    _refuse_damage(directory / MOMENTS, spread.world)
    stored = hf.open_tensors(directory / MOMENTS)
    for name, parameter in spread.named().items():
        if not parameter.requires_grad:
            continue
        wanted = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        state: dict[str, Tensor] = {}
        for key, shape in wanted.items():
            full = f"{name}.{key}"
            if full not in stored or stored.specs[full].shape != shape:
                raise LlameroError(
                    f"the moments are not those of this model: `{full}` is missing or has another shape",
                    where=directory / MOMENTS,
                    fix="set `optimizer: fresh`",
                )
            if key == "step":
                state[key] = stored[full].to(parameter.device)
                continue
            state[key] = torch.zeros_like(parameter, requires_grad=False)
            put_share(state[key], partial(finite_part, stored, full))
        optimizer.state[parameter] = state


def _refuse_damage(directory: Path, world: World) -> None:
    """Refuse files that are not what was written; each process reads some of them."""
    sums = hf.read_json(directory / SUMS).get("sha256")
    if not sums:
        problem, fix = "it has no checksums of the moments", "set `optimizer: fresh`, or train the stage before again"
        raise LlameroError(problem, where=directory / SUMS, fix=fix)
    for name, expected in list(sums.items())[world.rank :: world.size]:
        if not (directory / name).exists() or files.sha256(directory / name) != expected:
            raise LlameroError(
                "the moments are not what was written, or missing",
                where=directory / name,
                fix="remove the stage's directory and train it again, or set `optimizer: fresh`",
            )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: all of them, or the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
