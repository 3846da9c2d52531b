"""Recipes as commands take them: loaded, overridden, and at the size that is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape

from llamero.cli.display import err
from llamero.core import world
from llamero.core.download import config_at_hand
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.recipe.scale import Base, Change
    from llamero.recipe.schema import Recipe

Scale = Annotated[
    Literal["tiny"] | None,
    Parameter(
        help="tiny: the same stages over the same kind of layout, with a tiny model, a few steps and toy data; "
        "fetches nothing, says what it changed."
    ),
]


def load(
    path: Path, overrides: Sequence[str], out_dir: Path | None, scale: str | None, *, processes: int | None = None
) -> tuple[Recipe, Path]:
    """Return a recipe and its run directory.

    Args:
        path: Its file.
        overrides: What --set says; a tiny recipe is made of what comes out.
        out_dir: The run directory, if it is stated.
        scale: `tiny` for a recipe at the size of a laptop.
        processes: How many it will run on; for a tiny one, as many as its layout takes by default.
    """
    from llamero.recipe.load import load as read

    recipe = read(path, overrides)
    if scale is None:
        return recipe, out_dir or Path("runs") / recipe.name
    from llamero.recipe.scale import SUFFIX, tiny

    target = out_dir or Path("runs") / f"{recipe.name}{SUFFIX}"
    scaled = tiny(
        recipe,
        here=lambda name: (path.parent / name).exists(),
        base=_base(recipe, path.parent),
        toys=os.path.relpath(target / "toy", path.parent),
        processes=processes,
    )
    for file in scaled.files:
        file.write(path.parent)
    _refuse_other_processes(scaled.recipe, processes, path)
    if world.rank() == 0:
        _say_changes(scaled.changes)
        if processes == 1 and scaled.recipe.parallel != recipe.parallel:
            gpus = tiny(recipe, here=lambda _: True).recipe.parallel.gpus
            err.print(f"trains in one process; its layout on {gpus}: {_started(gpus, path)}", highlight=False)
    return scaled.recipe, target


def _base(recipe: Recipe, root: Path) -> Base | None:
    """Return what is to be known of the base, where its config is at hand."""
    from llamero.recipe.scale import Base

    if not isinstance(recipe.base, str):
        return None
    local = root / recipe.base / "config.json"
    config = local if local.is_file() else config_at_hand(recipe.base)
    return None if config is None else Base.of(json.loads(config.read_text(encoding="utf-8")))


def _refuse_other_processes(recipe: Recipe, processes: int | None, path: Path) -> None:
    gpus = recipe.parallel.gpus
    if processes not in (None, gpus):
        raise LlameroError(
            f"{processes} processes were started, and the tiny layout takes {gpus}, or one",
            where="parallel.gpus",
            fix=_started(gpus, path),
        )


def _started(gpus: int, path: Path) -> str:
    return f"torchrun --standalone --nproc-per-node {gpus} -m llamero.cli run {path} --scale tiny"


def _say_changes(changes: Sequence[Change]) -> None:
    """Say what is not as the recipe has it."""
    err.print(f"--scale tiny changed {len(changes)} keys:", highlight=False)
    for change in changes:
        why = f" [dim]({escape(change.why)})[/dim]" if change.why else ""
        said = f"  {escape(change.key)}: {escape(change.before)} → {escape(change.after)}{why}"
        err.print(said, highlight=False, soft_wrap=True)
