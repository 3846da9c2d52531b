"""Mixes of GGUF types against published files and against llama.cpp's rules, as its source states them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.checkpoint.gguf import TYPES
from llamero.checkpoint.gguf_names import from_gguf, to_gguf
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.rope import Default, Llama3
from llamero.quantize import gguf_mix, gguf_sizes
from llamero.quantize.gguf_mix import MIXES


def shape(**changes):
    keys = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "rope": Default(10000.0, 128),
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(**{**keys, **changes})


LLAMA_2_7B = shape()
LLAMA_2_70B = shape(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8)
LLAMA_3_8B = shape(vocab_size=128256, intermediate_size=14336, num_kv_heads=8, rope=Default(500000.0, 128))


@pytest.mark.parametrize(
    ("config", "mix", "gigabytes"),
    [
        (LLAMA_2_7B, "Q3_K_S", 2.95),
        (LLAMA_2_7B, "Q3_K_M", 3.30),
        (LLAMA_2_7B, "Q3_K_L", 3.60),
        (LLAMA_2_7B, "Q4_0", 3.83),
        (LLAMA_2_7B, "Q4_K_S", 3.86),
        (LLAMA_2_7B, "Q4_K_M", 4.08),
        (LLAMA_2_7B, "Q5_0", 4.65),
        (LLAMA_2_7B, "Q5_K_S", 4.65),
        (LLAMA_2_7B, "Q5_K_M", 4.78),
        (LLAMA_2_7B, "Q6_K", 5.53),
        (LLAMA_2_7B, "Q8_0", 7.16),
        (LLAMA_2_70B, "Q4_K_M", 41.42),
        (LLAMA_2_70B, "Q5_K_M", 48.75),
        (LLAMA_3_8B, "Q4_K_M", 4.92),
        (LLAMA_3_8B, "Q8_0", 8.54),
    ],
)
def test_files_are_as_large_as_published_ones(config, mix, gigabytes):
    """Sizes of the tables of TheBloke's and bartowski's GGUF files, in 10^9 bytes."""
    of_tokenizer = 0.0007 if config.vocab_size == 32000 else 0.0055
    assert abs(gguf_sizes.size(config, mix, imatrix=False) / 1e9 + of_tokenizer - gigabytes) < 0.006


def count(config, mix, part, **options):
    kinds = gguf_mix.types(config, mix, **options)
    found = [kind for name, kind in kinds.items() if f".{part}." in name]
    return {kind: found.count(kind) for kind in set(found)}


@pytest.mark.parametrize(
    ("mix", "part", "kinds"),
    [
        ("Q4_K_M", "attn_v", {"Q6_K": 16, "Q4_K": 16}),
        ("Q4_K_M", "ffn_down", {"Q6_K": 16, "Q4_K": 16}),
        ("Q4_K_M", "attn_output", {"Q4_K": 32}),
        ("Q4_K_S", "attn_v", {"Q5_K": 4, "Q4_K": 28}),
        ("Q4_K_S", "ffn_down", {"Q5_K": 4, "Q4_K": 28}),
        ("Q5_K_M", "attn_v", {"Q6_K": 16, "Q5_K": 16}),
        ("Q5_K_S", "attn_v", {"Q5_K": 32}),
        ("Q3_K_M", "attn_v", {"Q5_K": 2, "Q4_K": 30}),
        ("Q3_K_M", "ffn_down", {"Q5_K": 2, "Q4_K": 30}),
        ("Q3_K_M", "attn_output", {"Q4_K": 32}),
        ("Q3_K_L", "attn_v", {"Q5_K": 32}),
        ("Q3_K_L", "attn_output", {"Q5_K": 32}),
        ("Q3_K_S", "ffn_down", {"Q3_K": 32}),
        ("Q2_K", "attn_v", {"Q3_K": 32}),
        ("Q2_K", "ffn_down", {"Q3_K": 32}),
        ("Q2_K", "attn_output", {"Q3_K": 32}),
        ("Q2_K", "attn_q", {"Q2_K": 32}),
        ("Q4_0", "ffn_down", {"Q4_1": 4, "Q4_0": 28}),
        ("Q5_0", "ffn_down", {"Q5_1": 4, "Q5_0": 28}),
        ("Q8_0", "attn_v", {"Q8_0": 32}),
        ("F16", "ffn_up", {"F16": 32}),
    ],
)
def test_layers_of_llama_2_7b(mix, part, kinds):
    assert count(LLAMA_2_7B, mix, part) == kinds


def test_without_importance_the_simple_mixes_are_uniform():
    assert count(LLAMA_2_7B, "Q4_0", "ffn_down", imatrix=False) == {"Q4_0": 32}
    assert count(LLAMA_2_7B, "Q4_K_S", "ffn_down", imatrix=False) == {"Q5_K": 4, "Q4_K": 28}


def test_shared_values_get_more_bits():
    assert count(LLAMA_3_8B, "Q2_K", "attn_v") == {"Q4_K": 32}
    assert count(LLAMA_2_70B, "Q3_K_S", "attn_v") == {"Q5_K": 80}
    assert count(LLAMA_2_70B, "Q4_K_M", "attn_v") == {"Q6_K": 40, "Q5_K": 40}
    assert count(replace(LLAMA_2_70B, num_kv_heads=64), "Q3_K_S", "attn_v") == {"Q3_K": 80}, "the 65B"


def test_embedding_and_head():
    assert gguf_mix.types(LLAMA_2_7B, "Q4_K_M")["token_embd.weight"] == "Q4_K"
    assert gguf_mix.types(LLAMA_2_7B, "Q4_K_M")["output.weight"] == "Q6_K"
    assert gguf_mix.types(LLAMA_2_7B, "Q4_0")["output.weight"] == "Q6_K"
    assert gguf_mix.types(LLAMA_2_7B, "Q8_0")["output.weight"] == "Q8_0"
    tied = gguf_mix.types(replace(LLAMA_2_7B, tie_word_embeddings=True), "Q3_K_S")
    assert tied["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in tied


def test_rows_that_do_not_divide_fall_back_and_it_is_said():
    found = gguf_mix.choices(shape(intermediate_size=1408, num_layers=8), "Q4_K_M")
    assert found["blk.0.ffn_down.weight"] == ("Q8_0", "Q6_K")
    assert found["blk.2.ffn_down.weight"] == ("Q5_0", "Q4_K")
    assert found["blk.0.ffn_up.weight"] == ("Q4_K", "Q4_K")
    narrow = gguf_mix.choices(shape(hidden_size=64, intermediate_size=172, head_dim=8, num_heads=8), "Q5_K_S")
    assert narrow["output.weight"] == ("Q8_0", "Q8_0")
    assert narrow["token_embd.weight"] == ("Q5_1", "Q5_K")
    assert narrow["blk.0.ffn_down.weight"] == ("F16", "Q5_K")


def test_an_unknown_mix_is_named():
    with pytest.raises(LlameroError, match="Q4_K_L") as caught:
        gguf_mix.types(LLAMA_2_7B, "Q4_K_L")
    assert "Q4_K_" in str(caught.value.fix)


def test_blocks_are_those_of_the_types():
    assert all(
        gguf_mix.block(name) == TYPES[name].block for name in {*gguf_mix.FALLBACKS, *gguf_mix.FALLBACKS.values()}
    )
    assert all(gguf_mix.block(mix.base) == TYPES[mix.base].block for mix in MIXES.values())


@given(
    st.sampled_from(sorted(MIXES)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_every_tensor_fits_its_type_whatever_the_shape(mix, hidden, inner, layers, shared, tied):
    config = shape(
        vocab_size=7, hidden_size=8 * hidden, intermediate_size=4 * inner, num_layers=layers, num_heads=4,
        num_kv_heads=4 // shared, head_dim=2 * hidden, tie_word_embeddings=tied,
        rope=Llama3(10000.0, 2 * hidden, 8.0, 8192, 1.0, 4.0), attention_bias=True,
    )  # fmt: skip
    found = gguf_sizes.specs(config, mix)
    assert sum(spec.nbytes for spec in found.values()) > 0, "row_bytes raises where rows do not divide"
    assert [name for name in found if len(found[name].shape) == 1 and found[name].type.name != "F32"] == []
    assert found["rope_freqs.weight"].shape == (hidden,)
    matrices = {name for name, spec in found.items() if len(spec.shape) == 2}
    assert matrices == set(gguf_mix.types(config, mix))


def test_names_go_both_ways():
    ours = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.11.self_attn.k_proj.bias"]
    assert [from_gguf(str(to_gguf(name))) for name in ours] == ours
    assert to_gguf("model.layers.11.self_attn.k_proj.bias") == "blk.11.attn_k.bias"
    assert to_gguf("model.layers.0.mlp.gate_proj.qweight") == "blk.0.ffn_gate.qweight"
    for unknown in ("model.layers.0.mlp.router.weight", "model.layers.0", "other.weight"):
        assert to_gguf(unknown) is None
    for unknown in ("blk.0.ffn_gate_inp.weight", "rope_freqs.weight", "blk.0"):
        assert from_gguf(unknown) is None
