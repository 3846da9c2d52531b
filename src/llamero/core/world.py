"""Which of several processes this one is, as `torchrun` (or srun) says in the environment; torch is not needed."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process among all; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", str(rank())))
