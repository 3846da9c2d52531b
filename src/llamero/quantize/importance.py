"""Whose importances the GGUF variants of a run heed: those of the calibration text, or of a file of llama.cpp's."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llamero.checkpoint.imatrix import read_imatrix
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.quantize import gguf_mix, gguf_sizes
from llamero.quantize.statistics import Channels


def read_for(path: Path, config: LlamaConfig) -> Mapping[str, Tensor]:
    """Return the mean square of every input channel (d,), by the names of GGUF tensors.

    Args:
        path: File of llama.cpp's.
        config: Shape of the model that it must be of.

    Raises:
        LlameroError: It is of another model, or lacks a layer.
    """
    found = read_imatrix(path).mean_square
    specs = gguf_sizes.specs(config, "F16")
    widths = {name: specs[name].shape[-1] for name in gguf_mix.types(config, "F16")}
    for name, values in found.items():
        if name not in widths or len(values) != widths[name]:
            has = f"has {widths[name]}" if name in widths else "has no such tensor"
            raise LlameroError(
                f"an importance matrix of another model: `{name}` has {len(values)} channels, this model {has}",
                where=path,
                fix="make one of this model, or leave it out: the calibration text gives the same",
            )
    missing = [name for name in widths if name.startswith("blk.") and name not in found]
    if missing:
        raise LlameroError(f"lacks {len(missing)} layers of the model, such as `{missing[0]}`", where=path)
    return found


def of_head(given: Mapping[str, Tensor], seen: Channels | None) -> Tensor | None:
    """Return the mean square (d,) of what flows into the head, `None` if it is not known.

    Args:
        given: Importances of a file; empty without one.
        seen: What the calibration text showed.
    """
    if given:
        return given.get("output.weight")
    return None if seen is None else seen.energy / seen.tokens
