"""Llamas in Meta's `original/` layout: names, rows, and params.json against config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamero.checkpoint.hf import Spec, Tensors
from llamero.checkpoint.meta import (
    MetaDirectory,
    halves_from_pairs,
    open_meta,
    pairs_from_halves,
    write_meta,
)
from llamero.convert.config import ConvertConfig
from llamero.convert.model import Model, agreed, checked, config_beside, must_divide, shapes, track
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.load import EMBEDDING, HEAD
from llamero.model.rope import Default, Llama3, Rope
from llamero.text.tiktoken_bpe import looks_like_tiktoken

NAMES = {
    EMBEDDING: "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    HEAD: "output.weight",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
"""Meta's name of each tensor; those of a layer without its number and `.weight`."""

_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip

_FACTOR, _ORIGINAL_CONTEXT, _LOW, _HIGH = 8.0, 8192, 1.0, 4.0
"""What `use_scaled_rope` means in Meta's code; the numbers stand nowhere in its files."""

_CONTEXTS = {10_000.0: (4096, "Llama 2"), 1_000_000.0: (16_384, "Code Llama"), 500_000.0: (8192, "Llama 3")}
"""Tokens that the published models take, by theta."""

_LLAMA3_VOCABULARY = 128_000

_PUBLISHED = ((None, 256), (1.3, 1024), (1.5, 256), (1.3, 4096), (1.2, 4096))
"""`ffn_dim_multiplier` and `multiple_of` of Meta's models."""


