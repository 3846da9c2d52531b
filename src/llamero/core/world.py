"""Which of several processes this one is, as `torchrun` (or srun) says in the environment; torch is not needed."""

from __future__ import annotations

import os

from llamero.core.errors import LlameroError


def rank() -> int:
    """Return the number of this process among all; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", str(rank())))


def refuse_other_size(gpus: int) -> None:
    """Refuse to work with other than `gpus` processes, and say how to start them."""
    processes = size()
    if processes == gpus:
        return
    if processes == 1:
        problem = f"`gpus: {gpus}` needs {gpus} processes, and this is one"
        fix = f"torchrun --nproc-per-node {gpus} -m llamero.cli run RECIPE; over several machines also --nnodes"
    else:
        problem = f"{processes} processes were started, and the recipe says `gpus: {gpus}`"
        fix = f"--set parallel.gpus={processes}"
    raise LlameroError(problem, where="parallel.gpus", fix=fix)
