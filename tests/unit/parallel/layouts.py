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
import time
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


BY_SOURCE = ("loss/a", "loss/b", "validation_loss/a", "validation_loss/b", "probe_0", "probe_1", "probe_2", "probe_3")
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
    probe: bool
    """Whether something is asked on the way, which fetches weights once more."""
    slow: int
    """Rank that waits a while for its data."""
    stop: dict[str, int]
    """`rank` sends itself `signal` in the forward pass of `step`."""


class Result(NamedTuple):
    """What came of an order."""

    lines: list[dict[str, float]]
    """Of metrics.jsonl."""
    weights: dict[str, Any]
    calls: dict[str, int]
    """How often the first process fetched weights and summed gradients, and what it compiled."""


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


def differences(result: Result, expected: Result, *, rounded: bool = False) -> dict[str, float]:
    """Return the largest relative difference of losses, of gradient norms, and of weights (by tensor).

    What is counted, and what the model says, must be the same; unless numbers are `rounded` to bfloat16.
    """
    pairs = list(zip(result.lines, expected.lines, strict=True))
    found = {
        key: max(
            (abs(a[key] / b[key] - 1) for a, b in pairs if key in b and (key in a or key not in _PROBED)), default=0
        )
        for key in ("loss", "grad_norm", "validation_loss", "tokens", "supervised_tokens", *BY_SOURCE)
    }
    exactly = (*ACCURACY, *(["said"] if any("said" in a for a, _ in pairs) else []))
    for a, b in pairs:
        assert _compared(a) | _PROBED == _compared(b) | _PROBED
        assert rounded or [a.get(key) for key in exactly] == [b.get(key) for key in exactly]
    assert pairs[-1][0]["validation_accuracy"] > 0
    assert result.weights.keys() == expected.weights.keys()
    found["weights"] = max(
        float((result.weights[name] - value).norm() / value.norm()) for name, value in expected.weights.items()
    )
    return found


_PROBED = {"said", "probe_0", "probe_1", "probe_2", "probe_3"}


def _compared(line: dict[str, float]) -> set[str]:
    return {key for key in line if key.partition("/")[0] not in ("time", "slowest")}


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
    from llamero.engine.metrics import read_lines, read_probes
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
        _refuse_unequal_tables(spread)
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
    weights = None
    if "adapter" in order:
        model, weights = _adapt(model, dict(order["adapter"]))
    if "stop" in order and int(os.environ["RANK"]) == order["stop"]["rank"]:
        _stop(model, **order["stop"])
    if order.get("slow") == int(os.environ["RANK"]):
        _wait_for_data(batches)
    with _counted() as calls:
        probe = _probe(model) if order.get("probe", True) else None
        keys: dict[str, Any] = {"parallel": parallel, "validation": held, "probe": probe, "weights": weights}
        train(model, batches, stage, directory, export=export, **keys)
    if os.environ["RANK"] == "0":
        (where / "calls.json").write_text(json.dumps(calls))
        lines = read_lines(directory / "metrics.jsonl")
        said = {probe["step"]: probe["samples"][0]["text"] for probe in read_probes(directory / "probes.jsonl")}
        for line in lines:
            line |= {"said": said[line["step"]]} if line["step"] in said else {}
        (where / "lines.json").write_text(json.dumps(lines))


def _refuse_unequal_tables(spread: Any) -> None:
    """Fail where the ends of a pipeline both hold a table, and not in the same bits."""
    import torch

    from llamero.parallel.world import local

    world = spread.world
    own = {name: local(p).detach().clone() for name, p in spread.named().items() if name == "model.embed_tokens.weight"}
    found = world.gather(own)
    if world.mesh is None or not spread.config.tie_word_embeddings:
        return
    places = world.mesh.mesh.flatten(1).tolist()
    holders = [bool(found[ranks[0]]) for ranks in places]
    assert holders == [place in (0, len(places) - 1) for place in range(len(places))]
    for first, last in zip(places[0], places[-1], strict=True):
        for name, table in found[first].items():
            assert torch.equal(table, found[last][name]), f"ranks {first} and {last} differ in {name}"


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Count what is compiled, and the collectives of FSDP; what they are called depends on torch's version."""
    import torch
    import torch._dynamo.utils
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
    torch._dynamo.utils.counters.clear()
    yield calls
    calls["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    calls["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    for (_, name), function in real.items():
        setattr(dist, name, function)


def _adapt(model: Any, config: dict[str, Any]) -> tuple[Any, Any]:
    """Attach an adapter whose both factors matter from the first step on, or one that is yet to be filled."""
    import torch

    from llamero.model.adapter_config import AdapterConfig
    from llamero.model.adapters import attach, updates
    from llamero.model.linear import pack, shells
    from llamero.model.load import empty_model
    from llamero.model.weights import Adapted, Held

    form, streamed = config.pop("packed", None), config.pop("streamed", None)
    model.to(getattr(torch, config.pop("dtype", "float32")))
    said = AdapterConfig.model_validate({"lora": 4, "base": form, **config})
    if streamed:
        empty = empty_model(model.config)
        encoded = shells(empty, form) if form else []
        attach(empty, said, seed=1)
        return empty, Adapted(Held(model), empty, said, seed=1, encoded=encoded)
    if form:
        pack(model.model.layers, form)
    attach(model, said, seed=1)
    if streamed is None:
        generator = torch.Generator().manual_seed(1)
        for layer in updates(model).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)
    return model, None


def _probe(model: Any) -> Any:
    """Return two questions, and a prompt that the whole model answers."""
    from llamero.engine.probes import Probe
    from llamero.infer.generate import generate
    from llamero.infer.sampler import Sampling
    from llamero.train.probe import whole_model

    def speak(spread: Any) -> list[Any]:
        whole = whole_model(model, spread)
        if whole is None:
            return []
        (said,) = generate(whole, [[1, 2, 3]], Sampling(temperature=0, max_new_tokens=5))
        return [{"prompt": "1 2 3", "text": " ".join(map(str, said.ids))}]

    def judge(found: Any) -> dict[str, float]:
        return {f"probe_{n}": value for n, value in enumerate(value for values in found for value in values)}

    questions = [[([3, 4, 5], [6]), ([3, 4, 5], [7, 8, 9])], [([10], [11, 12]), ([10, 11], [60])]]
    return Probe(2, questions, judge, speak)


def _wait_for_data(batches: Any, seconds: float = 1.5) -> None:
    assemble = batches.assemble

    def late(rows: Any) -> Any:
        time.sleep(seconds)
        return assemble(rows)

    batches.assemble = late


def _stop(model: Any, *, rank: int, signal: int, step: int) -> None:
    """Let this process be hit by a signal in the forward pass of some step."""
    import torch

    calls = [0]

    def hit(*_: object) -> None:
        calls[0] += torch.is_grad_enabled()  # a probe's passes are not of a step
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
