"""The command that says what a recipe needs on a cluster."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Column, Table

from llamero.cli.display import Bars, err, out
from llamero.cli.options import OutDir, Override, Recipe, import_uninterrupted
from llamero.core import hardware
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.plan.cluster import Cluster
    from llamero.plan.memory import Memory
    from llamero.plan.run import Plan, Planned, Planning, StagePlan

GIB = 2**30


def plan(
    recipe: Recipe,
    *,
    on: str | None = None,
    gpus: int | None = None,
    per_node: int = 8,
    network: float | None = None,
    tokens: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    best: int = 3,
    context: int | None = None,
    json: bool = False,
    out_dir: OutDir = None,
    set_: Override = (),
) -> None:
    """Say what each stage needs on a cluster: memory, time and the best layouts. Needs no GPU and no weights.

    Parameters
    ----------
    on
        Kind of GPU: a100-80gb, h100, l40s and so on; the one of this machine by default.
    gpus
        How many; the recipe's `parallel.gpus` by default.
    per_node
        GPUs of a node.
    network
        Gbit/s to other nodes for each GPU; what such machines usually have by default.
    tokens
        STAGE=TOKENS or STAGE=TOKENS/SAMPLES: size of a stage's data, where it is not tokenized yet; may be given
        several times.
    best
        How many layouts to suggest.
    context
        Tokens of a sequence when the release is run; the model's longest by default.
    json
        Print all of it as JSON.
    out_dir
        Run directory in which data may stand tokenized; runs/NAME by default.
    set_
        Override a key, as for `run`.
    """
    from llamero.recipe.load import load

    if best < 0:
        raise LlameroError(f"--best is {best}", fix="0 or more")
    if context is not None and context < 1:
        raise LlameroError(f"--context is {context}", fix="1 or more")
    parsed = load(recipe, set_)
    device = None if on is None else hardware.accelerator(on)
    import_uninterrupted("llamero.plan.run")
    from llamero.plan.cluster import Cluster
    from llamero.plan.data import sayings
    from llamero.plan.run import Planning, accelerator_here

    cluster = Cluster(
        device or accelerator_here(), parsed.parallel.gpus if gpus is None else gpus, per_node, network or 0.0
    )
    planning = Planning(
        parsed,
        root=recipe.parent,
        out=out_dir or Path("runs") / parsed.name,
        cluster=cluster,
        said=sayings(tokens, parsed),
        best=best,
        context=context,
    )
    if not json:
        _say_start(planning)
    made = planning.whole(_stages(planning, silent=json))
    if json:
        out.print_json(js.dumps(made.to_json()))
    else:
        _say_served(made)


def _stages(planning: Planning, *, silent: bool) -> list[StagePlan]:
    """Return the stages, each of them shown when it is done."""
    done = []
    for stage in planning.recipe.train:
        if not err.is_terminal:
            err.print(f"{stage.name}: ranking layouts, then weighing the fastest: up to a minute", highlight=False)
        with Bars():
            done.append(planning.stage(stage))
        if not silent:
            _say_stage(done[-1], planning.cluster)
    return done


def _say_start(planning: Planning) -> None:
    cluster, device = planning.cluster, planning.cluster.accelerator
    out.print(f"[bold]{planning.recipe.name}[/bold] on {cluster.gpus} × {device.name}", highlight=False)
    links = f"{device.link_gb_s:,g} GB/s inside a node"
    if cluster.nodes > 1:
        links += (
            f", {cluster.network_gbit_s:,g} Gbit/s for each GPU between {cluster.nodes} nodes of {cluster.per_node}"
        )
    out.print(f"{device.memory_gib:g} GiB each; {links}", highlight=False)
    config = planning.config
    out.print(
        f"model: {config.num_layers} layers of {config.hidden_size}, {config.vocab_size:,} tokens; "
        f"from {planning.known_from}",
        highlight=False,
    )
    if not planning.recipe.train:
        out.print("the recipe trains nothing")


_SHOWN = ("rtx4090", "a6000", "a100-80gb", "h200")
"""Devices of 24, 48, 80 and 141 GB, for which it is said how many run a release."""


def _say_served(made: Plan) -> None:
    from llamero.plan.memory import RUNTIME

    out.rule("[bold]to run it", align="left")
    kinds = [hardware.ACCELERATORS[name] for name in _SHOWN]
    table = Table(Column("GiB", no_wrap=True), box=None, padding=(0, 1))
    for name in ("weights", "KV", "all", *(kind.name.removesuffix(" SXM") for kind in kinds)):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for form in made.served:
        if form.memory is None:
            out.print(f"{form.form}: {form.unknown}", highlight=False)
            continue
        memory = form.memory
        cells = [f"{number / GIB:.1f}" for number in (memory.weights, memory.kv, memory.total)]
        numbers = (form.least.get(kind.name) for kind in kinds)
        table.add_row(form.form, *cells, *("-" if number is None else f"{number}" for number in numbers))
    out.print(table)
    said = f"one sequence of {made.context:,} tokens; {RUNTIME / GIB:g} GiB of all are CUDA's own"
    out.print(f"[dim]{said}; then the fewest of each GPU that hold it", highlight=False)


def _say_stage(stage: StagePlan, cluster: Cluster) -> None:
    out.rule(f"[bold]{stage.name}", align="left")
    trained = "" if stage.trained == stage.parameters else f", {stage.trained:,} of them trained"
    out.print(f"{stage.parameters:,} parameters{trained}", highlight=False)
    data = stage.data
    steps = "steps unknown" if data.steps is None else f"{data.steps:,} steps, {data.tokens:,} tokens in all"
    out.print(f"{data.step_tokens:,.0f} tokens a step in {data.rows} rows at most; {steps}", highlight=False)
    for note in data.notes:
        out.print(f"[dim]{note}", highlight=False)
    if stage.resized:
        out.print(f"the recipe's layout: {stage.resized}", highlight=False)
    if stage.own is None:
        out.print(f"[bold red]the recipe's layout cannot be had:[/bold red] {stage.refused}", highlight=False)
    else:
        _say_own(stage, stage.own, cluster)
    _say_best(stage)


def _say_own(stage: StagePlan, own: Planned, cluster: Cluster) -> None:
    from llamero.plan.search import ROOM, brief

    out.print(f"\nthe recipe's layout: {brief(own.parallel) or 'one GPU'}", highlight=False)
    table = Table(Column("GiB" if len(own.memory) == 1 else "GiB, place", no_wrap=True), box=None, padding=(0, 1))
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "other", "runtime")
    short = {"gradients": "grads", "optimizer": "optim", "activations": "activ", "runtime": "CUDA"}
    for name in (*kinds, "total"):
        table.add_column(short.get(name, name), justify="right")
    for place, memory in enumerate(own.memory):
        cells = [f"{getattr(memory, name) / GIB:.1f}" for name in (*kinds, "total")]
        table.add_row("each GPU" if len(own.memory) == 1 else f"{place + 1} of {len(own.memory)}", *cells)
    out.print(table)
    _say_host(own.memory)
    out.print(f"{own.parameters_per_rank:,} parameters on the GPU that has most", highlight=False)
    device = cluster.accelerator
    most = own.memory[own.fullest].total / GIB
    room = (
        f"{most:.1f} GiB of {ROOM * device.memory_gib:.1f} that a plan may fill ({ROOM:.0%} of {device.memory_gib:g})"
    )
    verdict = "[bold green]fits[/bold green]" if own.fits else "[bold red]does not fit[/bold red]"
    out.print(f"{verdict}: {room}", highlight=False)
    for way in stage.ways:
        out.print(
            f"would fit: {brief(way.parallel)}: {max(m.total for m in way.memory) / GIB:.1f} GiB, "
            f"{way.figures.step_seconds:.2f} s a step",
            highlight=False,
        )
    if not own.fits and not stage.ways:
        out.print("with these axes nothing makes it fit: spread it over more GPUs", highlight=False)
    seconds = ((name, getattr(own.parts, name)) for name in own.parts.__dataclass_fields__)
    share = own.parts.total
    said = ", ".join(f"{name} {part / share:.0%}" for name, part in seconds if part / share >= 0.005)
    out.print(f"step {share:.2f} s: {said}", highlight=False)
    out.print(_figures(own), highlight=False)


def _say_host(memory: Sequence[Memory]) -> None:
    host = max(one.host for one in memory)
    if host:
        out.print(f"{host / GIB:.1f} GiB for each GPU in the memory of its host", highlight=False)


def _figures(planned: Planned) -> str:
    figures = planned.figures
    said = f"{figures.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {figures.mfu:.1%}"
    if figures.hours is not None and figures.gpu_hours is not None:
        said += f", {_hours(figures.hours)} hours, {figures.gpu_hours:,.0f} GPU-hours (training alone)"
    return said


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"


def _say_best(stage: StagePlan) -> None:
    from llamero.plan.search import brief

    found = stage.found
    if stage.best:
        table = Table("the best layouts", box=None, padding=(0, 1), title_justify="left")
        for name in ("step s", "tok/s/GPU", "MFU", "GiB", "hours"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in stage.best:
            figures, most = one.figures, one.memory[one.fullest].total / GIB
            hours = "?" if figures.hours is None else _hours(figures.hours)
            cells = [f"{figures.step_seconds:.2f}", f"{figures.tokens_per_second_per_gpu:,.0f}"]
            table.add_row(brief(one.parallel) or "one GPU", *cells, f"{figures.mfu:.1%}", f"{most:.1f}", hours)
        out.print()
        out.print(table)
    said = f"{found.legal:,} legal layouts, {found.hopeless:,} passed over as too large, {found.weighed} weighed"
    if not stage.best:
        said += "; none of them fits" + ("" if not found.gave_up else " (the search gave up)")
    out.print(f"[dim]{said}", highlight=False)
