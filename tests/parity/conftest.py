"""Peers in environments of their own, and a small trained model to give them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.text.tokenizer import load_tokenizer
from parity.peers import ROOT, Peer

SHARED = Path(os.environ.get("LLAMERO_SHARED", ROOT.parent / "shared"))
TRAINED = SHARED / "data/weights/ref-7m-hf"
TEXTS = SHARED / "data/longtext/wikitext2"


@pytest.fixture(scope="session")
def peer():
    """Return a peer by its name; a test whose peer is not there skips and says how to get it."""

    def get(name: str) -> Peer:
        found = Peer(name)
        if found.absent:
            pytest.skip(found.absent)
        return found

    return get


@pytest.fixture(scope="session")
def trained():
    """Directory of the trained model, whose rows are multiples of 256."""
    if not TRAINED.exists():
        pytest.skip(f"needs the shared data folder ({TRAINED})")
    return TRAINED


@pytest.fixture(scope="session")
def two_layers(trained, tmp_path_factory):
    """Directory of the first two layers of the trained model, in bfloat16."""
    directory = tmp_path_factory.mktemp("two_layers")
    for file in trained.glob("*.json"):
        shutil.copyfile(file, directory / file.name)
    config = json.loads((trained / "config.json").read_text()) | {"num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(trained / "model.safetensors")
    gone = tuple(f"model.layers.{number}." for number in range(2, 6))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def text(trained):
    """Return rows of tokens of WikiText-2: `text("valid", 8, 128)`, which was trained on, or `test`, which was not."""
    tokenizer = load_tokenizer(trained)

    def rows(split: str, count: int, length: int) -> torch.Tensor:
        characters = (TEXTS / f"{split}.txt").read_text()[: 12 * count * length]
        return torch.tensor(tokenizer.encode(characters)[: count * length]).view(count, length)

    return rows


@pytest.fixture(scope="session")
def questions(text, tmp_path_factory):
    """Rows of tokens that every program reads, and the file in which peers find them."""
    ids, path = text("test", 2, 128), tmp_path_factory.mktemp("questions") / "ids.safetensors"
    save_file({"ids": ids.to(torch.int32)}, path)
    return ids, path
