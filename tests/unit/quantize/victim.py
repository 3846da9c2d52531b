"""A process that quantizes in children, which can be killed, or starved of disk, at anything they do to their files.

Every line on stdin is one child, or several that work together: JSON with the keys of `Order`. What became of each is
answered as a line on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from llamero.checkpoint.unfinished import UnfinishedFile
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.model.llama import Block
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World
from llamero.quantize import calibrate
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
    processes: int
    """Children that work together."""
    victim: int
    """Which of them is killed, or stops, or finds something broken."""
    how: str
    """What becomes of it: `kill`, `stop` or `raise`."""
    timeout: int
    """Seconds after which a child that is not heard of is missed."""
    broken: int
    """Child that cannot compute with its text, if not 0."""
    group_tokens: int
    """Of the groups in which text goes through the model."""


def main() -> None:
    """Serve orders until stdin ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    for line in sys.stdin:
        order: Order = json.loads(line)
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
        children = [begin(order, rank, about) for rank in range(order["processes"])]
        answers = [end(*child) for child in children if child[0] != order["victim"]]
        if order["how"] == "stop":
            os.kill(children[order["victim"]][1], signal.SIGKILL)
        answers.insert(order["victim"], end(*children[order["victim"]]))
        sys.stdout.write(json.dumps(answers if order["processes"] > 1 else answers[0]) + "\n")
        sys.stdout.flush()


def begin(order: Order, rank: int, about: dict[str, str]) -> tuple[int, int, int]:
    """Start a child; return its rank, its process and where it says what became of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return rank, child, reading
    os.close(reading)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"]), **about}
    try:
        os.write(writing, json.dumps(make(order, rank)).encode())
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end(_: int, child: int, reading: int) -> dict[str, Any]:
    """Return what became of a child."""
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return {"state": "killed"}
    return json.loads(said) if said else {"state": "crashed", "code": os.waitstatus_to_exitcode(status)}


def make(order: Order, rank: int) -> dict[str, Any]:
    """Quantize, and say what became of it."""
    seen = Events(order["at"] if rank == order["victim"] else 0, order["how"])
    calibrate.GROUP_TOKENS = order["group_tokens"]
    if order["broken"] and order["broken"] == rank:
        Block.forward = break_down  # type: ignore[method-assign]
    parallel = ParallelConfig(gpus=order["processes"], device="cpu", timeout=order["timeout"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], order["largest_file"]))
    root = Path(order["root"])
    generator = torch.Generator().manual_seed(order["seed"])
    keys: dict[str, Any] = {"mixture": "chat", "compute": "float32", **order["calibration"]}
    calibration = Calibration(**keys)
    try:
        with files.disk_errors_named(root):
            reports = run(
                QuantizeConfig(**order["config"], calibration=calibration, measure=None),
                model=Path(order["model"]),
                out=lambda variant: root / variant.name,
                tokens=[torch.randint(0, 96, (length,), generator=generator) for length in TOKENS],
                world=World(parallel, longest=order["timeout"]),
                keep_in=root / "kept",
                progress=root / "progress",
                shard_bytes=40_000,
            )
    except LlameroError as error:
        return {"state": "error", "says": str(error)}
    return {"state": "made", "events": seen.count, "modules": seen.modules, "reports": [r.to_json() for r in reports]}


def break_down(block: Block, x: Tensor, *args: Any) -> Tensor:
    """Do what a layer does, to inputs that are no numbers."""
    return FORWARD(block, x * torch.nan, *args)


FORWARD = Block.forward


class Events:
    """Counts what a run does to its files, and kills it at one of them."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.count, self.modules, self._how = at, 0, 0, how
        os.fsync = lambda handle: None  # slow, and without meaning for a kill
        self._watch(UnfinishedFile, "write")
        for name in ("fsync", "unlink", "rename", "replace", "pwritev"):
            self._watch(os, name)
        self._count_modules()

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **keys: Any) -> Any:
            self.count += 1
            if self.count == self.at and self._how == "raise":
                raise LlameroError("broken on purpose")
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGSTOP if self._how == "stop" else signal.SIGKILL)
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
