"""Trains on several processes that can be killed at any of their steps, one or all.

Every line on stdin is one run: JSON with the keys of `Order`. What became of each process is answered as a line on
stdout. Processes are forked, so that torch and what it needs is imported once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
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
from llamero.parallel.spread import Spread
from llamero.parallel.world import World
from llamero.text.tokenizer import load_tokenizer
from llamero.train.config import ShapeConfig
from llamero.train.run import run

SHAPE = ShapeConfig(hidden=16, layers=2, heads=2, mlp=16, context=64, tied=False)


class Order(TypedDict):
    root: str
    """Where the artifact is made."""
    data: str
    tokenizer: str
    stage: dict[str, Any]
    parallel: dict[str, Any]
    signal: int
    """Sent by a process …"""
    rank: int
    at: tuple[str, int]
    """… before it does something (its name) for this time, counted from 1 …"""
    everyone: bool
    """… to all processes, or only to itself."""
    full: str
    """A thing that finds the disk full on that process, from its first time on."""


class Events:
    """Counts what a process does, by name, and stops at one of them."""

    def __init__(self, order: Order, rank: int) -> None:
        self.order, self.rank, self.count, self._lock = order, rank, Counter[str](), threading.Lock()
        os.fsync = lambda handle: None  # slow, and without meaning for a kill
        for owner, *names in (
            (hf.ShardWriter, "add"),
            (metrics.Metrics, "write"),
            (files, "sha256"),
            (FileSystemWriter, "write_data", "finish"),
            (os, "rename", "replace", "unlink", "rmdir"),
            (Spread, "losses", "clip"),
            (World, "gather"),
        ):
            for name in names:
                self._watch(owner, name)

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **keys: Any) -> Any:
            with self._lock:  # checkpoints are written by a thread
                self.count[name] += 1
                if self.rank == self.order["rank"]:
                    self._act(name)
            return original(*args, **keys)

        setattr(owner, name, watched)

    def _act(self, name: str) -> None:
        if name == self.order["full"]:
            raise OSError(28, "No space left on device")
        if (name, self.count[name]) == tuple(self.order["at"]):
            (os.killpg if self.order["everyone"] else os.kill)(
                0 if self.order["everyone"] else os.getpid(), self.order["signal"]
            )


def make(order: Order, rank: int) -> dict[str, Any]:
    """Do a process's part of making the artifact and say what became of it."""
    events = Events(order, rank)
    stage, root = StageConfig.model_validate(order["stage"]), Path(order["root"])
    identity = artifact.Identity("model", "train-tiny", stage.decides(), {})
    parallel = ParallelConfig.model_validate({"device": "cpu", "timeout": 8} | order["parallel"])
    about = {"data": Path(order["data"]), "tokenizer": Path(order["tokenizer"]), "parallel": parallel, "seed": 3}
    try:
        if artifact.find(root, identity) is not None:
            return {"state": "found"}
        if rank:
            run(stage, start=SHAPE, out=artifact.partial(root, identity), **about)
        else:
            with artifact.build(root, identity) as build:
                build.summary = run(stage, start=SHAPE, out=build.path, **about)
    except LlameroError as error:
        return {"state": "error", "says": str(error)}
    except Interrupted as stopped:
        return {"state": "interrupted", "says": str(stopped)}
    except Exception:  # of a process whose neighbour is gone
        return {"state": "crashed", "says": traceback.format_exc()}
    return {"state": "made", "events": events.count}


def main() -> None:
    """Serve orders until stdin ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.optim.AdamW([torch.zeros(1)])  # imports most of torch
    import_module("torch.distributed.checkpoint.state_dict_loader")
    for line in sys.stdin:
        order: Order = json.loads(line)
        load_tokenizer(Path(order["tokenizer"]))  # imports the rest
        sys.stdout.write(json.dumps([_ended(*child) for child in _start(order)]) + "\n")
        sys.stdout.flush()


def _start(order: Order) -> list[tuple[int, int]]:
    """Start the processes of a run, in a group of their own; return pid and what each says is read from."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    size = order["parallel"]["gpus"]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    children: list[tuple[int, int]] = []
    for rank in range(size):
        reading, writing = os.pipe()
        child = os.fork()
        group = children[0][0] if children else child
        if child == 0:
            os.setpgid(0, group)
            os.environ |= about | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.write(writing, json.dumps(make(order, rank)).encode())
            os._exit(0)
        os.setpgid(child, group)
        os.close(writing)
        children.append((child, reading))
    return children


def _ended(child: int, reading: int) -> dict[str, Any]:
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"state": "killed", "signal": os.WTERMSIG(status)}
    return json.loads(said or '{"state": "ended"}')


if __name__ == "__main__":
    main()
