"""Commands that make a release and follow it: run, check, watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from llamero.cli.display import Bars, out, say_left_out, say_outcome, say_row
from llamero.cli.options import OutDir, Override, Recipe, import_uninterrupted
from llamero.cli.scale import Scale, load
from llamero.core import world


def run(recipe: Recipe, *, out_dir: OutDir = None, scale: Scale = None, set_: Override = ()) -> None:
    """Make a release: every stage that is not there yet, from data to the card.

    Parameters
    ----------
    out_dir
        Run directory; runs/NAME by default. Run again to continue or to redo what a change touches.
    set_
        Override a key: --set train.sft.lr=1e-5 (a list item goes by its name or number).
    """
    from llamero import pipeline

    parsed, target = load(recipe, set_, out_dir, scale, processes=world.size())
    import_uninterrupted("llamero.model.load")
    with Bars():
        outcome = pipeline.run(parsed, root=recipe.parent, out=target, on_row=say_row)
    if world.rank() == 0:
        say_outcome(outcome)


def check(recipe: Recipe, *, out_dir: OutDir = None, scale: Scale = None, set_: Override = ()) -> None:
    """Validate a recipe and print what would run; trains nothing and needs no GPU.

    Parameters
    ----------
    out_dir
        Run directory to compare with; runs/NAME by default.
    set_
        Override a key, as for `run`.
    """
    from llamero import pipeline
    from llamero.core import artifact
    from llamero.data.read import refuse_unreadable

    parsed, target = load(recipe, set_, out_dir, scale)
    plan = pipeline.Plan(parsed, recipe.parent, target)
    for mixture in parsed.data.mixtures.values():
        refuse_unreadable(mixture, recipe.parent)
    table = Table("stage", "digest", "state", title=f"{recipe}: {parsed.name}")
    for stage in plan.stages:
        for name, identity in stage.identities.items():
            there = artifact.find(target, identity) is not None
            table.add_row(name, identity.digest[: artifact.DIGITS], "there" if there else "to make")
    if world.rank() == 0:
        out.print(table)
        say_left_out(plan.left_out)


def watch(
    run_dir: Annotated[Path, Parameter(help="Run directory, for example runs/quickstart.")],
    *,
    to: Literal["tensorboard", "wandb"] = "tensorboard",
    follow: bool = False,
) -> None:
    """Show the training curves of a run in TensorBoard or Weights & Biases.

    Parameters
    ----------
    to
        Where to show them; TensorBoard files go to RUN/tensorboard.
    follow
        Keep looking for new steps until Ctrl-C.
    """
    from llamero.engine.watch import watch as show

    steps = show(run_dir, to, follow=follow)
    out.print(f"{steps} steps shown")
    if to == "tensorboard":
        out.print(f"look at them: tensorboard --logdir {run_dir / 'tensorboard'}")
