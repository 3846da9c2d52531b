"""A GGUF file gives the logits of the weights that it was made from."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamero.core import gguf
from llamero.core.download import resolve_model
from llamero.core.errors import LlameroError
from llamero.model import kquant_linear, kquants
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapter_files import save_adapter
from llamero.model.adapters import attach
from llamero.model.config import LlamaConfig
from llamero.model.kquant_linear import KQuantEmbedding, KQuantLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_config, load_model
from llamero.model.rope import Default, Linear, Llama3, Yarn, plain_frequencies

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")

SHAPE = LlamaConfig(
    vocab_size=40,
    hidden_size=256,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    rope=Default(10000.0, 64),
    max_position_embeddings=64,
)
IDS = torch.arange(20)[None]


def model_of(config=SHAPE):
    model = Llama(config).eval()
    initialize(model, seed=0, std=0.1)
    return model


@torch.no_grad()
def assert_same_logits(one, other, ids=IDS):
    torch.testing.assert_close(one(ids).float(), other(ids).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *kquants.KINDS])
def test_every_type_gives_the_logits_of_its_dequantized_weights(gguf_of, tmp_path, kind):
    model = model_of()
    path = gguf_of(model, tmp_path / "model.gguf", kind=kind)
    loaded = load_model(path, dtype=torch.float32)
    assert loaded.config == SHAPE
    assert_same_logits(loaded, model)


@pytest.mark.parametrize("kind", ["F16", "Q5_0"])
def test_a_tied_embedding_is_the_head(gguf_of, tmp_path, kind):
    model = model_of(replace(SHAPE, tie_word_embeddings=True))
    path = gguf_of(model, tmp_path / "model.gguf", kind=kind)
    loaded = load_model(path, dtype=torch.float32)
    assert loaded.config == model.config
    assert_same_logits(loaded, model)
    if kind == "Q5_0":
        assert loaded.lm_head.blocks is loaded.model.embed_tokens.blocks


def test_blocks_rest_as_they_are_and_only_looked_up_rows_of_the_table_are_decoded(gguf_of, tmp_path, monkeypatch):
    kinds = {"token_embd.weight": "Q8_0", "output.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_K"}
    loaded = load_model(gguf_of(model_of(), tmp_path / "model.gguf", kind=kinds))
    assert isinstance(loaded.model.embed_tokens, KQuantEmbedding)
    assert {name: layer.kind for name, layer in loaded.named_modules() if isinstance(layer, KQuantLinear)} == {
        "lm_head": "Q6_K",
        "model.layers.0.self_attn.q_proj": "Q4_K",
    }
    decoded, decode = [], kquants.decode
    monkeypatch.setattr(kquants, "decode", lambda data, kind: decoded.append(tuple(data.shape)) or decode(data, kind))
    loaded.model.embed_tokens(torch.tensor([3, 5, 3]))
    assert decoded == [(3, 272)]


def test_a_mixed_file_computes_in_one_dtype(gguf_of, tmp_path):
    kinds = {"token_embd.weight": "F16", "output.weight": "Q6_K", "blk.0.attn_q.weight": "F16"}
    model = model_of()
    path = gguf_of(model, tmp_path / "model.gguf", kind=kinds)
    loaded = load_model(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    assert loaded(IDS).dtype == torch.float16
    assert load_model(path, dtype=torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert load_model(gguf_of(model, tmp_path / "other.gguf", kind="Q8_0"))(IDS).dtype == torch.float32


def test_biases_are_read(gguf_of, tmp_path):
    model = model_of(replace(SHAPE, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    path = gguf_of(model, tmp_path / "model.gguf", kind="Q8_0")
    assert_same_logits(load_model(path), model)


def test_a_large_layer_is_decoded_in_parts(gguf_of, tmp_path, monkeypatch):
    loaded = load_model(gguf_of(model_of(), tmp_path / "model.gguf", kind={"blk.0.ffn_down.weight": "Q5_K"}))
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, KQuantLinear)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, layer.dequantize(torch.float32))
    monkeypatch.setitem(kquant_linear.AT_ONCE, "cpu", 256 * 100)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(3, -1))


@pytest.mark.parametrize("outputs", [True, False])
def test_shares_of_a_layer_are_cut_at_whole_blocks(outputs):
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    shares, whole = [], torch.empty(0)
    for share in range(2):
        layer = KQuantLinear(512, 6, kind="Q4_K", bias=False)
        layer.blocks.copy_(kquants.encode(w, "Q4_K"))
        assert layer.cuts(2, outputs=outputs)
        assert not layer.cuts(4, outputs=outputs)
        whole = layer.dequantize(torch.float32)
        layer.keep(share, 2, outputs=outputs)
        shares.append(layer.dequantize(torch.float32))
    assert torch.equal(torch.cat(shares, dim=0 if outputs else 1), whole)


@pytest.mark.parametrize("saved", [None, ("embed_tokens", "lm_head")])
def test_an_adapter_stands_beside_blocks(gguf_of, tmp_path, saved):
    model = model_of()
    gguf_of(model, tmp_path / "base.gguf", kind="Q8_0")
    (tmp_path / "adapter").mkdir()
    config = AdapterConfig(lora=4, modules_to_save=saved)
    for number, parameter in enumerate(attach(model, config, seed=0)):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    save_adapter(model, config, tmp_path / "adapter", base="../base.gguf")
    if saved is None:
        assert_same_logits(load_model(tmp_path / "adapter"), model)
        return
    with pytest.raises(LlameroError, match=r"model\.embed_tokens\.weight` has no place in this model"):
        load_model(tmp_path / "adapter")


# -- rotary embeddings


def test_scalings_are_read(gguf_of, tmp_path):
    def read(**keys):
        change = {f"llama.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
        return load_config(gguf_of(model_of(), tmp_path / "model.gguf", change=change)).rope

    assert read(scaling__type="linear", scaling__factor=4.0) == Linear(10000.0, 64, 4.0)
    assert read(scale_linear=2.0) == Linear(10000.0, 64, 2.0)
    assert read(scaling__type="none", scaling__factor=4.0) == Default(10000.0, 64)
    assert read(freq_base=1e6) == Default(1e6, 64)
    yarn = {"scaling__type": "yarn", "scaling__factor": 8.0, "scaling__original_context_length": 32}
    assert read(**yarn) == Yarn(10000.0, 64, 8.0, 32)
    assert read(**yarn, scaling__yarn_beta_fast=16.0) == Yarn(10000.0, 64, 8.0, 32, beta_fast=16.0)
    with pytest.raises(LlameroError, match="unknown RoPE type `longrope`"):
        read(scaling__type="longrope", scaling__factor=4.0)


def divisors(theta, head_dim, factor, original, low, high):
    """What llama.cpp's converter computes (notes of Llama 3.1's release; one channel pair after the other)."""
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize(
    ("factor", "original", "low", "high"),
    [
        (8.0, 8192, 1.0, 4.0),
        (32.0, 8192, 1.0, 4.0),
        (16.0, 8192, 2.0, 64.0),
        (8.0, 524288, 1.0, 4.0),  # no frequency is slow enough for the whole factor; here only one is slowed at all
        (4.0, 524288, 1.0, 60.0),
    ],
)
def test_the_scaling_of_llama_3_is_found_from_its_divisors(gguf_of, tmp_path, factor, original, low, high):
    config = replace(SHAPE, rope=Llama3(500000.0, 64, factor, original, low, high))
    model = model_of(config)
    frequencies = {"rope_freqs.weight": (divisors(500000.0, 64, factor, original, low, high), "F32")}
    said = {"llama.rope.scaling.original_context_length": original}
    loaded = load_model(gguf_of(model, tmp_path / "model.gguf", tensors=frequencies, change=said))
    found = loaded.config.rope
    assert isinstance(found, Llama3)
    torch.testing.assert_close(found.frequencies(64), config.rope.frequencies(64), rtol=1e-4, atol=0)
    if (low, high) == (1.0, 4.0):
        assert found == config.rope
    assert_same_logits(loaded, model)


def test_divisors_of_one_are_no_scaling_and_others_are_refused(gguf_of, tmp_path):
    path = tmp_path / "model.gguf"
    ones = {"rope_freqs.weight": (np.ones(32, dtype=np.float32), "F32")}
    assert load_config(gguf_of(model_of(), path, tensors=ones)).rope == Default(10000.0, 64)
    odd = {"rope_freqs.weight": (np.linspace(1, 3, 32, dtype=np.float32), "F32")}
    with pytest.raises(LlameroError, match="not those of Llama 3"):
        load_config(gguf_of(model_of(), path, tensors=odd))
    short = {"rope_freqs.weight": (np.ones(8, dtype=np.float32), "F32")}
    with pytest.raises(LlameroError, match=r"`rope_freqs.weight` is \(8,\) F32, expected \(32,\)"):
        load_config(gguf_of(model_of(), path, tensors=short))
    assert plain_frequencies(10000.0, 64).shape == (32,)


# -- which file is meant


def test_a_directory_with_one_model_in_gguf_stands_for_it(gguf_of, tmp_path):
    model = model_of()
    gguf_of(model, tmp_path / "model.gguf")
    assert resolve_model(tmp_path) == tmp_path / "model.gguf"
    assert_same_logits(load_model(tmp_path), model)
    gguf_of(model, tmp_path / "other.gguf")
    with pytest.raises(LlameroError, match=r"holds 2 models in GGUF: model\.gguf, other\.gguf") as caught:
        resolve_model(tmp_path)
    assert caught.value.fix == "name one of them"
    gguf_of(model, tmp_path / "other.gguf", change={"general.type": "imatrix"})
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path / "model.gguf"
    (tmp_path / "model.safetensors").write_text("")  # then it is a Hugging Face directory
    assert resolve_model(tmp_path) == tmp_path


def test_any_part_of_a_split_model_stands_for_all(tmp_path):
    names = [gguf.split_name("model", part, 2) for part in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    assert [resolve_model(tmp_path / name) for name in [*names, "."]] == [tmp_path / names[0]] * 3


# -- what is refused

ZEROS = np.zeros((2, 256), dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"llama.expert_count": 8}, r"`llama\.expert_count: 8` is another mathematics"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window: 4096` is another mathematics"),
        ({"llama.surprise": 1}, r"unknown key `llama\.surprise: 1`"),
        ({"llama.block_count": None}, r"`llama\.block_count` is missing"),
        ({"llama.block_count": 0}, r"must be a positive number, is 0"),
        ({"llama.attention.head_count": [4, 2]}, r"must be a positive number, is \[4, 2\]"),
        ({"llama.attention.head_count_kv": 3}, "4 attention heads do not divide into 3"),
        ({"llama.rope.dimension_count": 32}, "is 32, a head has 64 channels"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon` is missing"),
        ({"llama.vocab_size": 41}, r"vocab_size` says 41 tokens, the embedding has 40 rows"),
        ({"tokenizer.ggml.tokens": ["a"] * 39}, r"tokens` says 39 tokens, the embedding has 40 rows"),
        ({"llama.block_count": 2}, r"tensor `blk\.1\.attn_k\.weight` is missing \(9 such\)"),
        (
            {"llama.feed_forward_length": 512},
            r"`blk\.0\.ffn_gate\.weight` is \(256, 256\), the metadata say \(512, 256\)",
        ),
    ],
)
def test_metadata_that_are_no_llama_of_these_tensors_are_refused(gguf_of, tmp_path, change, problem):
    path = gguf_of(model_of(), tmp_path / "model.gguf", change=change)
    with pytest.raises(LlameroError, match=problem) as caught:
        load_model(path)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"token_embd.weight": None}, r"tensor `token_embd\.weight` is missing"),
        ({"blk.0.ffn_up.weight": None}, r"tensor `blk\.0\.ffn_up\.weight` is missing"),
        ({"blk.0.attn_q_norm.weight": (ZEROS[0], "F32")}, r"`blk\.0\.attn_q_norm\.weight` has no place in a Llama"),
        (
            {"blk.0.attn_q.weight": (np.zeros((256, 136), np.uint8), "IQ4_XS")},
            "is of type IQ4_XS, which is not decoded",
        ),
        ({"output_norm.weight": (np.zeros(272, np.uint8), "Q8_0")}, "is of type Q8_0, which is not decoded"),
    ],
)
def test_tensors_that_are_no_llama_s_are_refused(gguf_of, tmp_path, tensors, problem):
    path = gguf_of(model_of(), tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(LlameroError, match=problem):
        load_model(path)


def test_other_architectures_are_refused_by_name(gguf_of, tmp_path):
    path = gguf_of(model_of(), tmp_path / "model.gguf", architecture="qwen2")
    with pytest.raises(LlameroError, match="architecture `qwen2` is not a Llama"):
        load_config(path)


def test_files_that_are_broken_are_refused(gguf_of, tmp_path):
    path = gguf_of(model_of(), tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(LlameroError, match=r"would end at byte \d+, the file has"):
        load_model(path)
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(LlameroError, match="not a GGUF file"):
        load_model(path)


# -- real files


@shared
def test_stories_in_gguf_give_the_logits_of_their_original_file():
    folder = SHARED / "data/weights/stories260k"
    loaded = load_model(folder / "stories260Ktok512.gguf")
    ids = torch.tensor([[1, 403, 407, 261, 378, 31, 290]])
    torch.testing.assert_close(loaded(ids)[0], llama2_c(folder / "stories260K.bin", ids[0]), rtol=1e-3, atol=1e-3)


def llama2_c(path, ids):
    """The forward pass of llama2.c (run.c) on a file of its first version: neighbouring channels turn together."""
    content = np.fromfile(path, dtype=np.float32)
    dim, inner, layers, heads, kv, rows, _ = np.fromfile(path, dtype=np.int32, count=7).tolist()
    d, at = dim // heads, 7

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return torch.from_numpy(content[at - math.prod(shape) : at].reshape(shape).copy())

    table, attention_norm = take(rows, dim), take(layers, dim)
    q, k, v, o = take(layers, dim, dim), take(layers, kv * d, dim), take(layers, kv * d, dim), take(layers, dim, dim)
    norm, w1, w2, w3 = take(layers, dim), take(layers, inner, dim), take(layers, dim, inner), take(layers, inner, dim)
    last = take(dim)
    angles = torch.outer(torch.arange(len(ids)), 10000.0 ** (-torch.arange(0, d, 2) / d))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    x = table[ids]
    for layer in range(layers):
        y = rms(x, attention_norm[layer])
        queries = rotated((y @ q[layer].T).view(-1, heads, d))
        keys = rotated((y @ k[layer].T).view(-1, kv, d)).repeat_interleave(heads // kv, 1)
        values = (y @ v[layer].T).view(-1, kv, d).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("ihd,jhd->hij", queries, keys) / d**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", scores, values).flatten(1) @ o[layer].T
        y = rms(x, norm[layer])
        x = x + (F.silu(y @ w1[layer].T) * (y @ w3[layer].T)) @ w2[layer].T
    return rms(x, last) @ table.T


@shared
def test_a_trained_model_gives_the_same_logits_in_gguf(gguf_of, tmp_path):
    model = load_model(SHARED / "data/weights/tinystories-656k-hf", dtype=torch.float32)
    path = gguf_of(model, tmp_path / "model.gguf", change={"llama.attention.key_length": None})
    loaded = load_model(path)
    assert replace(loaded.config, carried={}) == replace(model.config, carried={})
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
