"""Where results of benchmarks go: one line of JSON each, in `results/`, with what they were measured on."""

import json
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def single_thread_environment() -> dict[str, str]:
    """Return the environment of a process that must not use more than one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def append(benchmark: str, *, value: float, unit: str, seed: int, libraries: tuple[str, ...] = (), **more: Any) -> None:
    """Append one result to `results/<benchmark>.jsonl`."""
    line = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        **{name: version(name) for name in libraries},
        "seed": seed,
        "value": value,
        "unit": unit,
        **more,
    }
    path = HERE / "results" / f"{benchmark}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _commit() -> str:
    """Return the commit, with a + if the source was changed since."""
    commit = _git("rev-parse", "--short", "HEAD")
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", "../src", ".") else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
