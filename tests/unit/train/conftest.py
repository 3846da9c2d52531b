"""A tokenizer and a tokenized mixture to train on."""

from pathlib import Path

import pytest

from llamero.data.config import DataConfig, MixtureConfig
from llamero.data.run import tokenize_mixture
from llamero.data.vocabulary import prepare_tokenizer
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

WORDS = "the cat sat on the mat and the dog sat on the log\n"


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> Path:
    """Directory of a small tokenizer."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([WORDS * 3]), vocab_size=265).save(base)
    data = DataConfig(extra_tokens=["<|im_start|>", "<|im_end|>"])
    prepare_tokenizer(data, base, template="chatml", root=base, out=out)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_files) -> Tokenizer:
    """It, loaded."""
    return load_tokenizer(tokenizer_files)


@pytest.fixture(scope="session")
def data(tmp_path_factory, tokenizer_files) -> Path:
    """Directory of a tokenized mixture with a validation split."""
    root = tmp_path_factory.mktemp("data")
    rows = [f'{{"instruction": "cat {n}", "output": "the dog {n * n}"}}' for n in range(60)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    source = {"source": "rows", "path": "rows.jsonl", "val_split": 0.1}
    mixture = MixtureConfig.model_validate({"sources": [source]})
    out = root / "mixture"
    out.mkdir()
    tokenize_mixture("chat", mixture, tokenizer=tokenizer_files, template="chatml", root=root, seed=1, out=out)
    return out
