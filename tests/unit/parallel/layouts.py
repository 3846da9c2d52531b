"""Trains a tiny model in some layouts, one after the other, and writes what came of each.

    python layouts.py ORDERS.json

in an environment as `torchrun` makes it. The file has a list of orders; see `Order`. Tests take `run` from here.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

SHAPE = {"hidden": 32, "mlp": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 67, "tied": False, "std": 0.2}
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
    "dropout": {"hidden": 0.2, "lima": True, "attention": 0.1},
    "neftune": 5,
    "z_loss": 1e-4,
}


BY_SOURCE = ("loss/a", "loss/b", "validation_loss/a", "validation_loss/b")
ACCURACY = ("validation_accuracy", "validation_accuracy/a", "validation_accuracy/b")


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Order(TypedDict, total=False):
    """One training run."""

    name: Required[str]
    parallel: dict[str, Any]
    stage: dict[str, Any]
    shape: dict[str, Any]
    adapter: dict[str, Any]
    """What to train in place of the weights; `packed` is the form of the base."""
    directory: str
    """Of checkpoints and metrics, to go on with those of another order; one of its own where it is not given."""
    stop: dict[str, int]
    """`rank` sends itself `signal` in the forward pass of `step`."""


class Result(NamedTuple):
    """What came of an order."""

    lines: list[dict[str, float]]
    """Of metrics.jsonl."""
    weights: dict[str, Any]
    calls: dict[str, int]
    """How often the first process fetched weights and summed gradients."""


def start(orders: list[Any], *, processes: int, where: Path, script: str = __file__) -> list[subprocess.Popen[str]]:
    """Start the processes that carry out some orders: those of a script."""
    where.mkdir(parents=True, exist_ok=True)
    path = where / "orders.json"
    path.write_text(json.dumps(orders))
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    about |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, script, str(path)],
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def end(running: list[subprocess.Popen[str]], *, seconds: float = 240) -> list[tuple[int, str]]:
    """Return exit code and standard error of each process."""
    said = [process.communicate(timeout=seconds)[1] for process in running]
    return [(process.returncode, err) for process, err in zip(running, said, strict=True)]


def run(orders: list[Order], *, processes: int, where: Path) -> dict[str, Result]:
    """Return what came of each order."""
    from safetensors.torch import load_file

    ended = end(start(orders, processes=processes, where=where))
    assert not any(code for code, _ in ended), "\n".join(f"rank {r}: {err[-3000:]}" for r, (_, err) in enumerate(ended))
    return {
        order["name"]: Result(
            json.loads((where / order["name"] / "lines.json").read_text()),
            load_file(where / order["name"] / "weights.safetensors"),
            json.loads((where / order["name"] / "calls.json").read_text()),
        )
        for order in orders
    }


def differences(result: Result, expected: Result) -> dict[str, float]:
    """Return the largest relative difference of losses, of gradient norms, and of weights (by tensor)."""
    pairs = list(zip(result.lines, expected.lines, strict=True))
    found = {
        key: max(abs(a[key] / b[key] - 1) for a, b in pairs if key in b)
        for key in ("loss", "grad_norm", "validation_loss", "tokens", "supervised_tokens", *BY_SOURCE)
    }
    for a, b in pairs:
        assert {key for key in a if key.partition("/")[0] not in ("time", "slowest")} == {
            key for key in b if key.partition("/")[0] not in ("time", "slowest")
        }
        assert [a.get(key) for key in ACCURACY] == [b.get(key) for key in ACCURACY]
    assert pairs[-1][0]["validation_accuracy"] > 0
    assert result.weights.keys() == expected.weights.keys()
    found["weights"] = max(
        float((result.weights[name] - value).norm() / value.norm()) for name, value in expected.weights.items()
    )
    return found


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
    initialize(model, seed=0, std=shape["std"])
    return model


def work(order: Order, where: Path) -> None:
    """Train as ordered."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    from llamero.corpus.dataset import Sources
    from llamero.engine.batches import Batches
    from llamero.engine.loop import train
    from llamero.engine.metrics import read_lines
    from llamero.engine.stage import StageConfig
    from llamero.parallel.config import ParallelConfig
    from llamero.parallel.spread import Spread

    where.mkdir(exist_ok=True)
    shape = SHAPE | order.get("shape", {})
    stage = StageConfig.model_validate(STAGE | order.get("stage", {}))
    tokens, roles = _data(shape["vocabulary"])
    sources, few = (Sources(("a", "b"), (7, end)) for end in (len(tokens), 21))
    batches = Batches(tokens, roles, stage, seed=1, where="here", sources=sources)
    held = Batches(tokens[:21], roles[:21], stage, seed=1, where="here", sources=few)

    def export(spread: Spread) -> None:
        tensors = {name: tensor.detach().clone() for name, tensor in spread.whole(trained=True)}
        if "adapter" in order:
            tensors |= {f"plain.{name}": tensor.detach().clone() for name, tensor in spread.plain()}
        if spread.world.speaks:
            save_file(tensors, where / "weights.safetensors")
        spread.world.barrier()

    processes = {"gpus": int(os.environ["WORLD_SIZE"]), "device": "cpu", "timeout": 60}
    parallel = ParallelConfig.model_validate(processes | order.get("parallel", {}))
    directory = Path(order.get("directory", where / "run"))
    model = _model(shape)
    if "adapter" in order:
        _adapt(model, dict(order["adapter"]))
    if "stop" in order and int(os.environ["RANK"]) == order["stop"]["rank"]:
        _stop(model, **order["stop"])
    with _counted() as calls:
        train(model, batches, stage, directory, parallel=parallel, validation=held, export=export)
    if os.environ["RANK"] == "0":
        (where / "calls.json").write_text(json.dumps(calls))
        (where / "lines.json").write_text(json.dumps(read_lines(directory / "metrics.jsonl")))


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Count the collectives of FSDP; what they are called depends on torch's version."""
    import torch.distributed as dist

    kinds = {
        "all_gather": ("all_gather_into_tensor", "all_gather_single"),
        "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
        "all_reduce": ("all_reduce",),
    }
    calls = dict.fromkeys(kinds, 0)
    real = {(kind, name): getattr(dist, name) for kind, names in kinds.items() for name in names if hasattr(dist, name)}

    def counting(kind: str, function: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            calls[kind] += 1
            return function(*args, **keys)

        return call

    for (kind, name), function in real.items():
        setattr(dist, name, counting(kind, function))
    yield calls
    for (_, name), function in real.items():
        setattr(dist, name, function)


def _adapt(model: Any, config: dict[str, Any]) -> None:
    """Attach an adapter whose both factors matter from the first step on."""
    import torch

    from llamero.model.adapter_config import AdapterConfig
    from llamero.model.adapters import attach, updates
    from llamero.model.linear import pack

    model.to(getattr(torch, config.pop("dtype", "float32")))
    if form := config.pop("packed", None):
        pack(model.model.layers, form)
    attach(model, AdapterConfig.model_validate({"lora": 4, **config}), seed=1)
    generator = torch.Generator().manual_seed(1)
    for layer in updates(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)


def _stop(model: Any, *, rank: int, signal: int, step: int) -> None:
    """Let this process be hit by a signal in the forward pass of some step."""
    calls = [0]

    def hit(*_: object) -> None:
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal)

    model.model.layers[0].register_forward_hook(hit)


def main() -> None:
    """Work, and leave without taking the process group down: gloo would abort now and then."""
    from llamero.core.errors import LlameroError
    from llamero.core.interrupt import Interrupted

    path = Path(sys.argv[1])
    code = 0
    try:
        for order in json.loads(path.read_text()):
            work(order, path.parent / order["name"])
            gc.collect()
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
