"""Names of a Llama's tensors in GGUF files, and the order in which their rows stand there."""

import re

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

_OUR_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>.+)")
_THEIR_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<module>.+)")
_INSIDE_BACK = {theirs: ours for ours, theirs in INSIDE.items()}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in OUTSIDE.items()}


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
