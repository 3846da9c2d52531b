"""Token ids that llama.cpp recorded for Llama 2 and Llama 3 (models/ggml-vocab-*.gguf.{inp,out})."""

import os
from pathlib import Path

import pytest

from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
TOKENIZERS = SHARED / "data/tokenizers"
RECORDED = {
    "llama2": ("ggml-vocab-llama-spm.gguf", 32000),
    "llama3": ("ggml-vocab-llama-bpe.gguf", 128256),
}

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_text_gets_its_ids(name):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    vectors, size = RECORDED[name]
    assert len(tokenizer) == size
    recorded = TOKENIZERS / "llamacpp_vectors"
    texts = (recorded / f"{vectors}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(id) for id in line.split()] for line in (recorded / f"{vectors}.out").read_text().split("\n")]
    assert len(texts) == 47
    assert [tokenizer.encode(text) for text in texts] == ids[:47]
    assert [tokenizer.decode(line) for line in ids[:47]] == texts
    assert not any(ids[47:])  # the file ends with an empty line


def test_the_special_tokens_of_llama_3_have_their_published_ids(tmp_path):
    published = TOKENIZERS / "llama3_hf"
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").symlink_to(TOKENIZERS / "llama3/tokenizer.model")
    alone, beside = load_tokenizer(TOKENIZERS / "llama3"), load_tokenizer(tmp_path)
    assert alone.special_tokens == beside.special_tokens
    assert len(alone) == len(beside) == 128256
    assert (alone.bos_id, alone.eos_id, alone.id("<|eot_id|>")) == (128000, 128001, 128009)
    assert alone.special_tokens[6:8] == ("<|start_header_id|>", "<|end_header_id|>")
