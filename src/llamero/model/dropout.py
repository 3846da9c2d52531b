"""The noise of training, dropout and noisy embeddings, as a function of what it falls on.

A number is drawn for (seed, step, sample, position, layer, site, channel) by hashing them: no generator has a state,
so every split of the work over micro-batches, devices or stages, a recomputed activation and a resumed run draw the
same. Keys of tokens are 64 bits, by splitmix64 (Steele et al. 2014, 10.1145/2660193.2660195). A key gives its token a
multiply-shift hash of its own (Dietzfelbinger et al. 1997, 10.1006/jagm.1997.0873), which the channels go through in
32 bits. All of it is integer arithmetic that wraps around, so devices and precisions agree.

Plain dropout: Srivastava et al. 2014. LIMA's rises with depth, on the residual branches alone: Zhou et al. 2023,
arXiv:2305.11206. NEFTune adds uniform noise to embeddings: Jain et al. 2023, arXiv:2310.05914.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.model.device import brought


class Site(IntEnum):
    """Where in a layer (or before all of them) noise falls."""

    ATTENTION = 0
    """Output of attention."""
    MLP = 1
    """Output of the MLP."""
    PROBABILITIES = 2
    """Attention probabilities."""
    EMBEDDING = 3
    """Embeddings that are dropped."""
    NEFTUNE = 4
    """Embeddings that are made noisy."""
    ADAPTER = 5
    """Inputs of low-rank updates."""


class Rates(NamedTuple):
    """How much noise there is."""

    hidden: float = 0.0
    """Dropout of the outputs of attention and MLP; with `lima` that of the last layer."""
    lima: bool = False
    """Whether it rises linearly from 0 in the first layer."""
    attention: float = 0.0
    """Dropout of attention probabilities."""
    embedding: float = 0.0
    """Dropout of embeddings."""
    neftune: float = 0.0
    """α of NEFTune."""
    adapter: float = 0.0
    """Dropout of the inputs of low-rank updates."""

    def hidden_of(self, layer: int, layers: int) -> float:
        """Return the hidden dropout of a layer, by its number in the whole model; a single layer is the last."""
        return self.hidden * layer / (layers - 1) if self.lima and layers > 1 else self.hidden


class Drop(NamedTuple):
    """Dropout at one site; tensors, so that one compiled block serves all layers."""

    keys: Int[Tensor, " tokens"]
    """Of this layer and site."""
    threshold: Int[Tensor, ""] | int
    """Draws below it are dropped."""
    scale: Float[Tensor, ""] | float
    """What is left is multiplied by it: 1 / (1 − p)."""
    first_head: int = 0
    """Attention probabilities only: number of the first head here in the whole model."""


class LayerNoise(NamedTuple):
    """The noise of one layer, `None` where there is none."""

    attention: Drop | None = None
    """On the output of attention."""
    mlp: Drop | None = None
    """On the output of the MLP."""
    probabilities: Drop | None = None
    """On attention probabilities."""
    adapter: Drop | None = None
    """On the inputs of low-rank updates, which are told apart by their first channel."""


SILENT = LayerNoise()
"""No noise."""


@dataclass(frozen=True)
class Noise:
    """The noise of one forward pass."""

    keys: Int[Tensor, " tokens"]
    """Key of each token: `token_keys`."""
    lengths: Int[Tensor, " tokens"]
    """Length of each token's sample."""
    rates: Rates
    layers: int
    """Layers of the whole model, wherever they are."""
    rows: slice | None = None
    """Which of the tokens the residual stream holds here: not all of them under sequence parallelism."""
    first_head: int = 0
    """Number of the first head here in the whole model: not 0 where heads are spread."""

    @cached_property
    def _drops(self) -> tuple[Int[Tensor, " layers"], Float[Tensor, " layers"]]:
        """Threshold and scale of the hidden dropout of every layer, on the device."""
        rates = [self.rates.hidden_of(layer, self.layers) for layer in range(self.layers)]
        thresholds = torch.tensor([_threshold(p) for p in rates], dtype=torch.int32)
        scales = torch.tensor([1 / (1 - p) for p in rates], dtype=torch.float64)
        return brought(thresholds, self.keys.device), brought(scales, self.keys.device)

    def _here(self, values: Int[Tensor, " tokens"]) -> Int[Tensor, " rows"]:
        return values if self.rows is None else values[self.rows]

    def of_layer(self, layer: int) -> LayerNoise:
        """Return the noise of a layer, by its number in the whole model."""
        attention = mlp = probabilities = adapter = None
        if self.rates.hidden_of(layer, self.layers):
            threshold, scale = (values[layer] for values in self._drops)
            keys = self._here(self.keys)
            attention = Drop(site_keys(keys, layer, Site.ATTENTION), threshold, scale)
            mlp = Drop(site_keys(keys, layer, Site.MLP), threshold, scale)
        if p := self.rates.attention:
            keys = site_keys(self.keys, layer, Site.PROBABILITIES)
            probabilities = Drop(keys, _threshold(p), 1 / (1 - p), self.first_head)
        if p := self.rates.adapter:
            adapter = Drop(site_keys(self.keys, layer, Site.ADAPTER), _threshold(p), 1 / (1 - p))
        return LayerNoise(attention, mlp, probabilities, adapter)

    def on_embeddings(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Return embeddings (of `rows`) with noise added and some of them dropped."""
        keys = self._here(self.keys)
        if alpha := self.rates.neftune:
            size = alpha / (self._here(self.lengths) * x.shape[1]).sqrt()
            x = x + (uniform(keys, x.shape[1]) * size[:, None]).to(x.dtype)
        return residual_dropout(x, self.rates.embedding, keys, layer=0, site=Site.EMBEDDING)


def token_keys(
    documents: Sequence[int],
    lengths: Sequence[int],
    *,
    seed: int,
    step: int,
    starts: Sequence[int] | None = None,
) -> Int[Tensor, " tokens"]:
    """Return the key of each token of some samples, made of nothing but what is given here.

    Args:
        documents: Number of each sample in its dataset.
        lengths: Tokens of each sample.
        seed: Of the run.
        step: Of the stage; it is what tells the epochs of a sample apart.
        starts: First token of each sample in its document, where documents are cut; 0 by default. Two pieces
            of one document have the same noise in the same step unless they are told apart here.
    """
    sizes = torch.tensor(lengths)
    first = torch.tensor(starts if starts is not None else [0] * len(lengths))
    of_step = _branch(_branch(torch.zeros(1, dtype=torch.int64), _signed(seed)), step)
    of_documents = _branch(of_step, torch.tensor(documents))
    before = sizes.cumsum(0) - sizes
    positions = torch.arange(int(sizes.sum())) + (first - before).repeat_interleave(sizes)
    return _branch(of_documents.repeat_interleave(sizes), positions)


def site_keys(keys: Int[Tensor, " tokens"], layer: int, site: Site) -> Int[Tensor, " tokens"]:
    """Return keys for one site of one layer."""
    return _branch(keys, 16 * layer + site)


def residual_dropout(
    x: Float[Tensor, "tokens channels"],
    p: float,
    keys: Int[Tensor, " tokens"],
    *,
    layer: int,
    site: Site,
    first_channel: int = 0,
) -> Float[Tensor, "tokens channels"]:
    """Return `x` with a share `p` of it replaced by 0 and the rest multiplied by 1 / (1 − p).

    Args:
        x: Any rows and any neighbouring channels of the whole.
        p: At least 0, below 1; 0 returns `x` itself.
        keys: Of the tokens whose rows these are.
        layer: Number in the whole model.
        site: Where in the layer.
        first_channel: Number of the first channel of `x` in the whole.
    """
    if not p:
        return x
    return drop(x, Drop(site_keys(keys, layer, site), _threshold(p), 1 / (1 - p)), first_channel=first_channel)


def drop(
    x: Float[Tensor, "tokens channels"], what: Drop | None, *, first_channel: int = 0
) -> Float[Tensor, "tokens channels"]:
    """Return `x` with dropout, or as it is where there is none."""
    if what is None:
        return x
    return _without(x, _draw(what.keys, _channels(what.keys, first_channel, x.shape[1])) < what.threshold, what.scale)


def uniform(keys: Int[Tensor, " tokens"], channels: int) -> Float[Tensor, "tokens channels"]:
    """Return the draws of NEFTune, from [-1, 1]."""
    return _draw(site_keys(keys, 0, Site.NEFTUNE), _channels(keys, 0, channels)).float() / 2**31


def attend_dropped(
    q: Float[Tensor, "tokens heads d"],
    k: Float[Tensor, "tokens kv d"],
    v: Float[Tensor, "tokens kv d"],
    lengths: Sequence[int],
    what: Drop,
) -> Float[Tensor, "tokens heads d"]:
    """Return causal attention within documents, with dropout on its probabilities.

    Probabilities have to exist for that: heads · n² of them for a document of n tokens, some of them kept for the
    backward pass, where the fused kernels behind `attend` hold none.
    """
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    parts = zip(*(x.split(list(lengths)) for x in (q, keys, values, what.keys)), strict=True)
    return torch.cat([_attend_one(q, k, v, what._replace(keys=own)) for q, k, v, own in parts])


def _attend_one(q: Tensor, k: Tensor, v: Tensor, what: Drop) -> Tensor:
    """Attend within one document, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = torch.arange(q.shape[1], device=q.device) + what.first_head
    later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    # the key of the token that asks draws, the key of the one that it looks at is the channel
    draws = _draw(_branch(what.keys, 1 + heads[:, None]), _branch(what.keys, 0))  # (heads, queries, keys)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) / math.sqrt(q.shape[-1])
        odds = scores.masked_fill(later, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", _without(odds, draws < what.threshold, what.scale), v.to(wide))
    return out.to(q.dtype)


def _without(x: Tensor, dropped: Bool[Tensor, "..."], scale: Tensor | float) -> Tensor:
    return (x * scale).masked_fill(dropped, 0)


def _threshold(p: float) -> int:
    """Return the signed 32-bit number that a share `p` of all of them is below."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def _draw(keys: Int[Tensor, "*rows"], channels: Int[Tensor, " channels"]) -> Int[Tensor, "*rows channels"]:
    """Return 32 bits for every key and every channel."""
    flip, multiplier = keys.to(torch.int32), (keys >> 32).to(torch.int32) | 1
    x = (flip[..., None] ^ channels.to(torch.int32)).mul_(multiplier[..., None])
    x ^= (x >> 15) & 0x1FFFF
    return x.mul_(0x21F0AAAD)


def _channels(keys: Tensor, first: int, count: int) -> Int[Tensor, " channels"]:
    numbers = torch.arange(first, first + count, device=keys.device)
    return _branch(torch.zeros_like(numbers), numbers)


def _branch(keys: Int[Tensor, "*#shape"], number: Int[Tensor, "*#shape"] | int) -> Int[Tensor, "*shape"]:
    """Return the keys that follow from some keys by a number: splitmix64, started at the key."""
    ahead = (number + 1) * _signed(0x9E3779B97F4A7C15)
    x = keys + (_signed(ahead) if isinstance(ahead, int) else ahead)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(multiplier)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Return `x` shifted to the right, zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the number that has the same lowest 64 bits and fits into 64 with a sign."""
    return (number + 2**63) % 2**64 - 2**63
