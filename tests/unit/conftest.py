"""Models in GGUF, written with the `gguf` library of llama.cpp's own project."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamero.model import kquants
from llamero.model.llama import Llama

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    model: Llama,
    path: Path,
    *,
    kind: str | Mapping[str, str] = "F32",
    change: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, str] | None] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a model as llama.cpp's converter does, and give it the weights that the file then stands for.

    Args:
        model: Its matrices are changed to what their type can say.
        path: Where to.
        kind: Type of matrices, or of those whose names in GGUF are given; vectors are F32.
        change: Metadata that are written instead of or beside the right ones; `None` leaves a key out.
        tensors: The same for tensors, with the type of their bytes.
        architecture: What the file says that it is.
    """
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in ({**metadata(model), **(change or {})}).items():
        if value is not None:
            add(writer, key, value)
    found: dict[str, tuple[np.ndarray, str]] = {}
    for name, parameter in model.named_parameters():
        theirs = gguf_name(name)
        chosen = kind if isinstance(kind, str) else kind.get(theirs, "F32")
        if parameter.dim() < 2:
            chosen = "F32"
        rows = encoded(gguf, parameter, chosen)
        if ".q_proj." in name or ".k_proj." in name:
            heads = len(rows) // config.head_dim
            swapped = rows.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2)
            rows = np.ascontiguousarray(swapped.reshape(rows.shape))
        found[theirs] = (rows, chosen)
    for name, entry in ({**found, **(tensors or {})}).items():
        if entry is not None:
            writer.add_tensor(name, entry[0], raw_dtype=gguf.GGMLQuantizationType[entry[1]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(gguf: Any, parameter: torch.nn.Parameter, kind: str) -> np.ndarray:
    """Return a parameter in a type, and round it to that."""
    if kind in ("F32", "F16"):
        rounded = parameter.detach().to(torch.float32 if kind == "F32" else torch.float16)
        parameter.data = rounded.float()
        return rounded.numpy()
    if kind == "BF16":
        rounded = parameter.detach().bfloat16()
        parameter.data = rounded.float()
        return rounded.view(torch.uint8).numpy()
    data = kquants.encode(parameter.detach(), kind).numpy()
    parameter.data = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    return data


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{leaf}"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.{leaf}"


def metadata(model: Llama) -> dict[str, Any]:
    """Return what the converter writes of a model."""
    config = model.config
    return {
        "general.name": "tiny",
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope.theta),
    }


def add(writer: Any, key: str, value: Any) -> None:
    """Write a key with the type that llama.cpp's converter would give it."""
    methods = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, methods[type(value)])(key, value)


@pytest.fixture
def gguf_of() -> Callable[..., Path]:
    """Write a model in GGUF: `gguf_of(model, path, …)`, see `write_gguf`."""
    return write_gguf
