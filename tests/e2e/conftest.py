"""A recipe small enough to go the whole way in seconds, run as a user runs it: in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SMALL = """\
name: small
seed: 3
template: chatml
base:
  shape: {hidden: 32, layers: 2, heads: 2, mlp: 64, context: 128}
  vocabulary: {size: 400, mixture: world}
data:
  extra_tokens: ["<|im_start|>", "<|im_end|>"]
  mixtures:
    world: {sources: [{toy_world: documents, count: 600, val_split: 0.05}]}
    questions: {sources: [{toy_world: conversations, count: 300, val_split: 0.1}]}
train:
  - {name: lm, objective: lm, mixture: world, sequence: 64, batch: 8, steps: 30, lr: 1.0e-3, save_every: 5}
  - {name: sft, mixture: questions, sequence: 96, batch: 8, steps: 20, lr: 1.0e-3, save_every: 5}
quantize:
  calibration: {mixture: questions, sequence: 64, tokens: 2048}
  variants: [gptq-4bit-32g-actorder_True, rtn-4bit-32g]
evaluate:
  - {tasks: toy_world, per_category: 8}
  - {tasks: perplexity, validation: [world], window: 64, stride: 32, models: [final, variants]}
publish: {license: apache-2.0, languages: [en]}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def start(*arguments, cwd=ROOT, **options):
    """Start llamero and return its process."""
    command = [sys.executable, "-m", "llamero.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def llamero(*arguments, cwd=ROOT, code=0):
    """Run llamero to its end and return what it printed."""
    process = start(*arguments, cwd=cwd)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="session")
def shared():
    import os

    path = Path(os.environ.get("LLAMERO_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("no folder `shared` with real files beside the repository")
    return path
