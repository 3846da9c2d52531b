"""The command that starts a recipe on several devices."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llamero.cli.display import err, out
from llamero.cli.options import OutDir, Override, Recipe
from llamero.cli.scale import Scale, load
from llamero.core import files
from llamero.core.errors import LlameroError

Several = Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())]


def launch(
    recipe: Recipe,
    *,
    on: Literal["torchrun", "slurm"] = "torchrun",
    nodes: int = 1,
    hours: float = 24.0,
    port: int | None = None,
    directive: Several = (),
    setup: Several = (),
    job: Path | None = None,
    submit: bool = False,
    out_dir: OutDir = None,
    scale: Scale = None,
    set_: Override = (),
) -> None:
    """Write the job file that runs a recipe on the devices of its `parallel:`, and submit it if asked.

    Parameters
    ----------
    on
        torchrun: a script to run on every node; slurm: a file for sbatch, queued again where it is preempted.
    nodes
        Machines that the devices are spread over.
    hours
        Longest time that Slurm is asked for.
    port
        On which processes find each other; 29500 by default.
    directive
        A further line for Slurm, such as --account=NAME; may be given several times.
    setup
        A shell command that prepares a node, such as "module load cuda"; may be given several times.
    job
        File to write; RECIPE's name with .slurm or .sh by default, in this directory.
    submit
        Submit it: with sbatch, or run the script here if there is one node.
    out_dir
        Run directory; runs/NAME by default.
    set_
        Override a key, as for `run`.
    """
    from llamero.plan import jobs

    if submit and on == "torchrun" and nodes > 1:
        raise LlameroError("a script for several nodes cannot be submitted", fix="run it on every node, or --on slurm")
    parsed, target = load(recipe, set_, out_dir, scale)
    options = [part for override in set_ for part in ("--set", override)]
    options += [] if scale is None else ["--scale", scale]
    described = jobs.Job(
        name=parsed.name,
        command=["run", str(recipe.resolve()), "--out", str(target.resolve()), *options],
        nodes=nodes,
        devices=jobs.spread(parsed.parallel.gpus, nodes),
        port=jobs.PORT if port is None else port,
        hours=hours,
        directives=directive,
        setup=setup,
    )
    path = job or Path(f"{recipe.stem}.{'slurm' if on == 'slurm' else 'sh'}")
    files.write_atomically(path, jobs.slurm(described) if on == "slurm" else jobs.torchrun(described))
    start = ["sbatch", str(path)] if on == "slurm" else ["bash", str(path)]
    err.print(f"written to {path}", highlight=False)
    if not submit:
        out.print(f"start it: {' '.join(start)}", highlight=False, soft_wrap=True)
        return
    try:
        code = subprocess.run(start, check=False).returncode
    except FileNotFoundError as error:
        raise LlameroError(f"there is no `{start[0]}` here", fix=f"submit {path} where there is one") from error
    if code:
        raise LlameroError(f"`{' '.join(start)}` ended with code {code}")
