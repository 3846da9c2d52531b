"""Loads models in some layouts, one after the other, and writes what came of each.

    python shares.py ORDERS.json

in an environment as `torchrun` makes it; `layouts.start` starts it. The file has a list of orders; see `Order`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, Required, TypedDict


class Order(TypedDict, total=False):
    """One model in one layout."""

    name: Required[str]
    start: str
    """Directory of the model; a fresh one of `config` where it is not given."""
    config: dict[str, Any]
    """Of a fresh model, as Hugging Face writes it."""
    grow: dict[str, Any]
    """`known` and `size` of its vocabulary, and `new_rows`."""
    adapter: dict[str, Any]
    """Attached to it."""
    parallel: dict[str, Any]
    save: bool
    """Whether to export, too."""


class Counted:
    """Weights that count what is read of them."""

    def __init__(self, of: Any) -> None:
        self.of, self.read = of, 0

    def part(self, name: str, region: Any) -> Any:
        """Return a part."""
        value = self.of.part(name, region)
        self.read += value.numel()
        return value


def forget_peak() -> int:
    """Let the peak begin anew and return the bytes that this process has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the most bytes that this process had."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def opened(order: Order) -> tuple[Any, Any]:
    """Return a model without storage, and its weights."""
    from dataclasses import replace

    from llamero.checkpoint.hf import open_tensors
    from llamero.model.adapter_config import AdapterConfig
    from llamero.model.adapters import attach
    from llamero.model.config import from_hf
    from llamero.model.load import empty_model, load_config
    from llamero.model.weights import Adapted, Fresh, Grown, Stored

    start = order.get("start")
    if start is None:
        model = empty_model(from_hf(order.get("config", {}), where="here"))
        return model, Fresh(model, seed=3)
    directory = Path(start)
    model = empty_model(load_config(directory))
    weights: Any = Stored(model, open_tensors(directory))
    grow = order.get("grow")
    if grow is not None:
        rows, width = model.config.vocab_size, model.config.hidden_size
        weights = Grown(weights, rows, width, **grow)
        model = empty_model(replace(model.config, vocab_size=grow["size"]))
    adapter = order.get("adapter")
    if adapter is not None:
        config = AdapterConfig.model_validate(adapter)
        attach(model, config, seed=3)
        weights = Adapted(weights, model, config, seed=3)
    return model, weights


def work(order: Order, where: Path) -> None:
    """Load as ordered."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    from llamero.parallel.config import ParallelConfig
    from llamero.parallel.spread import Spread
    from llamero.parallel.world import World, local
    from llamero.train.run import save_spread

    where.mkdir(exist_ok=True)
    processes = {"gpus": int(os.environ["WORLD_SIZE"]), "device": "cpu", "timeout": 60, "micro_batch": 1}
    world = World(ParallelConfig.model_validate(processes | order.get("parallel", {})))
    with world.together():
        model, weights = opened(order)
    before = forget_peak()
    counted = Counted(weights)
    spread = Spread(model, world, batch=16, sequence=8)
    spread.allocate()
    with world.together():
        spread.fill(counted)
    said: dict[str, Any] = {"grown": peak() - before, "read": counted.read}
    said["holds"] = sum(local(parameter).numel() for parameter in spread.named().values())
    if order.get("save"):
        before = forget_peak()
        save_spread(spread, where, dtype=torch.bfloat16)
        said["export"] = peak() - before
    else:
        tensors = {name: tensor.detach().clone() for name, tensor in spread.whole()}
        if world.speaks:
            save_file(tensors, where / "weights.safetensors")
    everyone = world.gather(said)
    if world.speaks:
        (where / "said.json").write_text(json.dumps(everyone))
    world.barrier()


def main() -> None:
    """Work, and leave without taking the process group down: gloo would abort now and then."""
    from llamero.core.errors import LlameroError

    path = Path(sys.argv[1])
    code = 0
    try:
        for order in json.loads(path.read_text()):
            work(order, path.parent / order["name"])
            gc.collect()
    except LlameroError as error:
        sys.stderr.write(f"LlameroError: {error}\n")
        code = 2
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
