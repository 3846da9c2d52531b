"""Converted weights, read as Meta's and Megatron's own code reads them, give the logits of `transformers`.

The two forward passes below are written from the published layouts alone and open the files with plain `torch.load`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamero.convert.config import ConvertConfig
from llamero.convert.run import run

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3] / "shared"))
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}


def write(directory, **changes):
    """Write a random model whose every weight and bias matters, and return it."""
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * drawn if "norm" in name else 0.15 * drawn
    model.tie_weights()
    model.save_pretrained(directory)
    return model


def some_ids(vocabulary):
    return torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(theirs, logits, ids):
    expected = theirs(ids).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def neighbours(x, theta):
    """Turn each channel with its neighbour; (batch, seq, heads, d)."""
    d = x.shape[-1]
    frequencies = theta ** -(torch.arange(0, d, 2).double() / d)
    turn = torch.exp(1j * torch.outer(torch.arange(x.shape[1]).double(), frequencies))[:, None]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).float()


def attention(q, k, v, theta):
    """Causal attention of (batch, seq, heads, d), each key/value head repeated for its queries."""
    q, k = neighbours(q, theta), neighbours(k, theta)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


@torch.no_grad()
def meta_logits(directory, ids, *, embedding_axis):
    """Meta's forward pass, from params.json and its shards alone."""
    params = json.loads((directory / "params.json").read_text())
    shards = [torch.load(path) for path in sorted(directory.glob("consolidated.*.pth"))]
    axes = {"tok_embeddings": embedding_axis, "wo": 1, "w2": 1}

    def get(name):
        if "norm" in name:
            return shards[0][f"{name}.weight"].float()
        return torch.cat([shard[f"{name}.weight"] for shard in shards], dim=axes.get(name.split(".")[-1], 0)).float()

    d, theta, eps = params["dim"] // params["n_heads"], params["rope_theta"], params["norm_eps"]
    x = get("tok_embeddings")[ids]
    for n in range(params["n_layers"]):
        h = norm(x, get(f"layers.{n}.attention_norm"), eps)
        q, k, v = ((h @ get(f"layers.{n}.attention.w{letter}").T).unflatten(-1, (-1, d)) for letter in "qkv")
        assert k.shape[2] == params.get("n_kv_heads", params["n_heads"])
        x = x + attention(q, k, v, theta) @ get(f"layers.{n}.attention.wo").T
        h = norm(x, get(f"layers.{n}.ffn_norm"), eps)
        w1, w2, w3 = (get(f"layers.{n}.feed_forward.w{number}").T for number in (1, 2, 3))
        x = x + (F.silu(h @ w1) * (h @ w3)) @ w2
    return norm(x, get("norm"), eps) @ get("output").T


