"""Job files: how a recipe is started on several devices, by `torchrun` alone or under Slurm.

Every node runs one `torchrun`, which starts one process a device and finds the others through the first node
(torch.distributed.run, rendezvous `c10d`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Template

from llamero.core.errors import LlameroError

GRACE = 280
"""Seconds that torchrun leaves its processes to save, of the 300 before Slurm ends the job; 30 is its own choice."""
PORT = 29500
"""On which processes find each other, unless another is asked for."""


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Args:
        name: Of the release.
        command: Arguments of `llamero`, `run` first.
        nodes: Machines.
        devices: Processes on each of them, one a device.
        port: On which they find each other.
        hours: Longest time that Slurm is asked for.
        directives: Further lines of Slurm's, without `#SBATCH`: an account, a partition, a constraint.
        setup: Shell commands that prepare a node: modules, an environment.
    """

    name: str
    command: Sequence[str]
    nodes: int
    devices: int
    port: int = PORT
    hours: float = 24.0
    directives: Sequence[str] = ()
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what no cluster has."""
        for name in ("nodes", "devices", "hours"):
            if getattr(self, name) <= 0:
                raise LlameroError(f"{name} is {getattr(self, name)}", fix="give at least 1")


def spread(processes: int, nodes: int) -> int:
    """Return how many processes run on each node.

    Raises:
        LlameroError: They cannot be spread evenly.
    """
    if processes % nodes:
        fitting = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise LlameroError(f"{processes} devices do not spread over {nodes} nodes", fix=f"use one of {fitting} nodes")
    return processes // nodes


def torchrun(job: Job) -> str:
    """Return the script that is run on every node; where there are several, it is told the name of the first."""
    if job.nodes == 1:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(job.devices), *_MODULE, *job.command]
        return _SCRIPT.substitute(grace=GRACE, about=_ALONE, setup=_lines(job.setup), start=shlex.join(start))
    return _SCRIPT.substitute(
        grace=GRACE, about=_EACH, setup=_lines(job.setup), start=_on_each_node(job, shlex.quote(job.name))
    )


def slurm(job: Job) -> str:
    """Return the file for `sbatch`: a job that is preempted or out of time saves, and is queued again to go on."""
    hours, minutes = divmod(round(job.hours * 60), 60)
    return _SLURM.substitute(
        name=job.name,
        grace=GRACE,
        nodes=job.nodes,
        devices=job.devices,
        time=f"{hours}:{minutes:02}:00",
        directives=_lines(f"#SBATCH {line}" for line in job.directives),
        setup=_lines(job.setup),
        start=_on_each_node(job, '"$SLURM_JOB_ID"'),
    )


_MODULE = ("-m", "llamero.cli")


def _on_each_node(job: Job, identity: str) -> str:
    """Return the command line of a node; `identity` is shell text that tells this job from others."""
    first = ["torchrun", "--nnodes", str(job.nodes), "--nproc-per-node", str(job.devices), "--rdzv-backend", "c10d"]
    found = f'--rdzv-endpoint "$HEAD_NODE:{job.port}" --rdzv-id {identity}'
    return f"{shlex.join(first)} {found} {shlex.join([*_MODULE, *job.command])}"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


_ALONE = "# One machine."
_EACH = """# Run this on every node, with the name of the first:  HEAD_NODE=node0 bash THIS_FILE
: "${HEAD_NODE:?the name of the first node}\""""
_SCRIPT = Template("""#!/bin/bash
set -euo pipefail
$about
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace # seconds to save in, when asked to stop
${setup}exec $start
""")
_SLURM = Template("""#!/bin/bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$devices
#SBATCH --time=$time
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
${directives}set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace # seconds to save in, when asked to stop
${setup}nodes=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST")
export HEAD_NODE=$${nodes%%$$'\\n'*}

# Preemption and the end of the time send TERM five minutes ahead: it is handed on, and the run saves.
stopped=0
trap 'stopped=1; kill -TERM "$$step" 2>/dev/null || true' TERM
srun --kill-on-bad-exit=1 $start &
step=$$!
code=0
wait "$$step" || code=$$?
while kill -0 "$$step" 2>/dev/null; do # a signal ended the wait, the step is still saving
  code=0
  wait "$$step" || code=$$?
done
if [ "$$stopped" = 1 ] && [ "$$code" != 0 ]; then
  scontrol requeue "$$SLURM_JOB_ID" # it goes on where it stopped
fi
exit "$$code"
""")
