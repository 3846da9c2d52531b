"""Trains a tiny model in one layout and writes what came of it; run by `torchrun`-like environments, or alone.

    python layouts.py ORDER.json

The order has: out, parallel, model (keys of the shape), stage, steps_data. Imported by the tests for `start` only.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPE = {"hidden": 32, "mlp": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 67, "tied": False}
STAGE = {
    "name": "tiny",
    "mixture": "chat",
    "sequence": 32,
    "batch": 8,
    "steps": 3,
    "lr": 1e-3,
    "clip": 0.5,
    "weight_decay": 0.1,
    "learn": {"user": 0.5},
}


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(order: dict[str, Any], *, processes: int, where: Path) -> list[subprocess.Popen[str]]:
    """Start the processes of an order."""
    where.mkdir(parents=True, exist_ok=True)
    path = where / "order.json"
    path.write_text(json.dumps(order))
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    about |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def run(order: dict[str, Any], *, processes: int, where: Path, seconds: float = 120) -> dict[str, Any]:
    """Return what an order's first process wrote."""
    running = start(order, processes=processes, where=where)
    said = [process.communicate(timeout=seconds) for process in running]
    failed = [(rank, err) for rank, (p, (_, err)) in enumerate(zip(running, said, strict=True)) if p.returncode]
    assert not failed, "\n".join(f"rank {rank}:\n{err[-3000:]}" for rank, err in failed)
    return json.loads((where / "said.json").read_text())


def _data(vocabulary: int) -> tuple[list[Any], list[Any]]:
    import numpy as np

    from llamero.text.messages import SCAFFOLD, Role

    random = np.random.default_rng(0)
    tokens, roles = [], []
    for _ in range(80):
        length = int(random.integers(4, 30))
        tokens.append(random.integers(0, vocabulary, length))
        said = [Role.USER + SCAFFOLD] + [Role.USER] * (length // 3)
        roles.append(np.asarray((said + [Role.ASSISTANT + SCAFFOLD] + [Role.ASSISTANT] * length)[:length]))
    return tokens, roles


def _model(shape: dict[str, Any]) -> Any:
    from llamero.model.config import LlamaConfig
    from llamero.model.llama import Llama, initialize
    from llamero.model.rope import Default

    head_dim = shape["hidden"] // shape["heads"]
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=head_dim,
        rope=Default(10000.0, head_dim),
        max_position_embeddings=64,
        tie_word_embeddings=shape["tied"],
    )
    model = Llama(config)
    initialize(model, seed=0, std=0.2)
    return model


def work(order: dict[str, Any], where: Path) -> None:
    """Train as ordered."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    from llamero.engine.batches import Batches
    from llamero.engine.loop import train
    from llamero.engine.metrics import read_lines
    from llamero.engine.stage import StageConfig
    from llamero.parallel.config import ParallelConfig
    from llamero.parallel.spread import Spread

    shape = SHAPE | order.get("shape", {})
    stage = StageConfig.model_validate(STAGE | order.get("stage", {}))
    tokens, roles = _data(shape["vocabulary"])
    batches = Batches(tokens, roles, stage, seed=1, where="here")
    held = Batches(tokens[:21], roles[:21], stage, seed=1, where="here")

    def export(spread: Spread) -> None:
        tensors = {name: tensor.detach().clone() for name, tensor in spread.whole()}
        if spread.world.speaks:
            save_file(tensors, where / "weights.safetensors")
        spread.world.barrier()

    parallel = ParallelConfig.model_validate({"device": "cpu", "timeout": 60} | order.get("parallel", {}))
    for number in range(order.get("times", 1)):
        directory = where / f"run{number}" if order.get("times") else Path(order.get("directory", where / "run"))
        model = _model(shape)
        train(model, batches, stage, directory, parallel=parallel, validation=held, export=export)
        del model
        gc.collect()
    if os.environ.get("RANK", "0") == "0":
        lines = read_lines(directory / "metrics.jsonl")
        (where / "said.json").write_text(json.dumps(lines))


def main() -> None:
    """Work, and leave without taking the process group down: gloo would abort now and then."""
    from llamero.core.errors import LlameroError
    from llamero.core.interrupt import Interrupted

    path = Path(sys.argv[1])
    code = 0
    try:
        work(json.loads(path.read_text()), path.parent)
    except LlameroError as error:
        sys.stderr.write(f"LlameroError: {error}\n")
        code = 2
    except Interrupted as stopped:
        sys.stderr.write(f"{stopped}\n")
        code = 130
    except Exception:
        import traceback

        traceback.print_exc()
        code = 1
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
