"""Loading holds the model and one tensor, not the model twice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamero.checkpoint.gguf_write import GgufWriter
from llamero.core.gguf import TYPES, TensorSpec, Value
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


def measured(large, small):
    """Return by how many bytes the peak of a process grows when it loads a model."""
    command = [sys.executable, "-c", MEASURE, str(large), str(small)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


@proc
def test_the_peak_of_loading_is_the_model_and_one_tensor(tmp_path):
    sizes = save(tmp_path / "large", layers=8, vocabulary=4000)
    save(tmp_path / "small", layers=1, vocabulary=10)
    peak = measured(tmp_path / "large", tmp_path / "small")
    slack = 16 * 2**20  # of the allocator
    assert 0.8 * sum(sizes) < peak < sum(sizes) + max(sizes) + slack


def save_gguf(path, *, layers, vocabulary):
    """Write a model whose matrices are blocks of zeros, and return the bytes of its tensors."""
    shape = {
        "block_count": layers, "context_length": 64, "embedding_length": 768, "feed_forward_length": 2048,
        "attention.head_count": 12,
    }  # fmt: skip
    values = {
        "general.architecture": Value("string", "llama"),
        **{f"llama.{key}": Value("uint32", value) for key, value in shape.items()},
        "llama.attention.layer_norm_rms_epsilon": Value("float32", 1e-5),
    }
    sizes = {"attn_q": 768, "attn_k": 768, "attn_v": 768, "attn_output": 768, "ffn_gate": 2048, "ffn_up": 2048}
    matrices = {"token_embd": (vocabulary, 768), "output": (vocabulary, 768)}
    for layer in range(layers):
        matrices |= {f"blk.{layer}.{part}": (rows, 768) for part, rows in sizes.items()}
        matrices[f"blk.{layer}.ffn_down"] = (768, 2048)
    norms = ["output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(layers) for part in ("attn", "ffn"))]
    specs = {f"{name}.weight": TensorSpec(shape, TYPES["Q8_0"]) for name, shape in matrices.items()}
    specs |= {f"{name}.weight": TensorSpec((768,), TYPES["F32"]) for name in norms}
    with GgufWriter(path.parent, path.stem, values, specs) as writer:
        for name, spec in specs.items():
            plain = len(spec.shape) == 1
            writer.add(name, torch.ones(768) if plain else torch.zeros(spec.shape[0], spec.row_bytes).byte())
    return [spec.nbytes for spec in specs.values()]


@proc
def test_a_gguf_file_takes_the_memory_that_it_takes_on_disk(tmp_path):
    sizes = save_gguf(tmp_path / "large.gguf", layers=12, vocabulary=8000)
    save_gguf(tmp_path / "small.gguf", layers=1, vocabulary=10)
    peak = measured(tmp_path / "large.gguf", tmp_path / "small.gguf")
    assert 0.8 * sum(sizes) < peak < sum(sizes) + 2 * max(sizes) + 16 * 2**20  # a turned tensor is there twice
