"""A process that trains in children, which can be killed, interrupted or starved of disk at any of their steps.

Every line on stdin is one child: JSON with the keys of `Order`. What became of it is answered as a line on
stdout. Children are forked, so that torch and what it needs is imported once.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from llamero.checkpoint import hf
from llamero.core import artifact, files
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Interrupted
from llamero.engine import metrics
from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig
from llamero.text.tokenizer import load_tokenizer
from llamero.train.config import ShapeConfig
from llamero.train.run import run

SHAPE = ShapeConfig(hidden=16, layers=1, heads=2, mlp=16, context=64)


class Order(TypedDict):
    root: str
    """Where the artifact is made."""
    data: str
    tokenizer: str
    stage: dict[str, Any]
    signal: int
    """Sent to the child by itself …"""
    at: int
    """… before this event, counted from 1; 0 is never."""
    largest_file: int
    """Bytes that a file may have; 0 is no limit."""


class Events:
    """Counts what a run does to its files, and stops at one of them."""

    def __init__(self, order: Order) -> None:
        self.order, self.count, self._lock = order, 0, threading.Lock()
        self._watch(hf.ShardWriter, "add")
        self._watch(metrics.Metrics, "write")
        self._watch(files, "sha256")
        for name in ("prepare_local_plan", "write_data", "finish"):
            self._watch(FileSystemWriter, name)
        os.fsync = lambda handle: None  # slow, and without meaning for a kill
        for name in ("fsync", "unlink", "rmdir", "rename", "replace"):
            self._watch(os, name)

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **keys: Any) -> Any:
            with self._lock:  # checkpoints are written by a thread
                self.count += 1
                if self.count == self.order["at"]:
                    os.kill(os.getpid(), self.order["signal"])
            return original(*args, **keys)

        setattr(owner, name, watched)


def make(order: Order) -> dict[str, Any]:
    """Make the artifact and say what became of it."""
    events = Events(order)
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], order["largest_file"]))
    stage, root = StageConfig.model_validate(order["stage"]), Path(order["root"])
    identity = artifact.Identity("model", "train-tiny", stage.decides(), {})
    if artifact.find(root, identity) is not None:
        return {"state": "found"}
    try:
        with artifact.build(root, identity) as build:
            build.summary = run(
                stage,
                start=SHAPE,
                data=Path(order["data"]),
                tokenizer=Path(order["tokenizer"]),
                parallel=ParallelConfig(device="cpu"),
                seed=3,
                out=build.path,
            )
    except LlameroError as error:
        return {"state": "error", "says": str(error)}
    except Interrupted as stopped:
        return {"state": "interrupted", "says": str(stopped)}
    return {"state": "made", "events": events.count}


def main() -> None:
    """Serve orders until stdin ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.optim.AdamW([torch.zeros(1)])  # imports most of torch
    for line in sys.stdin:
        load_tokenizer(Path(json.loads(line)["tokenizer"]))  # imports the rest
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


if __name__ == "__main__":
    main()
