"""Tokenizers to test with: one trained here, and the real ones where the shared data is."""

import os
from pathlib import Path

import pytest

from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
REAL = {
    "llama-2": SHARED / "data/tokenizers/llama2",
    "llama-3": SHARED / "data/tokenizers/llama3",
    "ref-7m": SHARED / "data/weights/ref-7m-hf",
}
MARKUP = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
)
TEXTS = ["the cat sat on the mat and the dog sat on the log 12 times, said the user to the assistant\n"] * 3


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    """A byte-level BPE with all markup of all templates."""
    return train_bpe(iter(TEXTS), vocab_size=290).with_tokens(MARKUP)


@pytest.fixture(scope="session", params=["tiny", *REAL])
def tokenizer(request) -> Tokenizer:
    """Each tokenizer in turn, with all markup of all templates."""
    if request.param == "tiny":
        return request.getfixturevalue("tiny")
    if not SHARED.exists():
        pytest.skip("needs the shared data folder")
    return load_tokenizer(REAL[request.param]).with_tokens(MARKUP)
