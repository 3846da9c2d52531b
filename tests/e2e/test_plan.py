"""A plan's bytes against what real processes hold in a step."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.parallel.config import ParallelConfig
from llamero.plan.memory import memory

UNIT = Path(__file__).parents[1] / "unit"

ORDERS = {
    1: {
        "alone": {"parallel": {"micro_batch": 2}},
        "tied": {"parallel": {"micro_batch": 2}, "shape": {"tie_word_embeddings": True}},
    },
    2: {
        "fsdp": {"parallel": {"micro_batch": 4}},
        "tensor": {"parallel": {"tensor": 2, "micro_batch": 4}},
        "pipeline": {"parallel": {"pipeline": 2}},
        "tied-pipeline": {"parallel": {"pipeline": 2}, "shape": {"tie_word_embeddings": True}},
    },
    4: {
        "fsdp-tensor": {"parallel": {"tensor": 2, "micro_batch": 2}},
        "pipeline-tensor": {"parallel": {"pipeline": 2, "tensor": 2}},
        "tied-pipeline-fsdp": {"parallel": {"pipeline": 2, "zero": 3}, "shape": {"tie_word_embeddings": True}},
    },
}


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


held = _load(UNIT / "plan" / "held.py")
layouts = _load(UNIT / "parallel" / "layouts.py")


def really_held(orders, processes, where):
    path = where / "orders.json"
    path.write_text(json.dumps([{"name": name, **order} for name, order in orders.items()]))
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(layouts.free_port()), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, str(UNIT / "plan" / "held.py"), str(path)],
            env={**os.environ, **about, "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    ended = layouts.end(running)
    assert not any(code for code, _ in ended), "\n".join(said[-3000:] for _, said in ended)
    return [json.loads((where / f"held{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("processes", ORDERS)
def test_a_plan_says_what_processes_hold(processes, tmp_path):
    real = really_held(ORDERS[processes], processes, tmp_path)
    for name, order in ORDERS[processes].items():
        parallel = ParallelConfig.model_validate({"gpus": processes, **order["parallel"]})
        planned = memory(held.shape(**order.get("shape", {})), held.stage(), parallel, device="cpu")
        for place, plan in enumerate(planned):
            found = real[place * (processes // parallel.pipeline)][name]
            assert found["place"] == place
            resting = {"weights": plan.weights, "gradients": plan.gradients, "optimizer": plan.optimizer}
            if parallel.pipeline > 1 and parallel.data > 1:
                # torch's pipelines sum gradients over processes after the last micro-batch: they are whole until then
                whole = resting.pop("gradients")
                assert found["gradients"] < whole <= parallel.data * found["gradients"], name
            assert resting == {key: found[key] for key in resting}, name
            if processes == 1:  # FSDP's whole weights and a spread head's gradients are saved beside activations
                assert found["saved"] == plan.activations, name
