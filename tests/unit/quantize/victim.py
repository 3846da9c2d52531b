"""A process that quantizes in children, which can be killed, or starved of disk, at anything they do to their files.

Every line on stdin is one child: JSON with the keys of `Order`. What became of it is answered as a line on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch

from llamero.checkpoint.unfinished import UnfinishedFile
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run

TOKENS = (48, 60, 17)


class Order(TypedDict):
    root: str
    """Where variants and progress go."""
    model: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    at: int
    """The child kills itself before this event, counted from 1; 0 is never."""
    largest_file: int
    """Bytes that a file may have; 0 is no limit."""
    seed: int
    """Of the text."""


def main() -> None:
    """Serve orders until stdin ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(make(json.loads(line))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        answer = {"state": "killed"} if killed else json.loads(said or '{"state": "crashed"}')
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def make(order: Order) -> dict[str, Any]:
    """Quantize, and say what became of it."""
    seen = Events(order["at"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], order["largest_file"]))
    root = Path(order["root"])
    generator = torch.Generator().manual_seed(order["seed"])
    calibration = Calibration(mixture="chat", compute="float32", **order["calibration"])
    try:
        with files.disk_errors_named(root):
            reports = run(
                QuantizeConfig(**order["config"], calibration=calibration, measure=None),
                model=Path(order["model"]),
                out=lambda variant: root / variant.name,
                tokens=[torch.randint(0, 96, (length,), generator=generator) for length in TOKENS],
                keep_in=root / "kept",
                progress=root / "progress",
                shard_bytes=40_000,
            )
    except LlameroError as error:
        return {"state": "error", "says": str(error)}
    return {"state": "made", "events": seen.count, "modules": seen.modules, "reports": [r.to_json() for r in reports]}


class Events:
    """Counts what a run does to its files, and kills it at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.modules = at, 0, 0
        os.fsync = lambda handle: None  # slow, and without meaning for a kill
        self._watch(UnfinishedFile, "write")
        for name in ("fsync", "unlink", "rename", "replace", "pwritev"):
            self._watch(os, name)
        self._count_modules()

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **keys: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **keys)

        setattr(owner, name, watched)

    def _count_modules(self) -> None:
        from llamero.quantize.problem import Solution

        add = Solution.add_parts

        def counted(solution: Solution, *args: Any, **keys: Any) -> None:
            self.modules += 1
            add(solution, *args, **keys)

        Solution.add_parts = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
