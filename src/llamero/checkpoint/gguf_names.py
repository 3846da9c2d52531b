"""Names of a Llama's tensors and settings in GGUF files, and the order in which rows stand there."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from llamero.checkpoint.meta import halves_from_pairs, pairs_from_halves

OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""Modules outside of the decoder layers: Hugging Face's names, GGUF's names."""

INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a decoder layer."""

ROPE_FREQUENCIES = "rope_freqs.weight"
"""What rotations are divided by, one per pair of channels; there is no such tensor in Hugging Face's files."""

TURNED = ("self_attn.q_proj", "self_attn.k_proj")
"""Modules whose rows are in another order: pairs of channels that turn together are neighbours, as in Meta's files."""

SAMPLING = {
    "temperature": ("temp", "float32"),
    "top_k": ("top_k", "int32"),
    "top_p": ("top_p", "float32"),
    "min_p": ("min_p", "float32"),
    "repetition_penalty": ("penalty_repeat", "float32"),
}
"""Keys of generation_config.json, and how GGUF calls and stores them (`general.sampling.…`)."""

_OUR_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>.+)")
_THEIR_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<module>.+)")
_INSIDE_BACK = {theirs: ours for ours, theirs in INSIDE.items()}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in OUTSIDE.items()}


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a generation_config.json would say: tokens that end a text, and how its authors sample the model."""
    ends = [metadata.get(f"tokenizer.ggml.{part}_token_id") for part in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(id for id in ends if id is not None))
    said = {key: metadata.get(f"general.sampling.{theirs}") for key, (theirs, _) in SAMPLING.items()}
    sampling = {key: as_written(value) for key, value in said.items() if value is not None}
    stop = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    return {**stop, **({"do_sample": True, **sampling} if sampling else {})}


def as_written(value: Any) -> Any:
    """Return a value of the metadata; a float32 as the shortest number that rounds to it, as people wrote it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def to_gguf(name: str) -> str | None:
    """Return the name that a tensor of a Hugging Face directory has in a GGUF file, `None` if it has none there."""
    module, _, leaf = name.rpartition(".")
    found = _OUR_LAYER.fullmatch(module)
    if found is None:
        return f"{OUTSIDE[module]}.{leaf}" if module in OUTSIDE else None
    inside = INSIDE.get(found["module"])
    return f"blk.{found['layer']}.{inside}.{leaf}" if inside else None


def from_gguf(name: str) -> str | None:
    """Return the name that a tensor of a GGUF file has in a Hugging Face directory, `None` if it has none there."""
    module, _, leaf = name.rpartition(".")
    found = _THEIR_LAYER.fullmatch(module)
    if found is None:
        return f"{_OUTSIDE_BACK[module]}.{leaf}" if module in _OUTSIDE_BACK else None
    inside = _INSIDE_BACK.get(found["module"])
    return f"model.layers.{found['layer']}.{inside}.{leaf}" if inside else None


def turned(name: str) -> bool:
    """Return whether a tensor of a Hugging Face directory has its rows in another order in a GGUF file."""
    return any(f".{module}." in name for module in TURNED)


def rows_to_gguf(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """Return a tensor, or the bytes of its rows, with the rows in GGUF's order.

    Args:
        name: In a Hugging Face directory.
        rows: (out, …).
        head_dim: Channels of a head.
    """
    return pairs_from_halves(rows, head_dim) if turned(name) else rows


def rows_from_gguf(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """Return a tensor, or the bytes of its rows, with the rows in Hugging Face's order; arguments as above."""
    return halves_from_pairs(rows, head_dim) if turned(name) else rows
