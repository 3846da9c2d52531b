"""A small tokenizer with the markup of every template, as files."""

from pathlib import Path

import pytest

from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

MARKUP = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
TEXTS = ["the cat sat on the mat and the dog sat on the log 12 times, said the user to the assistant\n"] * 3


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> Path:
    """Directory of the tokenizer."""
    out = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(TEXTS), vocab_size=290).with_tokens(MARKUP).save(out, chat_template=None)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_files) -> Tokenizer:
    """It, loaded."""
    return load_tokenizer(tokenizer_files)
