"""What a GGUF file says of a model: its shape, its rotations, its tokenizer, how it is best sampled."""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamero.checkpoint import hf
from llamero.checkpoint.gguf_names import SAMPLING
from llamero.core.errors import LlameroError
from llamero.core.gguf import Value
from llamero.model.config import LlamaConfig
from llamero.model.load import empty_model
from llamero.model.rope import Default, Dynamic, Linear, Llama3, Rope, Yarn
from llamero.quantize.gguf_mix import MIXES
from llamero.text.gguf_metadata import Written, to_metadata
from llamero.text.sentencepiece_bpe import scores_of
from llamero.text.tokenizer import load_tokenizer

QUANTIZATION_VERSION = 2
"""Of the block formats; since May 2023."""


def metadata(source: Path, config: LlamaConfig, mix: str, *, name: str | None = None) -> Written:
    """Return the metadata of a model, and what of it GGUF files cannot say.

    Args:
        source: Directory of the unquantized model.
        config: Its shape.
        mix: A name of `gguf_mix.MIXES`.
        name: Of the model, for people.
    """
    generation_file = source / "generation_config.json"
    generation = hf.read_json(generation_file) if generation_file.exists() else {}
    tokenizer = _tokenizer(source, config.vocab_size, _ends(generation), _state(source))
    values = {
        "general.architecture": Value("string", "llama"),
        "general.type": Value("string", "model"),
        **({} if name is None else {"general.name": Value("string", name)}),
        "general.size_label": Value("string", size_label(config)),
        "general.file_type": Value("uint32", MIXES[mix].file_type),
        "general.quantization_version": Value("uint32", QUANTIZATION_VERSION),
        **_sampling(generation),
        **_shape(config),
    }
    rope, notes = _rope(config.rope)
    return Written({**values, **rope, **tokenizer.values}, (*notes, *tokenizer.notes))


def _state(source: Path) -> tuple[tuple[str, int], ...]:
    """Return when each file beside the weights was last written."""
    return tuple((path.name, path.stat().st_mtime_ns) for path in sorted(source.glob("*token*")))


@lru_cache(maxsize=1)  # all variants of a run ask for the same one
def _tokenizer(source: Path, vocab_size: int, ends: tuple[int, ...], state: tuple[tuple[str, int], ...]) -> Written:
    model = source / "tokenizer.model"
    return to_metadata(
        load_tokenizer(source),
        vocab_size=vocab_size,
        ends=ends,
        scores=scores_of(model) if model.exists() else None,
    )


def _ends(generation: Mapping[str, Any]) -> tuple[int, ...]:
    ends = generation.get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _sampling(generation: Mapping[str, Any]) -> dict[str, Value]:
    """Return how a model is best sampled, where its authors say that it is sampled."""
    if not generation.get("do_sample", False):
        return {}
    return {
        f"general.sampling.{theirs}": Value(kind, _number(key, generation[key], whole=kind != "float32"))
        for key, (theirs, kind) in SAMPLING.items()
        if generation.get(key) is not None
    }


def _number(key: str, value: object, *, whole: bool) -> float:
    """Return a number of generation_config.json; JSON may write a whole one as 50.0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (not whole or value == int(value)):
        return int(value) if whole else value
    kind = "whole number" if whole else "number"
    raise LlameroError(f"`{key}: {value}` is not a {kind}", where="generation_config.json", fix="mend or remove it")


def size_label(config: LlamaConfig) -> str:
    """Return the number of parameters with two digits, such as 6.8M or 13B."""
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    unit, letter = (10**9, "B") if count >= 10**9 else (10**6, "M") if count >= 10**6 else (1000, "K")
    return f"{count / unit:.1f}{letter}" if round(count / unit) < 10 else f"{count / unit:.0f}{letter}"


def _shape(config: LlamaConfig) -> dict[str, Value]:
    counts = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    return {
        **{f"llama.{key}": Value("uint32", count) for key, count in counts.items()},
        "llama.attention.layer_norm_rms_epsilon": Value("float32", config.rms_norm_eps),
        "llama.rope.freq_base": Value("float32", config.rope.theta),
    }


def _rope(rope: Rope) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the keys of a stretched context; that of Llama 3.1 is a tensor instead."""
    if isinstance(rope, Default | Llama3):
        return {}, ()
    if isinstance(rope, Linear):
        return _scaling("linear", factor=Value("float32", rope.factor)), ()
    if isinstance(rope, Dynamic):
        said = f"readers of GGUF do not stretch the context dynamically: not beyond {rope.original_context} tokens"
        return {}, (said,)
    if isinstance(rope, Yarn):
        return _yarn(rope)
    raise LlameroError(f"GGUF files have no words for the RoPE type {type(rope).__name__}")


def _yarn(rope: Yarn) -> tuple[dict[str, Value], tuple[str, ...]]:
    # readers multiply by what YaRN recommends, which a config may have replaced
    attention = rope.attention_scale / (0.1 * math.log(rope.factor) + 1)
    keys = {
        "factor": Value("float32", rope.factor),
        "original_context_length": Value("uint32", rope.original_context),
        "yarn_beta_fast": Value("float32", rope.beta_fast),
        "yarn_beta_slow": Value("float32", rope.beta_slow),
    }
    if abs(attention - 1) > 1e-6:
        keys["attn_factor"] = Value("float32", attention)
    notes = () if rope.truncate else ("readers of GGUF round where YaRN's ramp begins and ends",)
    return _scaling("yarn", **keys), notes


def _scaling(kind: str, **keys: Value) -> dict[str, Value]:
    scaling = {"type": Value("string", kind), **keys}
    return {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
