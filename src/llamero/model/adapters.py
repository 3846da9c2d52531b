"""Adapters: low-rank updates beside frozen linear layers, y = base(x) + scale · B(A(x)).

LoRA (Hu et al. 2021, arXiv:2106.09685); QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is the same beside packed
layers. The adapter of a model is what requires a gradient, no more and no less; its parameters are named as PEFT's.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llamero.checkpoint import peft
from llamero.core.errors import LlameroError, did_you_mean
from llamero.model.adapter_config import AdapterConfig
from llamero.model.dropout import SILENT, Drop, LayerNoise, drop
from llamero.model.linear import PackedLinear, linear
from llamero.model.llama import Llama, generator_of

Linear = nn.Linear | PackedLinear
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained update of low rank.

    Both factors are plain linear layers in float32 whatever the base rests in. Split over the base's outputs, `lora_B`
    is split with it and `lora_A` is whole; split over its inputs, the other way round.

    Args:
        base: Any linear layer; its parameters are frozen.
        rank: Of the update.
        scale: Factor of the update.
    """

    def __init__(self, base: Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        at = next(chain(base.parameters(), base.buffers()))
        wide = torch.promote_types(at.dtype, torch.float32) if at.is_floating_point() else torch.float32
        self.lora_A = linear(base.in_features, rank, bias=False).to(device=at.device, dtype=wide)
        self.lora_B = linear(rank, base.out_features, bias=False).to(device=at.device, dtype=wide)
        self.dropped: Drop | None = None
        """What is dropped from the update's input in this forward pass."""
        self.first_channel = 0
        """Number of its first input channel here among those of all the updates of a decoder layer."""
        self.first_input = 0
        """Number of its first input channel here in the whole layer: not 0 where inputs are spread."""

    def initialize(self, *, seed: int, name: str, gaussian: bool) -> None:
        """Draw the first factor, by the layer's name so that every layout draws the same; the second is zero."""
        drawn = first_factor(name, self.lora_A.weight.shape, seed=seed, gaussian=gaussian)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Apply the layer and its update."""
        y = self.base(x)
        x = drop(x, self.dropped, first_channel=self.first_channel)
        if not torch.is_autocast_enabled(x.device.type):  # which chooses the precision itself
            x = x.to(self.lora_A.weight.dtype)
        return y + self.lora_B(self.lora_A(x) * self.scale).to(y.dtype)

    @torch.no_grad()
    def update(self) -> Float[Tensor, "out d"]:
        """Return what the adapter adds to the weight."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def first_factor(name: str, shape: Sequence[int], *, seed: int, gaussian: bool) -> Float[Tensor, "rank d"]:
    """Return the first factor of a layer's update as it begins, drawn by the layer's name.

    Args:
        name: Of the layer.
        shape: (rank, d).
        seed: Of the run.
        gaussian: Whether it is normal, rather than uniform as a linear layer's weight.
    """
    drawn, generator = torch.empty(*shape), generator_of(name, seed=seed)
    if gaussian:
        return nn.init.normal_(drawn, std=1 / shape[0], generator=generator)
    return nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)


def updated(
    weight: Float[Tensor, "out d"], a: Float[Tensor, "rank d"], b: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, "out d"]:
    """Return a weight with its update added, in the precision of the update's factors."""
    return weight.to(a.dtype) + scale * (b @ a)


def attach(
    model: Llama,
    config: AdapterConfig,
    *,
    seed: int,
    grown: bool = False,
) -> list[nn.Parameter]:
    """Freeze a model, put an adapter beside its layers, and return the adapter's parameters.

    The model computes what it did before, until the adapter is trained. `config.base` is not looked at here: the base
    comes packed (`linear.pack`) or not.

    Args:
        model: Changed in place; on the meta device factors are not drawn (`LoraLinear.initialize` does it later).
        config: Which layers, and how.
        seed: Decides the first factors.
        grown: Whether the model has rows for tokens that the base does not know.

    Raises:
        LlameroError: A name is unknown, the rank is larger than a layer, or new tokens would not be in the adapter.
    """
    targets = _targets(model, config)
    _refuse_rank(model, config.lora, targets)
    saved = (("embed_tokens", "lm_head") if grown else ()) if config.modules_to_save is None else config.modules_to_save
    said = peft.Adapter("", config.lora, config.stated_alpha, targets, config.rslora, config.dropout, saved)
    whole = _whole(model, saved)
    if grown and not {EMBEDDING, HEAD} <= set(whole):
        raise LlameroError(
            f"the vocabulary grew, and `modules_to_save: {list(saved)}` leaves rows of new tokens out of the adapter",
            where="adapter",
            fix="name `embed_tokens` and `lm_head`, or leave `modules_to_save` out",
        )
    trained = wrap(model, said, whole)
    for parameter in trained:  # what is trained is float32 under a base of any precision
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    for name, layer in updates(model).items():
        if not layer.lora_A.weight.is_meta:
            layer.initialize(seed=seed, name=name, gaussian=config.init == "gaussian")
    if config.dropout:
        for block in model.model.layers:
            block.register_forward_pre_hook(_hand_over, with_kwargs=True)
    return trained


CHANNELS = 1 << 20
"""More input channels than any layer has: updates that have the same input drop different parts of it."""


