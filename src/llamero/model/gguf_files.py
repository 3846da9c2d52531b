"""A Llama in GGUF as one of Hugging Face's: its config from the metadata, its tensors under our names and in our order.

Meaning of the keys: llama.cpp, src/llama-arch.cpp and src/llama-model.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamero.checkpoint.gguf import Gguf, dtype_of, open_gguf
from llamero.checkpoint.gguf_names import ROPE_FREQUENCIES, as_written, from_gguf, rows_from_gguf, to_gguf
from llamero.checkpoint.hf import Spec, Tensors
from llamero.core.errors import LlameroError
from llamero.model import rope
from llamero.model.config import LlamaConfig
from llamero.model.kquant_linear import BLOCKS
from llamero.model.kquants import KINDS
from llamero.model.llama import Llama
from llamero.model.rope import Rope

ARCHITECTURE = "llama"

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor",
}  # fmt: skip

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "use_parallel_residual": (False,),
    "attention.scale": (0.0,),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Keys whose other values would be another mathematics."""

_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon"}


@dataclass(frozen=True)
class GgufModel:
    """A Llama that was found in GGUF."""

    config: LlamaConfig
    tensors: Tensors
    """By Hugging Face's names; where a weight is made of blocks, their bytes under `BLOCKS`."""
    kinds: Mapping[str, str]
    """Type of those weights, by the name of their module."""
    dtype: torch.dtype
    """That the model computes in unless it is told: that of the embeddings, float32 if they are made of blocks."""


def load_config(path: Path) -> LlamaConfig:
    """Return the shape of the model in a GGUF file."""
    return _config(open_gguf(path))


def open_model(path: Path) -> GgufModel:
    """Return the model in a GGUF file.

    Raises:
        LlameroError: If it is not a GGUF file of a Llama, or a tensor is missing, has no place in a Llama, another
            shape than the metadata say or a type that is not decoded here.
    """
    file = open_gguf(path)
    config = _config(file)
    _check_shapes(file, config)
    kinds: dict[str, str] = {}
    sources: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    for theirs, spec in file.specs.items():
        ours = from_gguf(theirs)
        if theirs == ROPE_FREQUENCIES or ours is None:
            continue
        dtype = dtype_of(spec.type)
        if dtype is not None:
            sources[ours], specs[ours] = theirs, Spec(spec.shape, dtype)
            continue
        module = ours.removesuffix(".weight")
        kinds[module] = spec.type.name
        sources[f"{module}.{BLOCKS}"] = theirs
        specs[f"{module}.{BLOCKS}"] = Spec((spec.shape[0], spec.row_bytes), torch.uint8)

    if config.tie_word_embeddings and "model.embed_tokens" in kinds:
        kinds["lm_head"] = kinds["model.embed_tokens"]

    def read(_: Path, name: str) -> Tensor:
        return rows_from_gguf(name, file[sources[name]], config.head_dim)

    files = {name: file.places[theirs].path for name, theirs in sources.items()}
    dtype = dtype_of(file.specs[_EMBEDDING].type) or torch.float32
    return GgufModel(config, Tensors(path.parent, files, specs, read), kinds, dtype)


