"""Where a model is asked for, a quantized directory will do: every layout, from the command line."""

import json

import pytest
import torch

from llamero.cli import app
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run
from llamero.text.tokenizer import train_bpe

VARIANTS = {
    "gptq-8bit-32g-actorder_True": "unpacked in the cache",
    "awq-4bit-32g": "unpacked in the cache",
    "rtn-8bit-32g-ct": "unpacked in the cache",
    "int8": "unpacked in the cache",
    "nf4": "nf4, decoded in the cache",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    texts = ["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3
    tokenizer = train_bpe(iter(texts), vocab_size=290)
    model = Llama(LlamaConfig(290, 64, 128, 1, 4, 2, 16, Default(10000.0, 16), 256)).eval()
    initialize(model, seed=0, std=0.3)
    (root / "plain").mkdir()
    save_model(model, root / "plain")
    tokenizer.save(root / "plain", chat_template="{{ messages[0].content }}")
    config = QuantizeConfig.model_validate(
        {"variants": list(VARIANTS), "calibration": {"text": "none.txt", "sequence": 64, "tokens": 64}}
    )
    run(config, model=root / "plain", out=lambda variant: root / variant.name, tokens=[torch.arange(64)])
    return root


def said_by(command, capsys):
    app([str(part) for part in command], result_action="return_value")
    return capsys.readouterr()


@pytest.mark.parametrize("name", VARIANTS)
def test_generate_takes_every_layout_and_says_how_it_computes(directories, name, capsys):
    options = ["the cat sat", "--raw", "--max-new-tokens", 8, "--temperature", 0, "--products"]
    fast, plain = (said_by(["generate", directories / name, *options, way], capsys) for way in ("fast", "plain"))
    assert fast.out == plain.out
    assert fast.out.strip()
    assert f"7 quantized layers: {VARIANTS[name]}" in fast.err


@pytest.mark.parametrize("name", ["awq-4bit-32g", "nf4"])
def test_evaluate_takes_them_too(directories, name, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat 12 times, said the user\n" * 8)
    out = tmp_path / "out.json"
    said_by(
        ["evaluate", directories / name, "--tasks", "perplexity", "--text", tmp_path / "text.txt", "--json", out],
        capsys,
    )
    assert "perplexity" in json.dumps(json.loads(out.read_text()))
