"""The Llama, top to bottom (Touvron et al. 2023, arXiv:2302.13971; grouped queries: arXiv:2305.13245).

Tokens travel as one flat row without a batch axis: which of them belong together is the layout's matter
(`attention`), so that packed documents, batches, prefix trees and cache pages are one forward pass.
Parameters have the names of Hugging Face checkpoints.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llamero.model.attention import Documents, Layout, attend
from llamero.model.config import LlamaConfig
from llamero.model.device import brought
from llamero.model.dropout import SILENT, Drop, LayerNoise, Noise, attend_dropped, drop
from llamero.model.linear import linear
from llamero.model.rope import rotate, rotations


@runtime_checkable
class Cache(Protocol):
    """Where the keys and values of earlier tokens wait."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new keys and values (tokens, kv, d) of a layer and return what `attend` needs."""
        ...


class RMSNorm(nn.Module):
    """Division by the root mean square, in float32, then a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Normalize each token."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps)
        # the order of roundings below is that of the reference implementation
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Mix each position with the positions that its layout lets it see."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner, inner_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = linear(config.hidden_size, inner, bias=bias)
        self.k_proj = linear(config.hidden_size, inner_kv, bias=bias)
        self.v_proj = linear(config.hidden_size, inner_kv, bias=bias)
        self.o_proj = linear(inner, config.hidden_size, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotation: Float[Tensor, "tokens half 2"],
        layout: Layout,
        cache: tuple[Cache, int] | None = None,
        noise: LayerNoise = SILENT,
    ) -> Float[Tensor, "tokens dim"]:
        """Return the mixture; `cache` is the cache and this layer's number in it."""
        split = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, split), rotation)  # (tokens, heads, d)
        k = rotate(self.k_proj(x).unflatten(-1, split), rotation)  # (tokens, kv, d)
        v = self.v_proj(x).unflatten(-1, split)
        if cache is not None:
            k, v = cache[0].extend(cache[1], k, v)
        if noise.probabilities is not None:
            out = _attend_dropped(q, k, v, layout, noise.probabilities)
        else:
            out, _ = attend(q, k, v, layout)
        return self.o_proj(out.flatten(-2))


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, layout: Layout, what: Drop) -> Tensor:
    assert isinstance(layout, Documents)  # what is trained on
    return attend_dropped(q, k, v, layout.lengths, what)


_attend_dropped = cast("Callable[..., Tensor]", torch.compiler.disable(_document_by_document))
"""A compiled program would be another one for other lengths."""


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        dim, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(dim, inner, bias=bias)
        self.up_proj = linear(dim, inner, bias=bias)
        self.down_proj = linear(inner, dim, bias=bias)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Transform each token by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotation: Float[Tensor, "tokens half 2"],
        layout: Layout,
        cache: tuple[Cache, int] | None = None,
        noise: LayerNoise = SILENT,
        only: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "kept dim"]:
        """Add what attention and what the MLP have to say; `only` these tokens come out of it, where it is given."""
        x = x + drop(self.self_attn(self.input_layernorm(x), rotation, layout, cache, noise), noise.attention)
        if only is not None:
            x = x[only]
        return x + drop(self.mlp(self.post_attention_layernorm(x)), noise.mlp)


class Decoder(nn.Module):
    """Embedding, layers, last normalization: the `model.` of a checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A whole Llama."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let the head use what the embedding is made of where the config says so; needed again after loading."""
        if self.config.tie_word_embeddings:
            table = self.model.embed_tokens
            for name, tensor in (*table.named_parameters(recurse=False), *table.named_buffers(recurse=False)):
                setattr(self.lm_head, name, tensor)

    def rotation(self, positions: Int[Tensor, " tokens"], lengths: Sequence[int]) -> Float[Tensor, "tokens half 2"]:
        """Return the rotations of tokens.

        Args:
            positions: Position of each token in its own sequence.
            lengths: Full length of each sequence, one for all tokens or one for each of them: dynamic
                scaling depends on it, and it must be the same whenever a sequence is continued.
        """
        rope, device = self.config.rope, positions.device
        if rope.depends_on_length and len(set(lengths)) > 1:
            known = {length: rope.frequencies(length) for length in set(lengths)}
            frequencies = brought(torch.stack([known[length] for length in lengths]), device)
        else:
            frequencies = brought(rope.frequencies(lengths[0]), device)
        return rotations(positions, frequencies, scale=rope.attention_scale)

    def document_rotation(self, layout: Documents, device: torch.device) -> Float[Tensor, "tokens half 2"]:
        """Return the rotations of documents that lie one after the other, each of which begins at position 0."""
        every = self.config.rope.depends_on_length
        each = [length for length in layout.lengths for _ in range(length)] if every else layout.lengths[:1]
        return self.rotation(brought(layout.positions, device), each)

    def hidden(
        self,
        ids: Int[Tensor, " tokens"],
        rotation: Float[Tensor, "tokens half 2"],
        layout: Layout,
        cache: Cache | None = None,
        noise: Noise | None = None,
        only: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "kept dim"]:
        """Return the normalized last hidden state of each token; `lm_head` of it are the logits.

        Args:
            ids: The tokens.
            rotation: Theirs.
            layout: Who sees whom.
            cache: Where keys and values of earlier tokens wait.
            noise: What training leaves out or adds.
            only: Return the states of these tokens alone; the last MLP is spared the others.
        """
        x = self.model.embed_tokens(ids)
        if noise is not None:
            x = noise.on_embeddings(x)
        for number, block in enumerate(self.model.layers):
            here = None if cache is None else (cache, number)
            last = {} if only is None or number + 1 < len(self.model.layers) else {"only": only}
            x = block(x, rotation, layout, here, SILENT if noise is None else noise.of_layer(number), **last)
        return self.model.norm(x)

    def packed_hidden(
        self, ids: Int[Tensor, " tokens"], lengths: Sequence[int], noise: Noise | None = None
    ) -> Float[Tensor, "tokens dim"]:
        """Return hidden states of documents that lie one after the other and do not see each other.

        Args:
            ids: Their tokens.
            lengths: Tokens of each.
            noise: What training leaves out or adds; nothing where it is not given.
        """
        layout = Documents(tuple(lengths)).on(ids.device)
        return self.hidden(ids, self.document_rotation(layout, ids.device), layout, noise=noise)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of whole sequences of equal length."""
        batch, time = ids.shape
        hidden = self.packed_hidden(ids.flatten(), [time] * batch)
        return self.lm_head(hidden).unflatten(0, (batch, time))


@torch.no_grad()
def initialize(model: Llama, *, seed: int, std: float = 0.02) -> None:
    """Give every parameter its fresh values (`fresh`)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(fresh(name, parameter.shape, layers=model.config.num_layers, seed=seed, std=std))


def fresh(name: str, shape: Sequence[int], *, layers: int, seed: int, std: float = 0.02) -> Tensor:
    """Return fresh values in float32: normal, outputs of attention and MLP smaller by √(2·layers) (GPT-2's rule).

    They depend on the parameter's name, not on what was drawn before, so any process can draw any of them alone.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    if name.endswith("bias"):
        return torch.zeros(*shape)
    last = name.endswith(("o_proj.weight", "down_proj.weight"))
    scale = std / (2 * layers) ** 0.5 if last else std
    return torch.empty(*shape).normal_(std=scale, generator=generator_of(name, seed=seed))


def generator_of(name: str, *, seed: int) -> torch.Generator:
    """Return the random numbers that are a parameter's."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
