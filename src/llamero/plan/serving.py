"""What a release needs to run: bytes of its weights in each form, of keys and values, and how many devices hold them.

Weights are those of the model on the meta device, in the layout of the files (`checkpoint.packed`). Which layers are
packed is as in published files: the linear ones of the decoder layers; embedding, head and norms stay in 16 bits.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import torch
from torch import nn

from llamero.core.errors import LlameroError
from llamero.core.hardware import ACCELERATORS, Accelerator
from llamero.infer.kv import PAGE
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.plan.memory import RUNTIME, Memory
from llamero.quantize import gguf_sizes, variants

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

USABLE = 0.9
"""Share of a device's memory that is given to a model, as serving engines do; the rest is for what is not foreseen."""

PREFILL = 2048
"""Tokens of prompts that go through the model at a time."""


def weights(config: LlamaConfig, form: str, *, sym: bool = True) -> int:
    """Return the bytes of a model's tensors in a form.

    Args:
        config: The model.
        form: `float16`, `bfloat16`, `float32`, or the name of a variant, such as `gptq-4bit-128g-actorder_True`,
            `awq-4bit-128g` or `gguf-Q4_K_M`.
        sym: Whether the grids of a variant are symmetric where its name does not say it.

    Raises:
        LlameroError: If the form is unknown, or does not divide a layer.
    """
    variant = None if form in PLAIN else variants.parse(form, sym=sym)
    if variant is not None and variant.layout == "gguf":
        return sum(spec.nbytes for spec in gguf_sizes.specs(config, variant.mix).values())
    with torch.device("meta"):
        model = Llama(replace(config, num_layers=1))  # every layer is like the first
    (block,) = model.model.layers
    size = PLAIN.get(form, torch.float16).itemsize
    ends = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in block.parameters())
    of_block = 0
    for name, module in block.named_modules():
        if variant is not None and isinstance(module, nn.Linear):
            _refuse_odd_groups(name, module.in_features, variant.group_size)
            parts = variant.format.specs(module.in_features, module.out_features)
            of_block += sum(spec.nbytes for spec in parts.values())
        else:
            of_block += size * sum(p.numel() for p in module.parameters(recurse=False))
    return size * ends + config.num_layers * of_block


def _refuse_odd_groups(name: str, inputs: int, group: int) -> None:
    if group != -1 and inputs % group:
        problem = f"groups of {group} do not divide the {inputs} inputs of `layers.{name}`"
        raise LlameroError(problem, fix="choose another variant")


def serving(
    config: LlamaConfig, form: str, *, context: int, sequences: int = 1, devices: int = 1, sym: bool = True
) -> Memory:
    """Return what each of some devices needs that share a model by tensor parallelism.

    Args:
        config: The model.
        form: Of its weights: see `weights`.
        context: Tokens of a sequence.
        sequences: How many at a time.
        devices: That share it.
        sym: As of `weights`.
    """
    size = PLAIN.get(form, torch.float16).itemsize
    pages = sequences * ceil(context / PAGE)
    kv = pages * PAGE * 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
    passing = min(PREFILL, context * sequences) * (2 * config.intermediate_size + 4 * config.hidden_size) * size
    logits = sequences * config.vocab_size * torch.float32.itemsize
    shared = min(devices, config.num_kv_heads)  # with more devices, some have the same heads
    return Memory(
        weights=ceil(weights(config, form, sym=sym) / devices),
        kv=ceil(kv / shared),
        logits=logits,
        other=ceil(passing / devices),
        runtime=RUNTIME,
    )


def least(
    config: LlamaConfig,
    form: str,
    *,
    context: int,
    sequences: int = 1,
    sym: bool = True,
    on: Iterable[Accelerator] = tuple(ACCELERATORS.values()),
) -> dict[str, int | None]:
    """Return the least number of devices of each kind that hold a model, by the kind's name.

    Args:
        config: The model.
        form: Of its weights: see `weights`.
        context: Tokens of a sequence.
        sequences: How many at a time.
        sym: As of `weights`.
        on: Kinds of devices.

    Returns:
        Numbers that divide the heads, up to 64; nothing where none is enough.
    """
    fitting = [number for number in range(1, min(64, config.num_heads) + 1) if config.num_heads % number == 0]
    needs = {
        number: serving(config, form, context=context, sequences=sequences, devices=number, sym=sym).total
        for number in fitting
    }
    return {
        kind.name: next((n for n, need in needs.items() if need <= USABLE * kind.memory_gib * 2**30), None)
        for kind in on
    }
