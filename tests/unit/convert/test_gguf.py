"""A model in GGUF becomes a Hugging Face directory with the same weights, tokenizer and settings."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamero.cli import app
from llamero.convert import gguf
from llamero.convert.config import ConvertConfig, Target
from llamero.convert.run import kind_of, run
from llamero.core.errors import LlameroError
from llamero.model.load import load_model
from llamero.model.rope import Default, Llama3, Yarn
from llamero.text.tokenizer import load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared"))
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "head_dim": 8, "rope": Default(12345.0, 8)}
TEXTS = ["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3


@pytest.fixture
def model(models, tmp_path):
    models.write(tmp_path / "source", **WIDE)
    return load_model(tmp_path / "source")


def convert(source, out, to: Target = "hf", **options):
    return run(source, out, ConvertConfig(to=to, **options))


def test_plain_weights_become_the_same_bits(models, gguf_of, model, tmp_path):
    convert(gguf_of(model, tmp_path / "model.gguf"), tmp_path / "out", verify=True)
    models.assert_same(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "meta", "megatron"])
def test_quantized_weights_become_what_they_stand_for(gguf_of, model, tmp_path, to):
    kinds = {name: "Q8_0" for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight")}
    path = gguf_of(model, tmp_path / "model.gguf", kind={**kinds, "blk.1.ffn_down.weight": "Q4_0"})
    assert kind_of(path) == kind_of(tmp_path) == "gguf"
    report = convert(path, tmp_path / "out", to, verify=True)
    assert report.kind == "gguf"
    assert report.notes[:2] == (
        "dequantized: 1 of Q4_0, 3 of Q8_0",
        "written in float32, which loses nothing of them; --dtype bfloat16 takes half the room",
    )
    convert(tmp_path / "out", tmp_path / "back")
    back = load_model(tmp_path / "back")
    for name, parameter in model.named_parameters():  # `gguf_of` rounded it
        assert torch.equal(back.get_parameter(name), parameter), name


def test_what_half_precision_rounds_is_said(gguf_of, model, tmp_path):
    report = convert(gguf_of(model, tmp_path / "model.gguf", kind={"token_embd.weight": "F16"}), tmp_path / "out")
    assert report.notes[0].endswith("tensors of another precision are rounded to float16")
    assert {parameter.dtype for parameter in load_model(tmp_path / "out").parameters()} == {torch.float16}


@pytest.mark.parametrize("rope", [Llama3(12345.0, 8, 8.0, 8192, 1.0, 4.0), Yarn(12345.0, 8, 4.0, 16)])
def test_verify_turns_the_channels_as_the_file_has_them(gguf_of, model, tmp_path, rope, monkeypatch):
    scaling = {} if isinstance(rope, Llama3) else {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": rope.factor,
        "llama.rope.scaling.original_context_length": rope.original_context,
    }  # fmt: skip
    plain = Default(rope.theta, 8).frequencies(0)
    divisors = {"rope_freqs.weight": ((plain / rope.frequencies(0)).numpy(), "F32")} if not scaling else {}
    model.config = replace(model.config, rope=rope)
    path = gguf_of(model, tmp_path / "model.gguf", change=scaling, tensors=divisors)
    convert(path, tmp_path / "right", verify=True)
    monkeypatch.setattr("llamero.model.gguf_files.rows_from_gguf", lambda name, rows, head_dim: rows)
    with pytest.raises(LlameroError, match="the logits of both sides differ"):
        convert(path, tmp_path / "wrong", verify=True)


def test_tokenizer_and_settings_come_along(gguf_of, model, tmp_path, capsys):
    tokenizer = train_bpe(iter(TEXTS), vocab_size=293)
    spec = json.loads(tokenizer.backend.to_str())
    model.config = replace(model.config, vocab_size=293)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.weight.data = torch.randn(293, 64, generator=torch.Generator().manual_seed(0))
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get),
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 290,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 40,
        "tokenizer.ggml.eot_token_id": 3,
    }
    path = gguf_of(model, tmp_path / "model.gguf", change=said)
    app(["convert", str(path), str(tmp_path / "out"), "--to", "hf"], result_action="return_value")
    assert "tokenizer.json was made from what the GGUF file says" in capsys.readouterr().out
    made = load_tokenizer(tmp_path / "out")
    assert (made.digest, made.chat_template) == (tokenizer.digest, "{{ messages }}")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_k": 40}
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2


def test_what_a_gguf_file_says_itself_is_not_asked_for(gguf_of, model, tmp_path):
    path = gguf_of(model, tmp_path / "model.gguf")
    with pytest.raises(LlameroError, match="the metadata of the source says how long"):
        convert(path, tmp_path / "out", context=128)
    with pytest.raises(LlameroError, match="only Meta directories leave the factor open"):
        convert(path, tmp_path / "out", rope_factor=8.0)
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_text("")
    assert kind_of(tmp_path) == "meta"  # a directory stands for a GGUF file only if it has no other weights
    assert gguf.open_gguf_model(path, ConvertConfig(to="hf")).notes == ()


def test_a_real_file_becomes_a_directory(tmp_path):
    source = SHARED / "data/weights/stories260k/stories260Ktok512.gguf"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    convert(source, tmp_path / "out", verify=True)
    one, other = load_model(source), load_model(tmp_path / "out")
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    assert torch.equal(one(ids), other(ids))
    assert load_tokenizer(tmp_path / "out").digest == load_tokenizer(source).digest
