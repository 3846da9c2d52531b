"""Which of several processes this one is, as `torchrun` (or srun) says in the environment; torch is not needed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

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
        fix = (
            f"torchrun --standalone --nproc-per-node {gpus} -m llamero.cli run RECIPE; for several machines `llamero "
            "launch`; in this one process --set parallel={}"
        )
    else:
        problem = f"{processes} processes were started, and the recipe says `gpus: {gpus}`"
        fix = f"start {gpus}, or --set parallel.gpus={processes} (and the axes that have them)"
    raise LlameroError(problem, where="parallel.gpus", fix=fix)


def tell_torchrun(said: str) -> None:
    """Leave what went wrong where `torchrun` looks for it: it then ends its own long summary with it.

    The file is the one of torch.distributed.elastic.multiprocessing.errors; without `torchrun` there is none.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"py_callstack": said, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": said, "extraInfo": told}}), encoding="utf-8")
