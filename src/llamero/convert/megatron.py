"""Llamas in Megatron's checkpoints: names, grouped heads, [up; gate], and `args` against config.json."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamero.checkpoint.hf import Spec, Tensors
from llamero.checkpoint.megatron import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    TIED_HEAD,
    Layout,
    MegatronDirectory,
    group_heads,
    open_megatron,
    ungroup_heads,
    write_megatron,
)
from llamero.checkpoint.meta import halves_from_pairs, pairs_from_halves
from llamero.checkpoint.pickles import Choice
from llamero.convert.config import ConvertConfig
from llamero.convert.model import Model, agreed, cached, checked, config_beside, must_divide, reshaped, shapes, track
from llamero.core.errors import LlameroError
from llamero.model import load
from llamero.model.config import LlamaConfig
from llamero.model.rope import Default, Linear, Llama3, Rope

PAD_TO = 128
"""The padded vocabulary is a multiple of this and the tensor ranks (`make_vocab_size_divisible_by`)."""

_ROTARY = 1
"""Number of the rotary one among epfLLM's position embeddings."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "glu_activation": ("swiglu",),
    "use_rms_norm": (True,),
    "parallel_attn": (False, None),
    "parallel_layernorm": (False, None),
    "use_post_ln": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "num_layers_per_virtual_pipeline_stage": (None,),
    "sliding_window_size": (None,),
}
"""Arguments whose other values would be another model, or another order of its layers."""

