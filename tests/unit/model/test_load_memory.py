"""Loading holds the model and one tensor, not the model twice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.model.load import save_model
from llamero.model.rope import Default

MEASURE = """
import sys, torch
from pathlib import Path
from llamero.model.load import load_model
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
load_model(Path(sys.argv[2]))  # what torch imports on the way is not the model's
before = peak()
model = load_model(Path(sys.argv[1]), dtype=torch.float32)
print(peak() - before)
"""


def save(directory, *, layers, vocabulary):
    """Save a model of the given size and return the bytes of its tensors."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        rope=Default(1e4, 64),
        max_position_embeddings=64,
    )
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    directory.mkdir()
    save_model(model, directory)
    return [parameter.numel() * 4 for parameter in model.parameters()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_peak_of_loading_is_the_model_and_one_tensor(tmp_path):
    sizes = save(tmp_path / "large", layers=8, vocabulary=4000)
    save(tmp_path / "small", layers=1, vocabulary=10)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    slack = 16 * 2**20  # of the allocator
    assert 0.8 * sum(sizes) < int(ran.stdout) < sum(sizes) + max(sizes) + slack
