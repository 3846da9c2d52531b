"""How large the files of each variant become, from the shape of the model alone.

Two sizes: what our writer writes, to the byte, and what the tools wrote that made the published files of 2023, which
store a bias of zeros for each linear layer of a GPTQ model.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from llamero.checkpoint import hf
from llamero.checkpoint.gguf_write import sizes
from llamero.model.llama import Llama
from llamero.quantize import gguf, gguf_sizes
from llamero.quantize.gguf_metadata import metadata
from llamero.quantize.variants import Variant
from llamero.quantize.write import quantized_layers, tensor_specs

AWQ_SHARD_BYTES = 10_000_000_000
"""Largest file of published AWQ models; published GPTQ models are one file."""


@dataclass(frozen=True)
class Size:
    """Bytes of a variant's weights, headers included; of a GGUF file the tokenizer comes on top."""

    variant: Variant
    ours: int
    as_published: int | None
    """`None` where there is no custom to compare with."""
    without_tokenizer: bool = False
    """Whether the tokenizer, which GGUF files hold too, is not counted: its files were not at hand."""


def size(
    model: Llama, variant: Variant, *, dtype: torch.dtype, shard_bytes: int | None = None, source: Path | None = None
) -> Size:
    """Return the size of a variant.

    Args:
        model: The unquantized model, on the meta device.
        variant: What it becomes.
        dtype: Dtype of what is not quantized.
        shard_bytes: Largest file of ours; the writer's own by default.
        source: Directory of the model, or one with its tokenizer, where there is one.
    """
    if variant.layout == "gguf":
        return _gguf(model, variant, shard_bytes or gguf.SHARD_BYTES, source)
    shard_bytes = shard_bytes or hf.SHARD_BYTES
    specs = tensor_specs(model, variant, dtype)
    published = None
    if variant.layout == "gptq":
        published = sum(hf.file_bytes(_with_biases(model, specs), shard_bytes=_ONE_FILE))
    elif variant.layout == "awq":
        published = sum(hf.file_bytes(specs, shard_bytes=AWQ_SHARD_BYTES))
    return Size(variant, sum(hf.file_bytes(specs, shard_bytes=shard_bytes)), published)


_ONE_FILE = 2**63


def _gguf(model: Llama, variant: Variant, shard_bytes: int, source: Path | None) -> Size:
    specs = gguf_sizes.specs(model.config, variant.mix)
    at_hand = source is not None and any(source.glob("tokenizer*"))
    values = metadata(source, model.config, variant.mix).values if source is not None and at_hand else {}
    return Size(variant, sum(sizes(values, specs, shard_bytes)), None, without_tokenizer=not at_hand)


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
