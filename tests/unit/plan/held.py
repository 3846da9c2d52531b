"""What real processes hold in a step, to be compared with a plan.

    python held.py ORDERS.json

in an environment as `torchrun` makes it; writes `held<rank>.json` beside the file: for each order the bytes of weights,
gradients, optimizer and of what autograd saved in one forward pass.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

SHAPE = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2}


def shape(layers: int = 4, **keys: Any) -> Any:
    """Return a small config."""
    from llamero.model.config import LlamaConfig
    from llamero.model.rope import Default

    about: dict[str, Any] = SHAPE | {"num_layers": layers, "head_dim": 16, "max_position_embeddings": 128} | keys
    return LlamaConfig(**about, rope=Default(10000.0, 16))


def stage(**keys: Any) -> Any:
    """Return a small stage."""
    from llamero.engine.stage import StageConfig

    return StageConfig.model_validate({"name": "s", "mixture": "m", "sequence": 64, "batch": 16, "steps": 3} | keys)


def held(order: dict[str, Any]) -> dict[str, int]:
    """Return what this process holds."""
    import torch

    from llamero.engine.loop import autocast
    from llamero.engine.optimizer import adamw
    from llamero.model.llama import Llama
    from llamero.parallel.config import ParallelConfig
    from llamero.parallel.part import Micro
    from llamero.parallel.spread import Spread
    from llamero.parallel.world import World, local

    gpus = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig.model_validate({"gpus": gpus, "device": "cpu"} | order["parallel"])
    config, what = shape(**order.get("shape", {})), stage(**order.get("stage", {}))
    world = World(parallel)
    with torch.device("meta"):
        model = Llama(config)
    spread = Spread(
        model, world, batch=what.batch, sequence=what.sequence, autocast=autocast(what, torch.device("cpu"))
    )
    spread.allocate()
    for parameter in spread.named().values():
        torch.nn.init.normal_(local(parameter.detach()), std=0.02)
    rows, length = spread.passes.rows, spread.passes.tokens
    ids = torch.zeros(rows * length, dtype=torch.int64)
    micro = Micro(ids, (length,) * rows, torch.arange(len(ids)), ids.clone(), torch.ones(len(ids)))
    parameters = spread.named()
    optimizer = adamw(spread.module, what)

    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    kept = 0
    if parallel.pipeline == 1:
        (part,) = spread.parts
        part.micros = [micro.padded(-(-len(ids) // parallel.tensor) * parallel.tensor)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = part(None, 0)
        # what FSDP has given back has no bytes by now, what it still has is a parameter of the part
        known = [*parameters.values(), *part.parameters(), *(t for t in part.micros[0] if isinstance(t, torch.Tensor))]
        addresses = {_storage(tensor).data_ptr() for tensor in known}
        kept = sum({s.data_ptr(): s.nbytes() for s in map(_storage, saved) if s.data_ptr() not in addresses}.values())
        del out
    saved.clear()
    spread.losses([micro] * spread.passes.count, total=1.0)
    for parameter in parameters.values():
        assert parameter.grad is not None
    gradients = _bytes(p.grad for p in parameters.values())
    spread.clip(1.0)
    optimizer.step()
    state = _bytes(value for state in optimizer.state.values() for value in state.values())
    weights = _bytes(parameters.values())
    place = world.along("pipeline")
    return {
        "place": place, "weights": weights, "gradients": gradients, "optimizer": state, "saved": kept
    }  # fmt: skip


def _storage(tensor: Any) -> Any:
    from llamero.plan.weigh import storages

    (storage,) = storages([tensor])
    return storage


def _bytes(tensors: Any) -> int:
    from llamero.plan.weigh import nbytes

    return nbytes(tensors)


def main() -> None:
    """Hold, and leave without taking the process group down: gloo would abort now and then."""
    path, code = Path(sys.argv[1]), 0
    try:
        found = {}
        for order in json.loads(path.read_text()):
            found[order["name"]] = held(order)
            gc.collect()
        (path.parent / f"held{os.environ['RANK']}.json").write_text(json.dumps(found))
    except Exception:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
