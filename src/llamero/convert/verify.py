"""Logits of a model by the mathematics of its own layout, layer by layer: a conversion is right if both sides agree.

Meta, Megatron and GGUF turn neighbouring channels (Su et al. 2021, arXiv:2104.09864); the names, the grouped heads and
the [up; gate] of their files are used as they lie there, not through what converts them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llamero.checkpoint import megatron as megatron_files
from llamero.checkpoint.gguf import open_gguf
from llamero.checkpoint.hf import Tensors
from llamero.checkpoint.meta import open_meta
from llamero.convert.model import Model
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.kquants import BlockCodes
from llamero.model.load import EMBEDDING, HEAD, empty_model, load_block

BATCH, LENGTH = 4, 64
HIGHEST = {torch.float32: 0.01, torch.float64: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Mean absolute difference of logits up to which two sides are the same model, by precision of the weights."""

Block = Callable[[Tensor], Tensor]


class Verified(NamedTuple):
    """How far apart the logits of two sides are."""

    highest: float
    mean: float


class Sides(NamedTuple):
    """What a forward pass needs beside its layers."""

    embedding: Callable[[], Tensor]
    blocks: Iterator[Block]
    norm: Callable[[], Tensor]
    head: Callable[[], Tensor]


def some_ids(config: LlamaConfig, *, seed: int = 0) -> Int[Tensor, "batch seq"]:
    """Return ids to compare on."""
    length = min(LENGTH, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(kind: str, model: Model, directory: Path, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Return float32 logits over the true vocabulary; one layer is held at a time.

    Args:
        kind: `hf`, `meta`, `megatron` or `gguf`.
        model: What was read from the directory; of other kinds than `hf` only its config is used.
        directory: Where the files are, or the GGUF file.
        ids: Tokens.
    """
    sides = SIDES[kind](model, directory, ids)
    x = sides.embedding()[ids].float()
    for block in progress.track(sides.blocks, "verify", total=model.config.num_layers, unit="layers"):
        x = block(x)
    x = F.rms_norm(x, x.shape[-1:], sides.norm().float(), model.config.rms_norm_eps)
    return torch.cat([x @ rows.float().T for rows in sides.head()[: model.config.vocab_size].split(4096)], dim=-1)


def compare(one: Float[Tensor, "batch seq vocab"], other: Float[Tensor, "batch seq vocab"]) -> Verified:
    """Return the highest and the mean absolute difference."""
    difference = (one - other).abs()
    return Verified(float(difference.max()), float(difference.mean()))


def refuse_different(found: Verified, dtype: torch.dtype, *, where: Path) -> None:
    """Raise if two sides are not the same model."""
    limit = HIGHEST[dtype]
    if not found.mean <= limit:  # also if it is no number
        raise LlameroError(
            f"the logits of both sides differ by {found.mean:.3g} on average (at most {found.highest:.3g}); "
            f"{limit:g} is allowed for {str(dtype).removeprefix('torch.')}",
            where=where,
            fix="the converted files are kept there for inspection; do not use them",
        )


def _hf(model: Model, directory: Path, ids: Int[Tensor, "batch seq"]) -> Sides:
    config, tensors = model.config, model.tensors
    batch, length = ids.shape
    layout = Documents((length,) * batch)
    positions = torch.arange(length).repeat(batch)
    rotation = empty_model(config).rotation(positions, [length] * len(positions))

    def blocks() -> Iterator[Block]:
        for number in range(config.num_layers):
            block = load_block(config, tensors, number, dtype=torch.float32)
            yield lambda x, block=block: block(x.flatten(0, 1), rotation, layout).unflatten(0, (batch, length))

    head = EMBEDDING if config.tie_word_embeddings else HEAD
    read = tensors.__getitem__
    return Sides(partial(read, EMBEDDING), blocks(), partial(read, "model.norm.weight"), partial(read, head))


Linear = tuple[Tensor, Tensor | None]
"""Weight and bias."""


class Weights(NamedTuple):
    """One layer of the kinds that turn neighbouring channels."""

    attention_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


def _block(config: LlamaConfig, w: Weights, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
    """Return what a layer makes of its input."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), config.rope.frequencies(x.shape[1]))  # (seq, half)
    turn = torch.polar(torch.full_like(angles, config.rope.attention_scale), angles)

    def heads(linear: Linear) -> Tensor:
        return F.linear(normed, *linear).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # (batch, heads, seq, d)

    def rotate(y: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    normed = F.rms_norm(x, x.shape[-1:], w.attention_norm, config.rms_norm_eps)
    mixed = F.scaled_dot_product_attention(
        rotate(heads(w.q)), rotate(heads(w.k)), heads(w.v), is_causal=True, enable_gqa=True
    )
    x = x + F.linear(mixed.transpose(1, 2).flatten(-2), *w.o)
    normed = F.rms_norm(x, x.shape[-1:], w.mlp_norm, config.rms_norm_eps)
    return x + F.linear(F.silu(F.linear(normed, *w.gate)) * F.linear(normed, *w.up), *w.down)


def _meta(model: Model, directory: Path, ids: Int[Tensor, "batch seq"]) -> Sides:
    tensors = open_meta(directory).tensors
    read = tensors.__getitem__

    def blocks() -> Iterator[Block]:
        for number in range(model.config.num_layers):
            yield partial(_block, model.config, _meta_layer(tensors, f"layers.{number}"))

    head = "output.weight" if "output.weight" in tensors else "tok_embeddings.weight"
    return Sides(
        partial(read, "tok_embeddings.weight"), blocks(), partial(read, "norm.weight"), partial(read, head)
    )  # fmt: skip


def _meta_layer(tensors: Tensors, layer: str) -> Weights:
    def get(name: str) -> Tensor:
        return tensors[f"{layer}.{name}.weight"].float()

    q, k, v, o = ((get(f"attention.w{letter}"), None) for letter in "qkvo")
    gate, down, up = ((get(f"feed_forward.w{number}"), None) for number in "123")
    return Weights(get("attention_norm"), q, k, v, o, get("ffn_norm"), gate, up, down)


def _megatron(model: Model, directory: Path, ids: Int[Tensor, "batch seq"]) -> Sides:
    tensors = megatron_files.open_megatron(directory).tensors
    read = tensors.__getitem__

    def blocks() -> Iterator[Block]:
        for number in range(model.config.num_layers):
            yield partial(_block, model.config, _megatron_layer(model.config, tensors, f"encoder.layers.{number}"))

    head = megatron_files.HEAD if megatron_files.HEAD in tensors else megatron_files.EMBEDDING
    return Sides(
        partial(read, megatron_files.EMBEDDING), blocks(), partial(read, megatron_files.FINAL_NORM), partial(read, head)
    )


def _megatron_layer(config: LlamaConfig, tensors: Tensors, layer: str) -> Weights:
    def get(name: str) -> Tensor:
        return tensors[f"{layer}.{name}"].float()

    def cut(of: Linear, rows: Callable[[Tensor], Tensor]) -> Linear:
        return rows(of[0]), None if of[1] is None else rows(of[1])

    def linear(name: str) -> Linear:
        bias = f"{layer}.{name}.bias"
        return get(f"{name}.weight"), tensors[bias].float() if bias in tensors else None

    per_group = config.num_heads // config.num_kv_heads

    def heads(first: int, count: int) -> Linear:
        """Return `count` heads of every group, from the `first` on."""
        rows = slice(first * config.head_dim, (first + count) * config.head_dim)
        return cut(qkv, lambda all: torch.cat([group[rows] for group in all.chunk(config.num_kv_heads)]))

    qkv = linear("self_attention.query_key_value")
    q, k, v = heads(0, per_group), heads(per_group, 1), heads(per_group + 1, 1)
    wide = linear("mlp.dense_h_to_4h")
    up = cut(wide, lambda all: all[: config.intermediate_size])
    gate = cut(wide, lambda all: all[config.intermediate_size :])
    return Weights(
        get("input_layernorm.weight"), q, k, v, linear("self_attention.dense"), get("post_attention_layernorm.weight"),
        gate, up, linear("mlp.dense_4h_to_h"),
    )  # fmt: skip


def _gguf(model: Model, path: Path, ids: Int[Tensor, "batch seq"]) -> Sides:
    file = open_gguf(path)

    def read(name: str) -> Tensor:
        return BlockCodes(file[name], file.specs[name].type.name).dequantize()

    def linear(name: str) -> Linear:
        return read(f"{name}.weight"), read(f"{name}.bias") if f"{name}.bias" in file else None

    def layer(name: str) -> Weights:
        q, k, v, o = (linear(f"{name}.attn_{part}") for part in ("q", "k", "v", "output"))
        gate, up, down = (linear(f"{name}.ffn_{part}") for part in ("gate", "up", "down"))
        return Weights(read(f"{name}.attn_norm.weight"), q, k, v, o, read(f"{name}.ffn_norm.weight"), gate, up, down)

    def blocks() -> Iterator[Block]:
        for number in range(model.config.num_layers):
            yield partial(_block, model.config, layer(f"blk.{number}"))

    head = "output.weight" if "output.weight" in file else "token_embd.weight"
    return Sides(
        partial(read, "token_embd.weight"), blocks(), partial(read, "output_norm.weight"), partial(read, head)
    )  # fmt: skip


SIDES: dict[str, Callable[[Model, Path, Tensor], Sides]] = {
    "hf": _hf,
    "meta": _meta,
    "megatron": _megatron,
    "gguf": _gguf,
}
"""Every kind of model there is."""
