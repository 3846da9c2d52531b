"""Converting holds one layer and what is written at a time, never the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.model.rope import Default

MEASURE = """
import sys
from pathlib import Path
from llamero.convert.config import ConvertConfig
from llamero.convert.run import run
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
small, large, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
for number, step in enumerate(way):  # what torch imports on the way is not the conversion's
    options = ConvertConfig.model_validate_json(sys.argv[4 + number])
    run(small, small.with_name(f"small-{number}"), options)
    small = small.with_name(f"small-{number}")
before = peak()
for number, step in enumerate(way):
    options = ConvertConfig.model_validate_json(sys.argv[4 + number])
    report = run(large, large.with_name(f"large-{number}"), options)
    large = large.with_name(f"large-{number}")
    assert report.peak_bytes >= peak()
print(peak() - before, report.largest_bytes)
"""

WAYS = {
    "Meta shards and Megatron ranks": ['{"to": "meta", "shards": 4}', '{"to": "megatron", "tensor": 2, "pipeline": 2}'],
    "one Megatron file": ['{"to": "megatron"}', '{"to": "hf"}'],
    "Megatron ranks": ['{"to": "megatron", "tensor": 4, "pipeline": 2}', '{"to": "hf"}'],
    "one Meta file": ['{"to": "meta"}', '{"to": "hf"}'],
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if number == 0 else pytest.mark.slow) for number, way in enumerate(WAYS)]
)
def test_the_peak_of_a_conversion_is_a_layer_and_what_is_written(tmp_path, models, way):
    large = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "rope": Default(1e4, 64)}
    models.write(tmp_path / "small", vocab_size=128)
    models.write(tmp_path / "large", **large, intermediate_size=1024, num_layers=16, vocab_size=2000)
    size = (tmp_path / "large/model.safetensors").stat().st_size
    steps = WAYS[way]
    names = ",".join(map(str, range(len(steps))))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), names, *steps]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "262144",
    }  # what is freed goes back: only what is held counts
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    used, layer = map(int, ran.stdout.split())
    slack = 12 * 2**20  # of the allocator
    assert used < 2 * layer + slack < size / 4  # it would be the whole model, or a share of it
