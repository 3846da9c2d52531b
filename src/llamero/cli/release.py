"""Commands that make a release and its parts: run, check, evaluate, watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from llamero.cli.display import Bars, out, say_left_out, say_outcome, say_results, say_row
from llamero.cli.options import Model, OutDir, Override, Recipe, import_uninterrupted
from llamero.cli.scale import Scale, load
from llamero.core import world
from llamero.core.errors import LlameroError


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


def evaluate(
    model: Model,
    *,
    tasks: str,
    data: Path | None = None,
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=False, negative=())] = (),
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    limit: int | None = None,
    subjects: int | None = None,
    truthfulqa: Literal["2021", "later"] | None = None,
    window: int | None = None,
    stride: int | None = None,
    template: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure a model.

    Parameters
    ----------
    tasks
        h4, arc_challenge, hellaswag, mmlu, truthfulqa_mc, perplexity, samples or toy_world.
    data
        Directory of the benchmark files (for h4 and its parts).
    text
        Text file to measure perplexity on; may be given several times.
    prompt
        What to say to the model (samples); may be given several times.
    limit
        Questions of each task.
    subjects
        MMLU subjects to take, the first ones by name.
    truthfulqa
        Edition of TruthfulQA: 2021 by default, which the published scores used.
    window
        Tokens of a perplexity window, 512 by default.
    stride
        Tokens between windows, 256 by default.
    template
        Chat template of prompts (toy_world).
    json
        Also write the results to this file.
    """
    from llamero.core.download import resolve_model
    from llamero.core.results import write_file
    from llamero.evaluate.config import named

    given: dict[str, object] = {
        "data": None if data is None else str(data.resolve()),
        "texts": {path.name: str(path.resolve()) for path in text} or None,
        "prompts": list(prompt) or None,
        "limit": limit,
        "subjects": subjects,
        "truthfulqa": truthfulqa,
        "window": window,
        "stride": stride,
    }
    task = named(tasks, {key: value for key, value in given.items() if value is not None})
    directory = resolve_model(model)
    if json is not None and not json.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=json.parent)
    import_uninterrupted("llamero.evaluate.run")
    from llamero.evaluate.run import run as measure

    with Bars():
        found = measure(task, model=directory, name=model, template=template, root=Path())
    say_results(found)
    if json is not None:
        write_file(json, found)


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
