"""Quantizing in processes of its own, which can be killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.text.tokenizer import train_bpe

SHAPE = LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Default(10000.0, 16),
    max_position_embeddings=64,
)


class Victims:
    """Runs what `victim.py` is ordered to."""

    variants = (
        "gptq-4bit-32g-actorder_True",
        "gptq-3bit-32g-actorder_False",
        "awq-4bit-32g",
        "gptq-4bit-32g-actorder_static-ct",
        "gguf-Q4_0",
        "nf4",
    )

    def __init__(self, process, model):
        self._process, self._model = process, model

    def run(self, root, *, config=None, calibration=None, **said):
        """What became of a child; of each, where there are several `processes`. The rest is as in `Order`."""
        config = {"variants": self.variants, "sensitivity": 64} if config is None else config
        order = {"root": str(root), "model": str(self._model), "config": config, "calibration": calibration or {}}
        order |= {"at": 0, "largest_file": 0, "seed": 2, "processes": 1, "victim": 0, "how": "kill", "timeout": 60}
        self._process.stdin.write(json.dumps(order | {"group_tokens": 2048, "broken": 0} | said) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def content(self, root):
        """All files but those that are of use only to go on."""
        found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        passing = ("progress/", "kept/.digests")
        return {name: path.read_bytes() for name, path in found.items() if not name.startswith(passing)}


@pytest.fixture(scope="package")
def victims(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "plain"
    model = Llama(SHAPE)
    initialize(model, seed=1, std=0.3)
    directory.mkdir()
    save_model(model, directory)
    train_bpe(iter(["the cat sat on the mat, 12 times"]), vocab_size=270, split_digits=False).save(directory)
    command = [sys.executable, str(Path(__file__).parent / "victim.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Victims(process, directory)
