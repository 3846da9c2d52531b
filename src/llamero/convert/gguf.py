"""Llamas in GGUF, read: blocks are decoded, rows of queries and keys return to Hugging Face's order."""

from pathlib import Path

import torch
from torch import Tensor

from llamero.checkpoint.hf import Spec, Tensors
from llamero.convert.config import ConvertConfig
from llamero.convert.model import Model, shapes
from llamero.model import kquants
from llamero.model.gguf_files import GgufModel, open_model
from llamero.model.kquant_linear import BLOCKS


def open_gguf_model(path: Path, options: ConvertConfig) -> Model:
    """Return the model of a GGUF file, all in one precision: that of its embeddings, or float32 if it has blocks."""
    found = open_model(path)
    dtype = torch.float32 if found.kinds else found.dtype
    sources = {name: _source(found, name) for name in shapes(found.config)}

    def read(_: Path, name: str) -> Tensor:
        tensor = found.tensors[sources[name]]
        kind = found.kinds.get(name.removesuffix(".weight"))
        return (tensor if kind is None else kquants.decode(tensor, kind)).to(dtype)

    specs = {name: Spec(shape, dtype) for name, shape in shapes(found.config).items()}
    files = {name: found.tensors.files[source] for name, source in sources.items()}
    return Model(found.config, Tensors(path.parent, files, specs, read), _notes(found, options, dtype))


def _source(found: GgufModel, name: str) -> str:
    module = name.removesuffix(".weight")
    return f"{module}.{BLOCKS}" if module in found.kinds else name


def _notes(found: GgufModel, options: ConvertConfig, dtype: torch.dtype) -> tuple[str, ...]:
    """Return what the user should know: what was quantized, and what is rounded."""
    notes: list[str] = []
    if found.kinds:
        counts = {kind: list(found.kinds.values()).count(kind) for kind in sorted(set(found.kinds.values()))}
        said = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
        notes.append(f"dequantized: {said}")
        if options.dtype is None:
            notes.append("written in float32, which loses nothing of them; --dtype bfloat16 takes half the room")
    wider = [name for name, spec in found.tensors.specs.items() if spec.dtype.is_floating_point and spec.dtype != dtype]
    if wider and dtype != torch.float32:
        notes.append(f"{len(wider)} tensors of another precision are rounded to {str(dtype).removeprefix('torch.')}")
    return tuple(notes)
