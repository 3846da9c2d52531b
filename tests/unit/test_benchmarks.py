"""The benchmark of training says what it means to: at a size that takes a second."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llamero.model.load import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("train_vs_trl", BENCHMARKS / "train_vs_trl.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_vs_trl"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["tiny", "tiny-lora"])
def test_training_is_measured_step_by_step(benchmark, tmp_path, name):
    work = benchmark.Work(64, 2, 3, 17, benchmark.SHAPES[name])
    benchmark.fresh_model(work, tmp_path / "model")
    found = benchmark.llamero(tmp_path, work)
    assert [len(each) for each in (found.seconds, found.losses, found.tokens, found.flops)] == [3] * 4
    assert min(found.seconds) > 0
    assert found.losses[-1] < found.losses[0] + 0.1
    assert all(64 < tokens <= 128 for tokens in found.tokens)


def test_the_arithmetic_of_a_step_is_what_torch_counts(benchmark, tmp_path):
    shape = benchmark.SHAPES["tiny"]
    work = benchmark.Work(64, 2, 1, 17, shape)
    benchmark.fresh_model(work, tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.int64)).sum().backward()
    said = shape.flops([64], 64)
    scores = 6 * shape.layers * shape.heads * shape.head_dim * 64**2  # attention is an operator that torch cannot count
    assert counter.get_total_flops() == pytest.approx(said - scores)
    adapted = benchmark.SHAPES["tiny-lora"].flops([64], 64)
    assert adapted - scores == pytest.approx((said - scores) * 2 / 3)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_of_a_billion_parameters_keeps_a_gpu_busy(benchmark, tmp_path):
    work = benchmark.Work(4096, 8, 6, 17, benchmark.SHAPES["1b"], "cuda")
    benchmark.fresh_model(work, tmp_path / "model")
    found = benchmark.llamero(tmp_path, work)
    kind = benchmark.of_device(torch.cuda.get_device_name())
    assert kind is not None
    assert sum(found.flops) / sum(found.seconds) > 0.45 * kind.tflops["bf16"] * 1e12
