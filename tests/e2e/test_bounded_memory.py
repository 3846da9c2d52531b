"""A corpus larger than the memory that its tokenizing may use."""

import json
import random
import subprocess
import sys

import pytest

from llamero.text.tokenizer import train_bpe

LIMIT = 320 * 2**20
"""Bytes of data that each process may hold, the interpreter and its libraries included."""

LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)  # workers inherit it
from llamero.data.config import MixtureConfig
from llamero.data.run import tokenize_mixture
root, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
mixture = MixtureConfig.model_validate_json(sys.argv[4])
(root / "out").mkdir()
summary = tokenize_mixture(
    "chat", mixture, tokenizer=tokenizer, template="chatml", root=root, seed=1, out=root / "out", team=2
)
print(summary["train"]["total"]["accepted"], summary["val"]["total"]["accepted"])
"""

WORDS = [f"{first}{last}" for first in ("ba", "de", "lo", "mi") for last in range(500)]
ROWS = 30_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    with (root / "corpus.jsonl").open("w") as file:
        for _ in range(ROWS):
            answer = " ".join(draw.choices(WORDS, k=2400))
            file.write(json.dumps({"instruction": "say something", "output": answer}) + "\n")
    tokenizer = train_bpe(iter([" ".join(WORDS)] * 3), vocab_size=265).with_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(root / "tokenizer")
    return root


def test_memory_does_not_grow_with_the_corpus(corpus):
    assert (corpus / "corpus.jsonl").stat().st_size > LIMIT
    source = {"source": "a", "path": "corpus.jsonl", "val_split": 0.01, "max_val_set": 100}
    command = [sys.executable, "-c", LIMITED, str(corpus), str(corpus / "tokenizer"), str(LIMIT)]
    said = subprocess.run([*command, json.dumps({"sources": [source]})], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(ROWS - 100), "100"]