def _hand_over(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the updates of a decoder layer know what is dropped; again when its activations are recomputed."""
    noise = next((value for value in (*args, *kwargs.values()) if isinstance(value, LayerNoise)), SILENT)
    for number, layer in enumerate(updates(block).values()):
        layer.dropped, layer.first_channel = noise.adapter, number * CHANNELS + layer.first_input


def linears(model: Llama) -> dict[str, Linear]:
    """Return the linear layers of a model that has no adapter yet, by name."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    if found:
        raise LlameroError(f"the model has an adapter already (`{next(iter(found))}`)", fix="merge or detach it first")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def updates(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that have an update, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def _targets(model: Llama, config: AdapterConfig) -> tuple[str, ...]:
    """Return the ends of names that a config means, each of at least one layer that can be updated."""
    names = [name for name in linears(model) if name != HEAD]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if config.targets == "all-linear":
        return tuple(leaves)
    for target in config.targets:
        if target == HEAD:  # the loss takes its weight and never applies it
            raise LlameroError(
                "`lm_head` is trained whole or not at all", where="adapter.targets", fix="name it in `modules_to_save`"
            )
        if not any(peft.matches(name, (target,)) for name in names):
            raise LlameroError(
                f"no linear layer is called `{target}`",
                where="adapter.targets",
                fix=did_you_mean(target, [*leaves, "all-linear"]),
            )
    return config.targets


def _refuse_rank(model: Llama, rank: int, targets: tuple[str, ...]) -> None:
    for name, layer in linears(model).items():
        smaller = min(layer.in_features, layer.out_features)
        if peft.matches(name, targets) and rank > smaller:
            shape = f"{layer.in_features} inputs, {layer.out_features} outputs"
            raise LlameroError(
                f"rank {rank} is larger than `{name}` ({shape})",
                where="adapter.lora",
                fix=f"at most {smaller}, or other targets",
            )


def _whole(model: Llama, saved: tuple[str, ...]) -> list[str]:
    """Return the names of the modules that are trained whole, tied ones both."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if dict(module.named_parameters(recurse=False)) and not isinstance(module, PackedLinear)
    }
    for end in saved:
        if not any(peft.matches(name, (end,)) for name in modules):
            leaves = sorted({name.rpartition(".")[2] for name in modules})
            raise LlameroError(
                f"no module is called `{end}`", where="adapter.modules_to_save", fix=did_you_mean(end, leaves)
            )
    found = [name for name in modules if peft.matches(name, saved)]
    if model.config.tie_word_embeddings and {EMBEDDING, HEAD} & set(found):
        found = list(dict.fromkeys([*found, EMBEDDING, HEAD]))
    return found


def wrap(model: Llama, said: peft.Adapter, whole: list[str]) -> list[nn.Parameter]:
    """Freeze a model, but for updates of the layers that a description covers and for modules that are whole."""
    layers = {name: layer for name, layer in linears(model).items() if said.covers(name)}
    both = next((name for name in layers if name in whole), None)
    if both is not None:
        raise LlameroError(f"`{both}` has an update and is trained whole: one of them", where="adapter")
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, LoraLinear(layer, rank=said.rank, scale=said.scale).train(layer.training))
    for name in whole:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(True)
    return trainable(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained: those of the adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def detach(model: Llama) -> None:
    """Take an adapter off: the base is as it was, bit by bit.

    Raises:
        LlameroError: Modules were trained whole, so the base's own are gone.
    """
    replaced = [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(peft.FACTORS)]
    if replaced:
        raise LlameroError(f"`{replaced[0]}` was trained whole, its old values are gone", fix="load the base again")
    for name, layer in updates(model).items():
        model.set_submodule(name, layer.base)
    _thaw(model)


def _thaw(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


@torch.no_grad()
def merge(model: Llama, *, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Add every update to its weight, in float32 and rounded once, so that the model is a plain one.

    Args:
        model: Changed in place.
        dtype: Dtype of the whole model afterwards; a packed base is dequantized. `None` keeps the base's.

    Returns:
        What rounding took from each update, as a share of its norm; 0 in float32.

    Raises:
        LlameroError: The base is packed and no dtype is given.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    if packed and dtype is None:
        raise LlameroError(
            f"a weight that rests as codes cannot take an update (`{packed[0].removesuffix('.base')}`)",
            fix="dequantize: merge(model, dtype=torch.bfloat16); quantize the result again if need be",
        )
    lost: dict[str, float] = {}
    for name, layer in updates(model).items():
        merged, lost[name] = _merged(layer, dtype)
        if name == HEAD and model.config.tie_word_embeddings:
            model.config = replace(model.config, tie_word_embeddings=False)
        model.set_submodule(name, merged)
    if dtype is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.dense(dtype))
        model.to(dtype)
        model.tie()
    _thaw(model)
    return lost


def _merged(layer: LoraLinear, dtype: torch.dtype | None) -> tuple[nn.Linear, float]:
    base, a, b = layer.base, layer.lora_A.weight, layer.lora_B.weight
    plain = base.dense(a.dtype) if isinstance(base, PackedLinear) else base
    bias = dict(plain.named_parameters()).get("bias")
    dtype = dtype or plain.weight.dtype
    exact = updated(plain.weight, a, b, layer.scale)
    merged = linear(base.in_features, base.out_features, bias=bias is not None)
    merged.weight = nn.Parameter(exact.to(dtype))
    if bias is not None:
        merged.bias = nn.Parameter(bias.to(dtype))
    rounding = merged.weight.to(exact.dtype) - exact
    return merged.train(layer.training), float(rounding.norm() / layer.update().norm().clamp(min=1e-30))