@torch.no_grad()
def megatron_logits(directory, ids, *, tensor, pipeline):
    """Megatron's forward pass over its ranks: each computes with its own file, and their outputs are added up."""

    def file(t, p):
        name = f"mp_rank_{t:02}" + (f"_{p:03}" if pipeline > 1 else "")
        loaded = torch.load(directory / "release" / name / "model_optim_rng.pt", weights_only=False)
        assert loaded["checkpoint_version"] == 3.0
        assert isinstance(loaded["args"], argparse.Namespace)
        return loaded["args"], loaded["model"]

    assert (directory / "latest_checkpointed_iteration.txt").read_text() == "release"
    args, _ = file(0, 0)
    d, eps = args.kv_channels, args.layernorm_epsilon
    per_group = args.num_attention_heads // args.num_attention_heads_kv
    models = [[file(t, p)[1] for t in range(tensor)] for p in range(pipeline)]
    words = [model["language_model"]["embedding"]["word_embeddings"]["weight"].float() for model in models[0]]
    assert sum(map(len, words)) == args.padded_vocab_size
    x = torch.cat(words)[ids]
    for stage in models:
        layers = [model["language_model"]["encoder"] for model in stage]
        for n in range(args.num_layers // pipeline):
            attended, transformed, w = torch.zeros_like(x), torch.zeros_like(x), {}
            for weights in layers:
                w = {k.removeprefix(f"layers.{n}."): v.float() for k, v in weights.items() if f"layers.{n}." in k}
                h = norm(x, w["input_layernorm.weight"], eps)
                qkv = h @ w["self_attention.query_key_value.weight"].T + w.get("self_attention.query_key_value.bias", 0)
                qkv = qkv.unflatten(-1, (-1, per_group + 2, d))  # (batch, seq, groups of this rank, heads, d)
                q, k, v = qkv[..., :per_group, :].flatten(2, 3), qkv[..., per_group, :], qkv[..., per_group + 1, :]
                attended += attention(q, k, v, args.rope_theta) @ w["self_attention.dense.weight"].T
            x = x + attended + w.get("self_attention.dense.bias", 0)
            for weights in layers:
                w = {k.removeprefix(f"layers.{n}."): v.float() for k, v in weights.items() if f"layers.{n}." in k}
                h = norm(x, w["post_attention_layernorm.weight"], eps)
                up, gate = (h @ w["mlp.dense_h_to_4h.weight"].T + w.get("mlp.dense_h_to_4h.bias", 0)).chunk(2, -1)
                transformed += (F.silu(gate) * up) @ w["mlp.dense_4h_to_h.weight"].T
            x = x + transformed + w.get("mlp.dense_4h_to_h.bias", 0)
    x = norm(x, models[-1][0]["language_model"]["encoder"]["final_layernorm.weight"], eps)
    if not args.tie_embed_logits:
        heads = [model["language_model"]["lm_head"] for model in models[-1]]
    elif pipeline > 1:
        heads = [model["word_embeddings_for_head"]["weight"] for model in models[-1]]
    else:
        heads = words
    return x @ torch.cat(heads).float().T


MODELS = {
    "grouped heads": {},
    "one key/value head each": {"num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 101},
    "wide heads": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", ["grouped heads", "one key/value head each", "tied"])
def test_meta_files_give_the_logits_of_transformers(tmp_path, name, shards):
    theirs = write(tmp_path / "hf", **MODELS[name])
    run(tmp_path / "hf", tmp_path / "meta", ConvertConfig(to="meta", shards=shards))
    ids = some_ids(96)
    assert_same(theirs, meta_logits(tmp_path / "meta", ids, embedding_axis=1), ids)


def test_a_llama3_vocabulary_is_shared_by_rows(tmp_path):
    theirs = write(tmp_path / "hf", vocab_size=128_256, hidden_size=16, num_attention_heads=4)
    run(tmp_path / "hf", tmp_path / "meta", ConvertConfig(to="meta", shards=2))
    ids = some_ids(128_256)
    assert_same(theirs, meta_logits(tmp_path / "meta", ids, embedding_axis=0), ids)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_megatron_files_give_the_logits_of_transformers(tmp_path, name, tensor, pipeline):
    theirs = write(tmp_path / "hf", **MODELS[name])
    run(tmp_path / "hf", tmp_path / "megatron", ConvertConfig(to="megatron", tensor=tensor, pipeline=pipeline))
    rows = theirs.config.vocab_size
    ids = some_ids(rows)
    logits = megatron_logits(tmp_path / "megatron", ids, tensor=tensor, pipeline=pipeline)
    assert logits.shape[-1] == -(-rows // (128 * tensor)) * 128 * tensor
    assert torch.equal(logits[..., rows:], logits[..., rows - 1 : rows].expand_as(logits[..., rows:]))
    assert_same(theirs, logits[..., :rows], ids)


@pytest.mark.parametrize("to", ["meta", "megatron"])
@pytest.mark.parametrize("name", ["tinystories-656k-hf", "ref-7m-hf"])
def test_real_weights_give_the_logits_of_transformers(tmp_path, name, to):
    source = SHARED / "data/weights" / name
    if not source.exists():
        pytest.skip(f"{source} is not there")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = some_ids(theirs.config.vocab_size)
    if to == "meta":
        run(source, tmp_path / "out", ConvertConfig(to="meta", shards=2))
        assert_same(theirs, meta_logits(tmp_path / "out", ids, embedding_axis=1), ids)
    else:
        run(source, tmp_path / "out", ConvertConfig(to="megatron", tensor=2, pipeline=2))
        logits = megatron_logits(tmp_path / "out", ids, tensor=2, pipeline=2)
        assert_same(theirs, logits[..., : theirs.config.vocab_size], ids)
