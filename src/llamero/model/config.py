"""What a Llama is: the numbers of a config.json that decide the mathematics, and nothing that was not understood.

A key that we do not know could change the result of a model, so an unknown key is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llamero.core.errors import LlameroError, did_you_mean
from llamero.model import rope
from llamero.model.rope import Rope

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
}
"""Architectures that are this mathematics, each with the values its own keys must have for it to be so."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "embedding_multiplier": (1, 1.0, None),
    "logits_scaling": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "hidden_dropout": (0, 0.0, None),
    "embd_pdrop": (0, 0.0, None),
    "resid_pdrop": (0, 0.0, None),
}
"""Keys whose other values would be another mathematics."""

_READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip

_HARMLESS = {
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_from_model_config",
    "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "initializer_range", "pretraining_tp",
    "quantization_config", "auto_map", "torchscript", "output_attentions", "output_hidden_states", "return_dict",
    "is_llama_config", "max_sequence_length", "max_window_layers", "transformers.js_config", "license",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "tokenizer_class", "prefix", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "return_dict_in_generate",
    "finetuning_task", "architectures_note", "unsloth_version", "unsloth_fixed", "pipeline_tag", "layer_types",
}  # fmt: skip
"""Keys that do not enter the forward pass."""


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    architecture: str = "LlamaForCausalLM"
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Keys that do not enter the forward pass but belong to the model (its bos, eos and pad ids)."""

    def to_hf(self, *, dtype: str) -> dict[str, Any]:
        """Return the config.json of this model, RoPE in both spellings so that old and new readers agree."""
        parameters = self.rope.to_hf()
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
            "rope_parameters": parameters,
            **({"sliding_window": None} if self.architecture == "MistralForCausalLM" else {}),
            **self.carried,
            "torch_dtype": dtype,
            "use_cache": True,
        }


def from_hf(config: Mapping[str, Any], *, where: str) -> LlamaConfig:
    """Return the shape that a config.json describes, or refuse the key that we do not understand.

    Args:
        config: The parsed file.
        where: The file, for errors.
    """
    architecture = _architecture(config, where)
    for key, value in config.items():
        allowed = _MUST_BE.get(key)
        if allowed is not None and value not in allowed:
            raise LlameroError(f"`{key}: {value}` is another mathematics than a Llama's", where=where)
        if allowed is None and key not in _READ | _HARMLESS:
            raise LlameroError(
                f"unknown key `{key}: {value}`; it may change what the model computes",
                where=where,
                fix="remove it from config.json if you are sure that it does not",
            )
    _full_attention_only(config, where)
    hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    head_dim = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads") or heads
    if heads % kv:
        raise LlameroError(f"{heads} attention heads do not divide into {kv} key/value heads", where=where)
    context = config.get("max_position_embeddings", 2048)
    return LlamaConfig(
        vocab_size=_count(config, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size", where),
        num_layers=_count(config, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        rope=rope.from_hf(_rope_parameters(config, where), head_dim=head_dim, context=context, where=where),
        max_position_embeddings=context,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        architecture=architecture,
        carried={key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config},
    )


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or [f"{str(config.get('model_type')).capitalize()}ForCausalLM"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise LlameroError(
            f"architecture {', '.join(names)} is not a Llama",
            where=where,
            fix=did_you_mean(str(names[0]), ARCHITECTURES),
        )
    for key, needed in ARCHITECTURES[names[0]].items():
        if config.get(key, needed) != needed:
            raise LlameroError(f"{names[0]} with `{key}: {config[key]}` is not a Llama's mathematics", where=where)
    return names[0]


def _full_attention_only(config: Mapping[str, Any], where: str) -> None:
    other = set(config.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise LlameroError(f"`layer_types` has {', '.join(sorted(other))}; a Llama attends in full", where=where)


def _rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the RoPE keys in one spelling, and refuse two spellings that disagree."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    new = config.get("rope_parameters")
    if new is None:
        return old
    new = {"rope_theta": old["rope_theta"], **new}
    for key in ("rope_theta", "factor"):
        stated = key in config or key in (config.get("rope_scaling") or {})
        if stated and key in old and old[key] != new.get(key):
            raise LlameroError(
                f"`rope_parameters` says {key} {new.get(key)}, the older spelling says {old[key]}",
                where=where,
                fix="remove the one that is wrong",
            )
    return new


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise LlameroError(f"`{key}` must be a positive number, is {value!r}", where=where)
    return value
