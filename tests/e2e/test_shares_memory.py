"""A process of four holds a quarter of the model and one tensor, when it starts and when it exports."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from llamero.model.config import from_hf
from llamero.model.llama import Llama
from llamero.model.load import save_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8000,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
LAYOUTS = {
    "fsdp": {},
    "tensor × fsdp": {"tensor": 2},
    "pipeline × tensor": {"tensor": 2, "pipeline": 2},
}


def _load():
    path = Path(__file__).parents[1] / "unit" / "parallel" / "layouts.py"
    spec = importlib.util.spec_from_file_location("layouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_the_peak_of_a_process_is_its_share_and_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    model = Llama(from_hf(CONFIG, where="here"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    for name, layers in {"large": CONFIG["num_hidden_layers"], "small": 2}.items():
        (tmp_path / name).mkdir()
        if name == "small":  # what is imported on the way is not the model's
            model = Llama(from_hf(CONFIG | {"num_hidden_layers": layers, "vocab_size": 10}, where="here"))
        save_model(model, tmp_path / name)
    warm = [
        {"name": f"warm {name}", "start": str(tmp_path / "small"), "parallel": keys, "save": True}
        for name, keys in LAYOUTS.items()
    ]
    orders = [
        {"name": name, "start": str(tmp_path / "large"), "parallel": keys, "save": True}
        for name, keys in LAYOUTS.items()
    ]
    script = str(Path(str(layouts.__file__)).parent / "shares.py")
    ended = layouts.end(layouts.start([*warm, *orders], processes=4, where=tmp_path / "four", script=script))
    assert not any(code for code, _ in ended), [err[-2000:] for _, err in ended]
    slack = 24 * 2**20  # of the allocator, and pages of files
    for name in LAYOUTS:
        everyone = json.loads((tmp_path / "four" / name / "said.json").read_text())
        for one in everyone:
            assert one["holds"] * 4 < 0.3 * sum(sizes)
            assert one["grown"] < one["holds"] * 4 + max(sizes) + slack
            assert one["export"] < 2 * max(sizes) + slack
