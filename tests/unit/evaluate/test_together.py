"""Processes that measure together: a kill, other processes, and the same bytes as one that was left alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
MODEL, DATA = SHARED / "weights/tinystories-656k-hf", SHARED / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="no shared data folder (set LLAMERO_SHARED)"),
]


def command(out, *before):
    tasks = ["--tasks", "truthfulqa_mc", "--data", str(DATA), "--limit", "25"]
    out = ["--out", str(out), "--json", f"{out}.json"]
    return [sys.executable, *before, "-m", "llamero.cli", "evaluate", str(MODEL), *tasks, *out]


def test_two_processes_go_on_where_one_was_killed_and_end_with_the_bytes_of_one(tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command(whole), check=True, env=environment, capture_output=True)
    with subprocess.Popen(command(other), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        while one.poll() is None and not any(f.stat().st_size for f in other.glob("scores/*/0.jsonl")):
            time.sleep(0.02)
        one.kill()
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = subprocess.run(command(other, *two), check=True, env=environment, capture_output=True, text=True)
    assert said.stdout.count("truthfulqa_mc: 25 of") == 1  # one of them speaks
    assert (other / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    first, second = (json.loads(Path(f"{out}.json").read_text()) for out in (whole, other))
    assert first["results"] == second["results"]
    assert not (other / "scores").exists()
