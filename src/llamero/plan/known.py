"""Shapes of published Llamas, for plans where neither their files nor the hub are at hand.

Sources: Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Rozière et al. 2023 (arXiv:2308.12950), Dubey et al.
2024 (arXiv:2407.21783), and the config.json of each model.
"""

from __future__ import annotations

import re
from typing import Any

from llamero.core.errors import LlameroError, did_you_mean
from llamero.model.config import LlamaConfig, from_hf

_LLAMA_3 = {"vocab_size": 128_256, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA_31 = {**_LLAMA_3, "rope_scaling": _LLAMA_31_ROPE, "max_position_embeddings": 131_072}
_LLAMA_32 = {**_LLAMA_31, "rope_scaling": {**_LLAMA_31_ROPE, "factor": 32.0}, "tie_word_embeddings": True}
_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_CODE = {"max_position_embeddings": 16_384, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5}


def _shape(layers: int, hidden: int, mlp: int, heads: int, kv: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _shape(32, 4096, 11_008, 32, 32, {}),
    "llama-13b": _shape(40, 5120, 13_824, 40, 40, {}),
    "llama-30b": _shape(60, 6656, 17_920, 52, 52, {}),
    "llama-65b": _shape(80, 8192, 22_016, 64, 64, {}),
    "llama-2-7b": _shape(32, 4096, 11_008, 32, 32, _LLAMA_2),
    "llama-2-13b": _shape(40, 5120, 13_824, 40, 40, _LLAMA_2),
    "llama-2-70b": _shape(80, 8192, 28_672, 64, 8, _LLAMA_2),
    "codellama-7b": _shape(32, 4096, 11_008, 32, 32, {**_CODE, "vocab_size": 32_016}),
    "codellama-13b": _shape(40, 5120, 13_824, 40, 40, {**_CODE, "vocab_size": 32_016}),
    "codellama-34b": _shape(48, 8192, 22_016, 64, 8, _CODE),
    "codellama-70b": _shape(80, 8192, 28_672, 64, 8, {**_CODE, "vocab_size": 32_016, "max_position_embeddings": 4096}),
    "tinyllama-1.1b": _shape(22, 2048, 5632, 32, 4, {"rms_norm_eps": 1e-5}),
    "llama-3-8b": _shape(32, 4096, 14_336, 32, 8, _LLAMA_3),
    "llama-3-70b": _shape(80, 8192, 28_672, 64, 8, _LLAMA_3),
    "llama-3.1-8b": _shape(32, 4096, 14_336, 32, 8, _LLAMA_31),
    "llama-3.1-70b": _shape(80, 8192, 28_672, 64, 8, _LLAMA_31),
    "llama-3.1-405b": _shape(126, 16_384, 53_248, 128, 8, _LLAMA_31),
    "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, {**_LLAMA_32, "head_dim": 64}),
    "llama-3.2-3b": _shape(28, 3072, 8192, 24, 8, {**_LLAMA_32, "head_dim": 128}),
    "llama-3.3-70b": _shape(80, 8192, 28_672, 64, 8, _LLAMA_31),
}
"""What decides the mathematics of each, as its config.json says it."""


def find(model: str) -> str | None:
    """Return which of the known shapes a model of the hub has by its name, or nothing.

    Args:
        model: Such as `meta-llama/Llama-2-70b-hf` or `huggyllama/llama-65b`; the owner says nothing. A name that says
            more than the shape's and what it was tuned for (`-hf`, `-chat`, `-instruct`, a length) is not known.
    """
    name = model.partition(":")[0].rpartition("/")[2].lower().replace("_", "-")
    name = re.sub(r"^meta-", "", name)
    name = re.sub(r"(-(hf|chat|instruct|python|it|base|v[\d.]+|fp16|fp8|bf16|intermediate.*|\d{4}))*$", "", name)
    name = re.sub(r"^llama([\d.]+)-", r"llama-\1-", name)
    name = re.sub(r"^(code)-?llama-", "codellama-", name)
    return name if name in SHAPES else None


def config_of(name: str) -> LlamaConfig:
    """Return the config of a known shape.

    Raises:
        LlameroError: If it is not known.
    """
    if name not in SHAPES:
        raise LlameroError(f"no shape `{name}` is known", fix=did_you_mean(name, SHAPES))
    return from_hf(SHAPES[name], where=name)