def _check_shapes(file: Gguf, config: LlamaConfig) -> None:
    """Refuse a file whose tensors are not those of its metadata."""
    with torch.device("meta"):
        model = Llama(config)
    expected = {str(to_gguf(name)): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    left = sorted(set(file.specs) - set(expected) - {ROPE_FREQUENCIES})
    missing = sorted(set(expected) - set(file.specs))
    if left or missing:
        problem = f"tensor `{left[0]}` has no place in a Llama" if left else f"tensor `{missing[0]}` is missing"
        raise LlameroError(f"{problem} ({len(left or missing)} such)", where=file.paths[0])
    for name, shape in expected.items():
        spec = file.specs[name]
        problem = ""
        if spec.shape != shape:
            problem = f"is {spec.shape}, the metadata say {shape}"
        elif spec.type.name not in (*KINDS, *_PLAIN) or (len(shape) == 1 and spec.type.name not in _PLAIN):
            problem = f"is of type {spec.type.name}, which is not decoded here"
        if problem:
            raise LlameroError(
                f"tensor `{name}` {problem}",
                where=file.places[name].path,
                fix=f"give a file of other types ({', '.join([*_PLAIN, *KINDS])}), or the model that it was made from",
            )


_PLAIN = ("F32", "F16", "BF16")


class _Keys:
    """The metadata of a file, a Llama's keys by their short names."""

    def __init__(self, file: Gguf) -> None:
        self.path, self._metadata = file.paths[0], file.metadata
        found = self._metadata.get("general.architecture")
        if found != ARCHITECTURE:
            raise LlameroError(
                f"architecture `{found}` is not a Llama" if found else "the metadata name no architecture",
                where=self.path,
                fix=f"give a file whose `general.architecture` is `{ARCHITECTURE}`",
            )
        for key, value in self._metadata.items():
            name = key.removeprefix(f"{ARCHITECTURE}.")
            if name != key:
                self._check(name, value)

    def _check(self, name: str, value: object) -> None:
        allowed = _MUST_BE.get(name)
        if allowed is not None and value not in allowed:
            raise LlameroError(
                f"`{ARCHITECTURE}.{name}: {value}` is another mathematics than a Llama's", where=self.path
            )
        if allowed is None and name not in _READ | _HARMLESS:
            raise LlameroError(
                f"unknown key `{ARCHITECTURE}.{name}: {value}`; it may change what the model computes", where=self.path
            )

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value; numbers as people wrote them before they became float32."""
        return as_written(self._metadata.get(f"{ARCHITECTURE}.{name}", default))

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive number that is the same for all layers."""
        value = self.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or value <= 0:
            problem = "is missing" if value is None else f"must be a positive number, is {value!r}"
            raise LlameroError(f"`{ARCHITECTURE}.{name}` {problem}", where=self.path)
        return value

    def id(self, part: str, default: int | None) -> int | None:
        """Return the id of the token that plays a part."""
        return self._metadata.get(f"tokenizer.ggml.{part}_token_id", default)

    def vocabulary(self, rows: int) -> int:
        """Return the number of tokens: rows of the embedding, which nothing in the file may contradict."""
        said = {
            f"`{ARCHITECTURE}.vocab_size`": self.get("vocab_size"),
            "`tokenizer.ggml.tokens`": len(self._metadata.get("tokenizer.ggml.tokens", ())) or None,
        }
        for what, number in said.items():
            if number not in (None, rows):
                raise LlameroError(f"{what} says {number} tokens, the embedding has {rows} rows", where=self.path)
        return rows


def _config(file: Gguf) -> LlamaConfig:
    keys = _Keys(file)
    if _EMBEDDING not in file:
        raise LlameroError(f"tensor `{_EMBEDDING}` is missing", where=file.paths[0])
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    kv = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", hidden // heads)
    if heads % kv:
        raise LlameroError(f"{heads} attention heads do not divide into {kv} key/value heads", where=keys.path)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            problem = f"`{ARCHITECTURE}.{key}` is {keys.get(key)}, a head has {head_dim} channels"
            raise LlameroError(f"{problem}: that is not a Llama's mathematics", where=keys.path)
    epsilon = keys.get("attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float):
        raise LlameroError(f"`{ARCHITECTURE}.attention.layer_norm_rms_epsilon` is missing", where=keys.path)
    context = keys.count("context_length")
    return LlamaConfig(
        vocab_size=keys.vocabulary(file.specs[_EMBEDDING].shape[0]),
        hidden_size=hidden,
        intermediate_size=keys.count("feed_forward_length"),
        num_layers=keys.count("block_count"),
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        rope=_rope(file, keys, head_dim=head_dim, context=context),
        max_position_embeddings=context,
        rms_norm_eps=epsilon,
        tie_word_embeddings=_HEAD not in file,
        attention_bias="blk.0.attn_q.bias" in file,
        mlp_bias="blk.0.ffn_gate.bias" in file,
        carried={f"{part}_token_id": id for part in ("bos", "eos") if (id := keys.id(part, None)) is not None},
    )


def _rope(file: Gguf, keys: _Keys, *, head_dim: int, context: int) -> Rope:
    """Return the rotary embedding that the metadata, and the tensor of frequencies if there is one, describe."""
    theta = keys.get("rope.freq_base", 10_000.0)
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    kind = keys.get("rope.scaling.type", "linear")
    original = keys.get("rope.scaling.original_context_length")
    if ROPE_FREQUENCIES in file:
        if kind != "none" and factor not in (0.0, 1.0):
            raise LlameroError(f"`{ROPE_FREQUENCIES}` beside a RoPE scaling of type `{kind}`", where=keys.path)
        return _divided(file, keys, theta, head_dim, original or 8192)
    if kind == "none" or factor in (0.0, 1.0):
        kind = "default"
    said: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        said["factor"] = factor
    if kind == "yarn":
        said |= {
            "original_max_position_embeddings": original or context,
            "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
            "attention_factor": _attention_factor(keys, factor),
        }
    elif keys.get("rope.scaling.attn_factor", 1.0) != 1:
        raise LlameroError(f"a RoPE scaling of type `{kind}` with an `attn_factor` is not a Llama's", where=keys.path)
    return rope.from_hf(said, head_dim=head_dim, context=context, where=str(keys.path))


def _attention_factor(keys: _Keys, factor: float) -> float | None:
    """Return YaRN's factor on attention where it is not the one of the paper.

    `attn_factor` is relative to that; `yarn_attn_factor` is what the config.json of the model said, which converters
    copy and llama.cpp does not heed.
    """
    relative = keys.get("rope.scaling.attn_factor", 1.0)
    return keys.get("rope.scaling.yarn_attn_factor") if relative == 1 else relative * (0.1 * math.log(factor) + 1)


def _divided(file: Gguf, keys: _Keys, theta: float, head_dim: int, original: int) -> Rope:
    spec = file.specs[ROPE_FREQUENCIES]
    if spec.shape != (head_dim // 2,) or spec.type.name != "F32":
        problem = f"tensor `{ROPE_FREQUENCIES}` is {spec.shape} {spec.type.name}, expected ({head_dim // 2},) F32"
        raise LlameroError(problem, where=keys.path)
    found = rope.llama3_of(file[ROPE_FREQUENCIES].clone(), theta=theta, head_dim=head_dim, original_context=original)
    if found is None:
        raise LlameroError(f"`{ROPE_FREQUENCIES}` are not those of Llama 3.1's scaling, nor of none", where=keys.path)
    return found
