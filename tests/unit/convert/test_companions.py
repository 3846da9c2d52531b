"""Tokenizers go along with the weights and give the same ids on the other side."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llamero.convert.config import ConvertConfig
from llamero.convert.run import run
from llamero.model.rope import Llama3
from llamero.text.tokenizer import load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared"))
TEXTS = ["Hello world", "  two  spaces\n\n\nand 12345 digits", "Ünïcödé 日本語 🦙", "def f(x):\n    return x**2"]


def model_file(name):
    path = SHARED / "data/tokenizers" / name / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def convert(source, out, to, **options):
    return run(source, out, ConvertConfig(to=to, **options))


def meta_directory(tmp_path, models, **changes):
    """Return a Meta directory as Meta publishes it: params.json, weights, and no more."""
    models.write(tmp_path / "made", **changes)
    convert(tmp_path / "made", tmp_path / "meta", "meta")
    (tmp_path / "meta/config.json").unlink()
    return tmp_path / "meta"


@pytest.mark.parametrize(("name", "ids"), [("llama2", (1, 2)), ("llama3", (128_000, 128_001))])
def test_a_tokenizer_model_becomes_a_tokenizer_json_with_the_same_ids(tmp_path, models, name, ids):
    source = meta_directory(tmp_path, models)
    shutil.copyfile(model_file(name), source / "tokenizer.model")
    report = convert(source, tmp_path / "hf", "hf")
    assert "tokenizer.json was made from tokenizer.model" in report.notes
    was, now = load_tokenizer(source / "tokenizer.model"), load_tokenizer(tmp_path / "hf/tokenizer.json")
    assert all(was.encode(text) == now.encode(text) for text in TEXTS)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == ids


def test_a_tokenizer_that_several_meta_models_share_is_found_above_them(tmp_path, models):
    source = meta_directory(tmp_path, models)
    shutil.copyfile(model_file("llama2"), tmp_path / "tokenizer.model")
    convert(source, tmp_path / "hf", "hf")
    assert (tmp_path / "hf/tokenizer.json").exists()


def test_a_tiktoken_file_comes_back_from_a_tokenizer_json_byte_by_byte(tmp_path, models):
    models.write(tmp_path / "hf")
    load_tokenizer(model_file("llama3")).save(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert "tokenizer.model (tiktoken ranks) was made from tokenizer.json" in report.notes
    assert (tmp_path / "meta/tokenizer.model").read_bytes() == model_file("llama3").read_bytes()


def test_special_tokens_are_those_of_the_release(tmp_path, models):
    source = meta_directory(tmp_path, models, rope=Llama3(5e5, 4, 8.0, 8192, 1.0, 4.0))
    shutil.copyfile(model_file("llama3"), source / "tokenizer.model")
    convert(source, tmp_path / "hf", "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    named = {"<|begin_of_text|>": 128_000, "<|finetune_right_pad_id|>": 128_004, "<|start_header_id|>": 128_006,
             "<|eom_id|>": 128_008, "<|eot_id|>": 128_009, "<|python_tag|>": 128_010,
             "<|reserved_special_token_247|>": 128_255}  # fmt: skip
    assert {token: tokenizer.id(token) for token in named} == named
    assert len(tokenizer) == 128_256


def test_a_tokenizer_json_that_no_tokenizer_model_can_be_goes_along(tmp_path, models):
    models.write(tmp_path / "hf")
    tokenizer = train_bpe(iter(["some words"] * 3), vocab_size=262)
    tokenizer.save(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert any("cannot be written as one" in note for note in report.notes)
    assert any("the tokenizer has 262 tokens, the model only 96 rows" in note for note in report.notes)
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_no_tokenizer_is_said(tmp_path, models):
    models.write(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert "there is no tokenizer in the source: none was written" in report.notes
