"""Tensors of bitsandbytes files under the names of the layers that hold them: `Int8Linear`, `Nf4Linear`."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llamero.checkpoint import bitsandbytes, hf
from llamero.checkpoint.bitsandbytes import STATE, Format
from llamero.core.errors import LlameroError
from llamero.model import nf4

_INT8 = {"values": "weight", "scale": "SCB"}
_NF4 = {"packed": "weight", "absmax": "weight.absmax"}
_BOOKS = {"weight.quant_map": nf4.CODE_BOOK, "weight.nested_quant_map": nf4.DYNAMIC_MAP}


def under_our_names(tensors: hf.Tensors, layout: Format, shapes: dict[str, tuple[int, int]]) -> hf.Tensors:
    """Return the tensors with those of packed layers as our layers name them; what they must be is checked.

    Args:
        tensors: Of the directory.
        layout: How its layers are packed.
        shapes: (out, d) of every linear layer of the model.

    Raises:
        LlameroError: If a layer is packed in another way than the config says.
    """
    found = [name for name in shapes if f"{name}.{layout.marker}" in tensors]
    if not found:
        raise LlameroError(
            f"the config says that weights are packed, and no tensor is (`….{layout.marker}`)", where=tensors.directory
        )
    sources = {name: name for name in tensors}
    made: dict[str, Tensor] = {}
    for name in found:
        _check(tensors, name, layout)
        theirs = dict(_INT8 if layout.kind == "int8" else _NF4)
        if layout.kind == "nf4" and layout.double:
            theirs["nested_absmax"] = "weight.nested_absmax"
            made[f"{name}.offset"] = _offset(tensors, name, shapes[name], layout)
        for leaf in (*layout.specs(64, 1), "weight_format"):
            sources.pop(f"{name}.{leaf}", None)
        sources |= {f"{name}.{ours}": f"{name}.{leaf}" for ours, leaf in theirs.items()}
        sources |= dict.fromkeys((n for n in made if n.startswith(f"{name}.")), f"{name}.{STATE}")

    def read(_: Path, name: str) -> Tensor:
        if name in made:
            return made[name]
        value = tensors[sources[name]]
        return value.flatten() if name.endswith(".packed") else value

    files = {name: tensors.files[source] for name, source in sources.items()}
    specs = {name: tensors.specs[source] for name, source in sources.items()}
    specs |= {name: hf.Spec((), torch.float32) for name in made}
    packed = [f"{name}.packed" for name in found if layout.kind == "nf4"]
    specs |= {name: hf.Spec((specs[name].shape[0],), torch.uint8) for name in packed}
    return replace(tensors, files=files, specs=specs, _read=read, _read_part=None)


def _offset(tensors: hf.Tensors, name: str, shape: tuple[int, int], layout: Format) -> Tensor:
    stored, where = f"{name}.{STATE}", str(tensors.files[f"{name}.{STATE}"])
    value = bitsandbytes.read_state(tensors[stored], shape=shape, double=layout.double, name=name, where=where)
    return torch.tensor(value)


def _check(tensors: hf.Tensors, name: str, layout: Format) -> None:
    """Refuse other tables of values than those of nf4, and int8 rows in the order of old GPU kernels."""
    for leaf, book in _BOOKS.items():
        stored = f"{name}.{leaf}"
        if layout.kind == "nf4" and stored in tensors and not torch.equal(tensors[stored].float().cpu(), book):
            raise LlameroError(f"`{stored}`: other values than those of nf4", where=tensors.files[stored])
    order = f"{name}.weight_format"
    if order in tensors and int(tensors[order]) != 0:
        raise LlameroError(
            f"`{order}` is {int(tensors[order])}: its rows are not in their order", where=tensors.files[order]
        )
