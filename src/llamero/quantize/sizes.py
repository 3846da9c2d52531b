"""How large the files of each variant become, from the shape of the model alone.

Two sizes: what our writer writes, to the byte, and what the tools wrote that made the published files of 2023, which
store a bias of zeros for each linear layer of a GPTQ model.
"""

from dataclasses import dataclass
from itertools import groupby

import torch

from llamero.checkpoint import hf
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.model.load import DTYPES, empty_model
from llamero.quantize import gguf_sizes
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.variants import Variant, fitting, refuse_misfits
from llamero.quantize.write import quantized_layers, tensor_specs, widths

AWQ_SHARD_BYTES = 10_000_000_000
"""Largest file of published AWQ models; published GPTQ models are one file."""


@dataclass(frozen=True)
class Size:
    """Bytes of a variant's weights, headers included; of a GGUF file the tokenizer comes on top."""

    variant: Variant
    ours: int
    as_published: int | None
    """`None` where there is no custom to compare with."""


def plan(shape: LlamaConfig, config: QuantizeConfig) -> tuple[list[Size], dict[str, str]]:
    """Return the size of each variant, and why some of the default ones cannot be made, by name.

    Args:
        shape: Of the unquantized model.
        config: The variants.

    Raises:
        LlameroError: If a variant that the config names cannot be made, or none can.
    """
    model = empty_model(shape)
    kept, left = fitting(config.parsed(), widths(model))
    if left and ("variants" in config.model_fields_set or not kept):
        refuse_misfits(config.parsed(), widths(model), where="variants")
    found = []
    for variant in kept:
        if variant.layout == "gguf":
            found.append(Size(variant, gguf_sizes.size(shape, variant.mix), None))
        else:
            found.append(size(model, variant, dtype=DTYPES[config.dtype]))
    return found, left


def size(model: Llama, variant: Variant, *, dtype: torch.dtype, shard_bytes: int = hf.SHARD_BYTES) -> Size:
    """Return the size of a variant.

    Args:
        model: The unquantized model, on the meta device.
        variant: What it becomes.
        dtype: Dtype of what is not quantized.
        shard_bytes: Largest file of ours.
    """
    specs = tensor_specs(model, variant, dtype)
    published = None
    if variant.layout == "gptq":
        published = sum(hf.file_bytes(_with_biases(model, specs), shard_bytes=_ONE_FILE))
    elif variant.layout == "awq":
        published = sum(hf.file_bytes(specs, shard_bytes=AWQ_SHARD_BYTES))
    return Size(variant, sum(hf.file_bytes(specs, shard_bytes=shard_bytes)), published)


_ONE_FILE = 2**63


def _with_biases(model: Llama, specs: dict[str, hf.Spec]) -> dict[str, hf.Spec]:
    """Return the tensors with a bias for each quantized layer, each layer's in the order of their names."""
    linears = quantized_layers(model)
    found: dict[str, hf.Spec] = {}
    for owner, group in groupby(specs.items(), key=lambda item: item[0].rpartition(".")[0]):
        mine = dict(group)
        if owner in linears:
            mine[f"{owner}.bias"] = hf.Spec((linears[owner].out_features,), torch.float16)
        found |= dict(sorted(mine.items()))
    return found
