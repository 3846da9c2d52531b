"""Our Llama against that of `transformers`, from files it writes: each RoPE type, far beyond its original context."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from llamero.core.errors import LlameroError
from llamero.infer.context import rotation_of
from llamero.infer.kv import PagedCache
from llamero.model.attention import Documents
from llamero.model.load import load_model

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3] / "shared"))
REAL = ["tinystories-656k-hf", "ref-7m-hf"]

ORIGINAL, SEQUENCE = 64, 512
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def context_of(kind):
    return ORIGINAL if kind in ("default", "linear", "dynamic") else SEQUENCE


def write(directory, config, *, seed=0, model_class: type[PreTrainedModel] = LlamaForCausalLM):
    """Write a random model with weights and biases that all matter, and return it."""
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * drawn if "norm" in name else 0.15 * drawn
    model.tie_weights()
    model.save_pretrained(directory)
    return model


def llama_config(kind, **changes):
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": context_of(kind), **changes}
    return LlamaConfig(**sizes, rope_parameters=dict(ROPES[kind]))


def some_ids(vocabulary, *, batch=1, length=SEQUENCE, seed=1):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_logits(theirs, ours, ids, *, tolerance=1e-5):
    expected = theirs(ids).logits.float()
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", REAL)
def test_real_weights_give_the_same_logits(name):
    directory = SHARED / "data/weights" / name
    if not directory.exists():
        pytest.skip(f"{directory} is not there")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = load_model(directory, dtype=torch.float32)
    assert_same_logits(theirs, ours, some_ids(ours.config.vocab_size, batch=1))


@pytest.mark.parametrize(("kind", "kv", "tied"), list(itertools.product(ROPES, (4, 2, 1), (False, True))))
def test_random_weights_give_the_same_logits_far_beyond_the_original_context(tmp_path, kind, kv, tied):
    config = llama_config(kind, num_key_value_heads=kv, tie_word_embeddings=tied)
    theirs = write(tmp_path, config)
    assert_same_logits(theirs, load_model(tmp_path), some_ids(config.vocab_size))


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}, {"rms_norm_eps": 1e-2}],
    ids=lambda changes: next(iter(changes)),
)
def test_biases_and_odd_heads_are_read(tmp_path, changes):
    config = llama_config("llama3", **changes)
    assert_same_logits(write(tmp_path, config), load_model(tmp_path), some_ids(config.vocab_size))


@pytest.mark.parametrize(
    "yarn",
    [
        {"attention_factor": 1.3},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"truncate": False},
        {"mscale": 0.7, "mscale_all_dim": 1.1},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_optional_keys_of_yarn_are_read(tmp_path, yarn):
    config = llama_config("default", max_position_embeddings=SEQUENCE)
    config.rope_parameters = {**ROPES["yarn"], **yarn}
    assert_same_logits(write(tmp_path, config), load_model(tmp_path), some_ids(config.vocab_size))


@pytest.mark.parametrize("spelling", ["rope_type", "type", "both spellings"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_older_spellings_of_a_config_mean_the_same(tmp_path, kind, spelling):
    config = llama_config(kind)
    theirs = write(tmp_path, config)
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text())
    new = stated["rope_parameters"]
    key = "type" if spelling == "type" else "rope_type"
    old = {key: kind, **{k: v for k, v in new.items() if k not in ("rope_type", "rope_theta")}}
    if spelling != "both spellings":
        del stated["rope_parameters"]
    path.write_text(json.dumps({**stated, "rope_theta": new["rope_theta"], "rope_scaling": old}))
    assert_same_logits(theirs, load_model(tmp_path), some_ids(config.vocab_size))


@torch.no_grad()
@pytest.mark.parametrize("kind", ROPES)
def test_positions_around_two_million_are_told_apart(tmp_path, kind):
    config = llama_config(kind, max_position_embeddings=2**22)
    if "original_max_position_embeddings" in ROPES[kind]:
        config.rope_parameters = {**ROPES[kind], "original_max_position_embeddings": 2**19}
    theirs, positions = write(tmp_path, config), torch.arange(2**21 - 8, 2**21 + 8)
    ours = load_model(tmp_path)
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions[None])
    rotation = ours.rotation(positions, [2**21 + 8])
    half = ours.config.head_dim // 2
    torch.testing.assert_close(rotation[..., 0], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation[..., 1], sin[0, :, :half], rtol=0, atol=1e-6)
    assert ((rotation[1:] - rotation[:-1]).abs().amax((1, 2)) > 0.05).all()
    ids = some_ids(config.vocab_size, batch=1, length=16)
    expected = theirs(ids, position_ids=positions[None]).logits[0]
    logits = ours.lm_head(ours.hidden(ids[0], rotation, Documents((16,))))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ROPES)
def test_decoding_with_a_cache_equals_the_whole_forward_pass(tmp_path, kind):
    config = llama_config(kind)
    write(tmp_path, config)
    ours = load_model(tmp_path)
    ids = some_ids(config.vocab_size, batch=1, length=200)[0]
    whole = ours(ids[None])[0]
    cache = PagedCache(ours.config, dtype=torch.float32, pages=1)
    row, start, parts = cache.add(), 0, []
    for count in (90, 1, 1, 37, 1, 70):  # a prompt, tokens, pieces of a prompt
        rotation = rotation_of(ours, [start], [count], [len(ids)])
        hidden = ours.hidden(ids[start : start + count], rotation, cache.reserve([row], [count]), cache)
        parts.append(ours.lm_head(hidden))
        start += count
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_a_mistral_that_attends_in_full_is_a_llama(tmp_path):
    config = MistralConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=None)
    theirs = write(tmp_path, config, model_class=MistralForCausalLM)
    assert_same_logits(theirs, load_model(tmp_path), some_ids(config.vocab_size))


def test_a_mistral_with_a_sliding_window_is_refused(tmp_path):
    write(tmp_path, MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=32), model_class=MistralForCausalLM)
    with pytest.raises(LlameroError, match="sliding_window: 32"):
        load_model(tmp_path)


def changed_config(tmp_path, **keys):
    write(tmp_path, llama_config("default"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm: True"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"rope_parameters": {"rope_type": "lama3", "rope_theta": 1e4}}, "did you mean `llama3`"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}, "rope_parameters": None}, "did you mean `yarn`"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks the key"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "wave": 1}}, "wave"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"architectures": ["LlamaForCausalLN"]}, "did you mean `LlamaForCausalLM`"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ({"hidden_size": "64"}, "`hidden_size` must be a positive number, is '64'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, keys, message):
    changed_config(tmp_path, **keys)
    with pytest.raises(LlameroError) as error:
        load_model(tmp_path)
    assert message in str(error.value)
    assert "config.json" in str(error.value)