_WHOLE = {
    load.EMBEDDING: EMBEDDING,
    "model.norm.weight": FINAL_NORM,
    load.HEAD: HEAD,
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_UP_GATE = ("mlp.up_proj", "mlp.gate_proj")
_JOINED = {"self_attention.query_key_value": _QKV, "mlp.dense_h_to_4h": _UP_GATE}
"""Tensors that hold several of Hugging Face's."""


class Source(NamedTuple):
    """Where a tensor is: all of Megatron's, or one part of it."""

    name: str
    part: int | None


def source_of(name: str) -> Source:
    """Return where a checkpoint holds a tensor of this Hugging Face name."""
    if name in _WHOLE:
        return Source(_WHOLE[name], None)
    _, _, layer, rest = name.split(".", 3)
    kind, _, leaf = rest.rpartition(".")
    for joined, parts in _JOINED.items():
        if kind in parts:
            return Source(f"encoder.layers.{layer}.{joined}.{leaf}", parts.index(kind))
    return Source(f"encoder.layers.{layer}.{_WHOLE[kind]}.{leaf}", None)


def open_model(directory: Path, options: ConvertConfig) -> Model:
    """Return the model of a checkpoint, its vocabulary padded as it is there unless a config.json says the true one."""
    files = open_megatron(directory)
    notes = [f"`{name}` passed over: only weights are converted" for name in files.passed_over]
    padded, rows = _config(files, directory, options, notes)
    sources = {name: source_of(name) for name in shapes(padded)}
    wanted = {source.name for source in sources.values()}
    left = sorted(set(files.tensors) - wanted - ({TIED_HEAD} if padded.tie_word_embeddings else set()))
    missing = sorted(wanted - set(files.tensors))
    if left or missing:
        problem = f"tensor `{left[0]}` has no place in this model" if left else f"tensor `{missing[0]}` is missing"
        raise LlameroError(problem, where=directory)
    if TIED_HEAD in files.tensors and not torch.equal(files.tensors[TIED_HEAD], files.tensors[EMBEDDING]):
        raise LlameroError(f"`{TIED_HEAD}` is not the embedding", where=files.tensors.files[TIED_HEAD])
    joined = cached(files.tensors)

    def read(path: Path, name: str) -> Tensor:
        source = sources[name]
        if source.part is None:
            return files.tensors[source.name]
        tensor = joined[source.name]
        if name.rpartition(".")[0].endswith(_UP_GATE):
            return tensor.chunk(2)[source.part]
        rows = ungroup_heads(tensor, kv_heads=padded.num_kv_heads, head_dim=padded.head_dim)[source.part]
        return rows if source.part == 2 else halves_from_pairs(rows, padded.head_dim)

    specs = _specs(padded, sources, files.tensors)
    paths = {name: files.tensors.files[source.name] for name, source in sources.items()}
    model = checked(Model(padded, Tensors(directory, paths, specs, read), tuple(notes)))
    return reshaped(model, dtype=None, vocabulary=rows)


def _specs(config: LlamaConfig, sources: Mapping[str, Source], tensors: Tensors) -> dict[str, Spec]:
    """Return the shapes of the tensors; of those that are parts, if all parts together have the right one."""
    expected = shapes(config)
    rows: dict[str, int] = {}
    for name, source in sources.items():
        rows[source.name] = rows.get(source.name, 0) + expected[name][0]
    specs: dict[str, Spec] = {}
    for name, source in sources.items():
        found = tensors.specs[source.name]
        whole = (rows[source.name], *expected[name][1:])
        if source.part is not None and found.shape != whole:
            raise LlameroError(
                f"tensor `{source.name}` is {found.shape}, its arguments say {whole}", where=tensors.files[source.name]
            )
        specs[name] = found if source.part is None else Spec(expected[name], found.dtype)
    return specs


def _config(
    files: MegatronDirectory, directory: Path, options: ConvertConfig, notes: list[str]
) -> tuple[LlamaConfig, int | None]:
    """Return the config, with the padded vocabulary, and the rows that are true where that is known."""
    where = str(directory / "args")
    args = _understood(files.args, where)
    if EMBEDDING not in files.tensors:
        raise LlameroError(f"tensor `{EMBEDDING}` is missing", where=directory)
    stated = _stated(args, files.tensors)
    known = config_beside(directory)
    if known is not None:
        padded = stated.pop("vocab_size")
        config = agreed(stated, known, where=directory)
        if known.vocab_size > padded:
            raise LlameroError(
                f"config.json says {known.vocab_size} tokens, the embedding has {padded} rows", where=directory
            )
        return replace(config, vocab_size=padded), known.vocab_size
    theta = stated.pop("theta")
    for key, value in (("rope_theta", theta), ("layernorm_epsilon", stated["rms_norm_eps"])):
        if args.get(key) is None:
            notes.append(f"the arguments do not say `{key}`: {value:g} was taken")
    if options.true_vocab is None:
        rows = stated["vocab_size"]
        notes.append(f"nothing says how many of the {rows} rows are true tokens: all are kept (else --true-vocab N)")
    context = options.context or args.get("max_position_embeddings") or args.get("seq_length")
    if context is None:
        raise LlameroError("no `max_position_embeddings`", where=where, fix="say --context N, in tokens")
    rope = _rope(args, theta, stated["head_dim"], context)
    return LlamaConfig(**stated, rope=rope, max_position_embeddings=context), None


def _understood(args: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key, allowed in _MUST_BE.items():
        if key in args and args[key] not in allowed:
            raise LlameroError(f"`{key}: {args[key]}` is not a Llama's", where=where)
    position = args.get("position_embedding_type", "rotary")
    if (position.value if isinstance(position, Choice) else position) not in ("rotary", "rope", _ROTARY):
        raise LlameroError("`position_embedding_type` is not rotary", where=where)
    for key in ("hidden_size", "num_attention_heads"):
        if not isinstance(args.get(key), int):
            raise LlameroError(f"`{key}` must be a number, is {args.get(key)!r}", where=where)
    return args


def _stated(args: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return what the arguments and shapes say, by field of `LlamaConfig`."""
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    down = "encoder.layers.0.mlp.dense_4h_to_h.weight"
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    return {
        "vocab_size": tensors.specs[EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": args.get("ffn_hidden_size") or tensors.specs[down].shape[1],
        "num_layers": args.get("num_layers") or args.get("encoder_num_layers") or len(layers),
        "num_heads": heads,
        "num_kv_heads": args.get("num_attention_heads_kv") or heads,
        "head_dim": args.get("kv_channels") or hidden // heads,
        "rms_norm_eps": 1e-5 if args.get("layernorm_epsilon") is None else args["layernorm_epsilon"],
        "theta": float(args.get("rope_theta") or 10_000.0),
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": "encoder.layers.0.self_attention.query_key_value.bias" in tensors,
        "mlp_bias": "encoder.layers.0.mlp.dense_h_to_4h.bias" in tensors,
    }


def _rope(args: Mapping[str, Any], theta: float, head_dim: int, context: int) -> Rope:
    factor = args.get("rope_scaling_factor") or 1.0
    if args.get("use_rope_scaling"):
        return Llama3(theta, head_dim, factor, _LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH)
    return Default(theta, head_dim) if factor == 1.0 else Linear(theta, head_dim, factor)


_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
"""What Megatron-LM's `--use-rope-scaling` means beside its factor."""


def write_model(model: Model, directory: Path, options: ConvertConfig) -> None:
    """Write a model as a Megatron release checkpoint."""
    config, layout = model.config, Layout(options.tensor, options.pipeline)
    sizes = {"key/value heads": config.num_kv_heads, "feed-forward rows": config.intermediate_size}
    must_divide("tensor ranks", layout.tensor, sizes, where="--tensor")
    must_divide("pipeline ranks", layout.pipeline, {"layers": config.num_layers}, where="--pipeline")
    rope = _rope_args(config.rope)
    if config.attention_bias != config.mlp_bias:
        raise LlameroError("Megatron has biases everywhere or nowhere, this model has some", where="--to megatron")
    readers = _readers(model, layout)
    padded = padded_rows(config.vocab_size, layout.tensor)
    specs = {name: _padded(spec, name, padded) for name, (spec, _) in readers.items()}
    dtype = model.tensors.specs[load.EMBEDDING].dtype
    args = {**args_of(config, layout), **rope, "params_dtype": dtype}
    stream = track(list(readers), lambda name: readers[name][1]())
    write_megatron(directory, args, specs, stream, layout=layout)


def padded_rows(rows: int, tensor: int) -> int:
    """Return the rows of a padded vocabulary."""
    unit = PAD_TO * tensor
    return -(-rows // unit) * unit


def _padded(spec: Spec, name: str, rows: int) -> Spec:
    return Spec((rows, *spec.shape[1:]), spec.dtype) if name in (EMBEDDING, HEAD, TIED_HEAD) else spec


def _readers(model: Model, layout: Layout) -> dict[str, tuple[Spec, Callable[[], Tensor]]]:
    """Return what each tensor is like and how to get it, in the order of the layers."""
    config, tensors = model.config, model.tensors
    parts: dict[str, list[str]] = {}
    for name in tensors:
        parts.setdefault(source_of(name).name, []).append(name)
    readers: dict[str, tuple[Spec, Callable[[], Tensor]]] = {}
    for target, names in parts.items():
        names.sort(key=lambda name: source_of(name).part or 0)
        first = tensors.specs[names[0]]
        spec = Spec((sum(tensors.specs[name].shape[0] for name in names), *first.shape[1:]), first.dtype)
        readers[target] = spec, lambda names=names: _joined(names, config, tensors)
    if config.tie_word_embeddings and layout.pipeline > 1:
        readers[TIED_HEAD] = readers[EMBEDDING]
    return dict(sorted(readers.items(), key=lambda item: _position(item[0])))


def _joined(names: list[str], config: LlamaConfig, tensors: Tensors) -> Tensor:
    if len(names) == 1:
        return tensors[names[0]]
    if len(names) == len(_UP_GATE):
        return torch.cat([tensors[name] for name in names])
    q, k = (pairs_from_halves(tensors[name], config.head_dim) for name in names[:2])
    return group_heads(q, k, tensors[names[2]], kv_heads=config.num_kv_heads)


def _position(name: str) -> tuple[int, int]:
    """Return where a tensor comes in a file: embedding, layers, norm, head."""
    if name.startswith("encoder.layers."):
        return 1, int(name.split(".")[2])
    return (EMBEDDING, "", FINAL_NORM, HEAD, TIED_HEAD).index(name), 0


def args_of(config: LlamaConfig, layout: Layout) -> dict[str, Any]:
    """Return the arguments that describe a model to Megatron."""
    return {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_attention_heads_kv": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "position_embedding_type": "rotary",
        "glu_activation": "swiglu",
        "use_rms_norm": True,
        "use_bias": config.attention_bias,
        "use_post_ln": False,
        "parallel_attn": False,
        "parallel_layernorm": False,
        "tie_embed_logits": config.tie_word_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "lima_dropout": False,
        "bias_gelu_fusion": False,
        "bias_droput_fusion": False,  # spelled as its reader spells it
        "use_flash_attn": True,
        "tokenizer_type": "SentencePieceTokenizer",
        "make_vocab_size_divisible_by": PAD_TO,
        "padded_vocab_size": padded_rows(config.vocab_size, layout.tensor),
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "num_layers_per_virtual_pipeline_stage": None,
        "iteration": "release",
    }


def _rope_args(rope: Rope) -> dict[str, Any]:
    match rope:
        case Default():
            return {"rope_scaling_factor": 1.0}
        case Linear():
            return {"rope_scaling_factor": rope.factor}
        case Llama3(original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0):
            return {"rope_scaling_factor": rope.factor, "use_rope_scaling": True}
        case _:
            raise LlameroError(f"Megatron has no RoPE like {rope.to_hf()}", where="--to megatron")
