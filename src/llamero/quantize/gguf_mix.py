"""Which tensor gets which type in a GGUF file: the mixes `Q4_K_M` and so on, from the shape of a model alone.

The rules are llama.cpp's (src/llama-quant.cpp, `llama_tensor_get_type_impl` and `tensor_type_fallback`, as of October
2026), so that a file of that name has the same size and the same tensors as everybody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from llamero.model.config import LlamaConfig


class Mix(NamedTuple):
    """A kind of file."""

    base: str
    """Type of the tensors that no rule raises."""
    file_type: int
    """Its number in `general.file_type`."""
    bits: int
    """Of a code of the type that most weights have."""


MIXES = {
    "F16": Mix("F16", 1, 16),
    "BF16": Mix("BF16", 32, 16),
    "Q8_0": Mix("Q8_0", 7, 8),
    "Q6_K": Mix("Q6_K", 18, 6),
    "Q5_K_M": Mix("Q5_K", 17, 5),
    "Q5_K_S": Mix("Q5_K", 16, 5),
    "Q5_0": Mix("Q5_0", 8, 5),
    "Q4_K_M": Mix("Q4_K", 15, 4),
    "Q4_K_S": Mix("Q4_K", 14, 4),
    "Q4_0": Mix("Q4_0", 2, 4),
    "Q3_K_L": Mix("Q3_K", 13, 3),
    "Q3_K_M": Mix("Q3_K", 12, 3),
    "Q3_K_S": Mix("Q3_K", 11, 3),
    "Q2_K": Mix("Q2_K", 10, 2),
}
"""Every mix that is made, the largest first."""

PLAIN = ("F32", "F16", "BF16")
"""Types that hold any row."""

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What a tensor becomes whose rows are no multiple of 256; F16 where they are no multiple of 32 either."""


class Choice(NamedTuple):
    """The type of a tensor."""

    type: str
    wanted: str
    """What the mix says; another than `type` where rows do not divide into its blocks."""


def types(config: LlamaConfig, mix: str, *, imatrix: bool = True) -> dict[str, str]:
    """Return the type of every tensor that is a matrix, by its name in a GGUF file, in the order of the file.

    Args:
        config: Shape of the model.
        mix: A name of `MIXES`.
        imatrix: Whether the importance of channels is known; the smallest simple mixes are a little larger then.
    """
    return {name: choice.type for name, choice in choices(config, mix, imatrix=imatrix).items()}


def choices(config: LlamaConfig, mix: str, *, imatrix: bool = True) -> dict[str, Choice]:
    """Return what `types` returns, and beside it what the mix says where that does not fit."""
    if mix not in MIXES:
        raise LlameroError(f"unknown GGUF mix `{mix}`", fix=did_you_mean(mix, MIXES))
    base, found = MIXES[mix].base, {}
    for name, width in _matrices(config).items():
        wanted = base if base in PLAIN else _wanted(config, name, mix, width, imatrix=imatrix)
        found[name] = Choice(_fitting(wanted, width), wanted)
    return found


def _matrices(config: LlamaConfig) -> dict[str, int]:
    """Return the input channels of every matrix."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    widths = {
        "attn_q": hidden, "attn_k": hidden, "attn_v": hidden, "attn_output": heads,
        "ffn_gate": hidden, "ffn_up": hidden, "ffn_down": config.intermediate_size,
    }  # fmt: skip
    found = {"token_embd.weight": hidden}
    for layer in range(config.num_layers):
        found |= {f"blk.{layer}.{part}.weight": width for part, width in widths.items()}
    return found if config.tie_word_embeddings else {**found, "output.weight": hidden}


def block(kind: str) -> int:
    """Return the weights of a block of a type."""
    return 1 if kind in PLAIN else 256 if kind.endswith("_K") else 32


def _fitting(wanted: str, width: int) -> str:
    if width % block(wanted) == 0:
        return wanted
    fallback = FALLBACKS.get(wanted, "F16")
    return fallback if width % block(fallback) == 0 else "F16"


def _wanted(config: LlamaConfig, name: str, mix: str, width: int, *, imatrix: bool) -> str:
    base = MIXES[mix].base
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        return "Q8_0" if width % block(base) or base == "Q8_0" else "Q6_K"
    if name == "token_embd.weight":
        return base
    _, number, part, _ = name.split(".")
    layer, layers = int(number), config.num_layers
    if part == "attn_v":
        return _values(config, mix, layer)
    if part == "ffn_down":
        return _down(mix, layer, layers, imatrix=imatrix)
    raised = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"} if part == "attn_output" else {}
    return raised.get(mix, base)


def _values(config: LlamaConfig, mix: str, layer: int) -> str:
    shared, kind = config.num_heads // config.num_kv_heads, MIXES[mix].base
    if mix == "Q2_K":
        kind = "Q4_K" if shared >= 4 else "Q3_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4):
        kind = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more(layer, config.num_layers):
        kind = "Q6_K"
    of_70b = config.num_layers == 80 and shared > 1  # where the values are an eighth of the queries
    return "Q5_K" if of_70b and kind in ("Q3_K", "Q4_K") else kind


def _down(mix: str, layer: int, layers: int, *, imatrix: bool) -> str:
    base, first = MIXES[mix].base, layer < layers // 8
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more(layer, layers) else base
    if first and (mix == "Q4_K_S" or (imatrix and mix in ("Q4_0", "Q5_0"))):
        return {"Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix, base)


def _more(layer: int, layers: int) -> bool:
    """Return whether a layer is one of those that get more bits: the first and last eighth, and every third."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