def meta_name(name: str) -> str:
    """Return Meta's name of a tensor."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{NAMES[kind]}.weight"


def feed_forward(dim: int, *, multiple_of: int, multiplier: float | None) -> int:
    """Return the width of the feed-forward layer that Meta's code computes from params.json."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def feed_forward_params(dim: int, width: int) -> dict[str, Any]:
    """Return `multiple_of` and `ffn_dim_multiplier` that make a width; published ones where they do."""
    for multiplier, multiple_of in _PUBLISHED:
        if feed_forward(dim, multiple_of=multiple_of, multiplier=multiplier) == width:
            given = {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
            return {key: value for key, value in given.items() if value is not None}
    multiplier = (width + 0.5) / int(2 * 4 * dim / 3)  # half a row more: rounding down must not lose one
    assert feed_forward(dim, multiple_of=1, multiplier=multiplier) == width
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


def open_model(directory: Path, options: ConvertConfig) -> Model:
    """Return the model of a Meta directory."""
    files = open_meta(directory)
    notes = [f"`{name}` passed over: it is computed" for name in files.passed_over]
    config = _config(files, directory, options, notes)
    source = {name: meta_name(name) for name in shapes(config)}
    left = set(files.tensors) - {*source.values(), meta_name(HEAD)}
    missing = sorted(set(source.values()) - set(files.tensors))
    if left or missing:
        problem = f"tensor `{min(left)}` has no place in this model" if left else f"tensor `{missing[0]}` is missing"
        raise LlameroError(problem, where=directory)

    def read(path: Path, name: str) -> Tensor:
        tensor = files.tensors[source[name]]
        return halves_from_pairs(tensor, config.head_dim) if _turns(name) else tensor

    specs = {name: files.tensors.specs[meta] for name, meta in source.items()}
    paths = {name: files.tensors.files[meta] for name, meta in source.items()}
    return checked(Model(config, Tensors(directory, paths, specs, read), tuple(notes)))


def _turns(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def _config(files: MetaDirectory, directory: Path, options: ConvertConfig, notes: list[str]) -> LlamaConfig:
    """Return the config that params.json and the shapes describe."""
    where = directory / "params.json"
    params = _understood(files.params, where)
    stated = _stated(files, params, where)
    tied = _tied(files)
    known = config_beside(directory)
    if known is not None:
        if known.tie_word_embeddings and not tied:
            raise LlameroError(
                "config.json ties the head to the embedding, and they differ",
                where=directory,
                fix="set `tie_word_embeddings: false` in it",
            )
        return agreed(stated, known, where=directory)
    head_dim = stated["hidden_size"] // stated["num_heads"]
    rope = _rope(params, stated.pop("theta"), head_dim, options, notes)
    context = options.context or params.get("max_seq_len") or _usual_context(rope, stated, notes)
    return LlamaConfig(
        **stated, head_dim=head_dim, rope=rope, max_position_embeddings=context, tie_word_embeddings=tied
    )


def _understood(params: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    unknown = sorted(set(params) - _PARAMS)
    if unknown:
        raise LlameroError(
            f"unknown keys: {', '.join(unknown)}; they may change what the model computes",
            where=where,
            fix="remove them if you are sure that they do not",
        )
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in params]
    if missing:
        raise LlameroError(f"lacks {', '.join(f'`{key}`' for key in missing)}", where=where)
    return params


def _stated(files: MetaDirectory, params: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return what the directory says, by field of `LlamaConfig`."""
    names = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    for name in names:
        if name not in files.tensors:
            raise LlameroError(f"tensor `{name}` is missing", where=where.parent)
    rows, width = (files.tensors.specs[name].shape[0] for name in names)
    if params.get("vocab_size", -1) not in (-1, rows):
        raise LlameroError(f"`vocab_size` is {params['vocab_size']}, the embedding has {rows} rows", where=where)
    if "multiple_of" in params:
        multiplier = params.get("ffn_dim_multiplier")
        computed = feed_forward(params["dim"], multiple_of=params["multiple_of"], multiplier=multiplier)
        if computed != width:
            raise LlameroError(
                f"`multiple_of` and `ffn_dim_multiplier` make a feed-forward layer of {computed}, w1 has {width} rows",
                where=where,
                fix="a shard may be missing, or params.json be that of another model",
            )
    return {
        "vocab_size": rows,
        "hidden_size": params["dim"],
        "intermediate_size": width,
        "num_layers": params["n_layers"],
        "num_heads": params["n_heads"],
        "num_kv_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "theta": float(params.get("rope_theta", 10_000.0)),
    }


def _tied(files: MetaDirectory) -> bool:
    """Return whether the head is the embedding; Meta's files hold it even then."""
    embedding, head = meta_name(EMBEDDING), meta_name(HEAD)
    if head not in files.tensors:
        return True
    if files.tensors.specs[head] != files.tensors.specs[embedding]:
        return False
    return torch.equal(files.tensors[head], files.tensors[embedding])


def _rope(params: Mapping[str, Any], theta: float, head_dim: int, options: ConvertConfig, notes: list[str]) -> Rope:
    if not params.get("use_scaled_rope"):
        return Default(theta, head_dim)
    if options.rope_factor is None:
        notes.append(
            f"params.json says `use_scaled_rope` and no factor: {_FACTOR:g} was taken, as in Llama 3.1 "
            "(Llama 3.2 has 32: --rope-factor 32)"
        )
    return Llama3(theta, head_dim, options.rope_factor or _FACTOR, _ORIGINAL_CONTEXT, _LOW, _HIGH)


def _usual_context(rope: Rope, stated: Mapping[str, Any], notes: list[str]) -> int:
    """Return the context of the published models that are most like this one; params.json does not say it."""
    context, like = _CONTEXTS.get(rope.theta, (2048, "Llama 1"))
    if isinstance(rope, Llama3):
        context, like = 131_072, "Llama 3.1"
    elif like == "Llama 2" and stated["rms_norm_eps"] < 1e-5:
        context, like = 2048, "Llama 1"
    notes.append(f"params.json does not say how long inputs may be: {context} tokens, as in {like} (else --context N)")
    return context


def write_model(model: Model, directory: Path, options: ConvertConfig) -> None:
    """Write a model as Meta's consolidated.*.pth and params.json."""
    config = model.config
    _refuse_what_meta_lacks(config)
    axis = embedding_axis(config, model.tensors.directory)
    sizes = {"heads": config.num_heads, "key/value heads": config.num_kv_heads, "vocabulary": config.vocab_size}
    sizes |= {"feed-forward rows": config.intermediate_size, "channels": config.hidden_size}
    must_divide("shards", options.shards, sizes, where="--shards")
    source = {meta_name(name): name for name in model.tensors}
    source.setdefault(meta_name(HEAD), EMBEDDING)  # its code has no tied head, so the files hold it twice

    def read(name: str) -> Tensor:
        tensor = model.tensors[source[name]]
        return pairs_from_halves(tensor, config.head_dim) if _turns(source[name]) else tensor

    specs: dict[str, Spec] = {name: model.tensors.specs[hf_name] for name, hf_name in source.items()}
    write_meta(directory, specs, track(list(specs), read), shards=options.shards, embedding_axis=axis)
    text = json.dumps(params_of(config), indent=2) + "\n"
    (directory / "params.json").write_text(text, encoding="utf-8")


def _refuse_what_meta_lacks(config: LlamaConfig) -> None:
    lacks = {
        "biases": config.attention_bias or config.mlp_bias,
        f"heads of {config.head_dim} channels in a width of {config.hidden_size}": (
            config.head_dim * config.num_heads != config.hidden_size
        ),
        f"RoPE of type `{config.rope.to_hf()['rope_type']}`": not isinstance(config.rope, Default | Llama3),
        "`llama3` RoPE with other numbers than its own": isinstance(config.rope, Llama3)
        and (config.rope.original_context, config.rope.low_freq_factor, config.rope.high_freq_factor)
        != (_ORIGINAL_CONTEXT, _LOW, _HIGH),
    }
    found = [what for what, present in lacks.items() if present]
    if found:
        raise LlameroError(f"Meta's code has no {', no '.join(found)}", where="--to meta")


def embedding_axis(config: LlamaConfig, directory: Path) -> int:
    """Return the dimension over which shards share the embedding: 0 in Llama 3's code, which reads tiktoken, else 1."""
    tokenizer = directory / "tokenizer.model"
    if not tokenizer.exists():
        return 0 if config.vocab_size >= _LLAMA3_VOCABULARY else 1
    with tokenizer.open("rb") as file:
        return 0 if looks_like_tiktoken(file.read(4096)) else 1


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """Return params.json."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        **({} if config.num_kv_heads == config.num_heads else {"n_kv_heads": config.num_kv_heads}),
        "vocab_size": config.vocab_size,
        **feed_forward_params(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        **({"use_scaled_rope": True} if isinstance(config.rope, Llama3) else {}),
    }
