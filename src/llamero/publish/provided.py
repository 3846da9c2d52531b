"""The table of quantized files: what each is, how well it was measured, and what reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamero.checkpoint.loaders import accepting
from llamero.publish.markdown import NOTHING, size, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llamero.publish.measurements import Series
    from llamero.publish.release import Variant

_ORDERS = {"none": "No", "static": "Static", "desc": "Yes"}

FORMATS = {
    "gptq": "GPTQ",
    "gptq_v2": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "gguf": "GGUF",
    "bitsandbytes": "bitsandbytes",
}
"""What people call the files of each layout."""

INSTALLED = {
    "gptq": "transformers optimum gptqmodel",
    "gptq_v2": "transformers optimum gptqmodel",
    "awq": "transformers gptqmodel",
    "compressed-tensors": "transformers compressed-tensors",
    "bitsandbytes": "transformers bitsandbytes",
}
"""Packages with which Transformers loads a directory of each layout by its name."""


def formats(variants: Sequence[Variant]) -> list[str]:
    """Return what people call the files of some variants, each once."""
    return list(dict.fromkeys(FORMATS[variant.layout] for variant in variants))


def provided_files(
    variants: Sequence[Variant],
    measured: Sequence[Series],
    *,
    link: Callable[[Variant], str],
    original: tuple[str, str, str, int],
) -> str:
    """Return the table.

    Args:
        variants: The quantized models.
        measured: What the table prints beside them.
        link: Markdown of a branch.
        original: Label, name in results, dtype and size in bytes of the unquantized model.
    """
    columns = [(title, metric, part) for part in measured for title, metric in part.columns]
    header = ["Branch", "Bits", "GS", "Act Order", "Damp %", "Calibration", "Seq Len", "Size", "BPW"]
    label, name, dtype, num_bytes = original
    rows = [
        [
            *(link(v), *_how(v), size(v.size_bytes), f"{v.bits_per_weight:.2f}"),
            *(p.cell(v.name, m) for _, m, p in columns),
            ", ".join(accepting(v)),
        ]
        for v in variants
    ]
    first = [label, dtype, *[NOTHING] * 5, size(num_bytes), NOTHING, *(p.cell(name, m) for _, m, p in columns), NOTHING]
    return table([*header, *(title for title, _, _ in columns), "Loads in"], [first, *rows])


def _how(variant: Variant) -> list[str]:
    """Return bits, group size, order, damping, calibration text and sequence length."""
    group = "row" if variant.group_size == -1 else str(variant.group_size)
    if variant.layout == "gguf":
        group = NOTHING  # each type has groups of its own
    if not variant.calibrated:
        return [str(variant.bits), group, NOTHING, NOTHING, "none: rounded to nearest", NOTHING]
    damp = NOTHING if variant.damp is None else f"{variant.damp:g}"
    calibration = f"{variant.calibration['source']}, {variant.tokens:,} tokens"
    sequence = str(variant.calibration["sequence"])
    order = _ORDERS[variant.actorder] if variant.method == "gptq" else NOTHING
    return [str(variant.bits), group, order, damp, calibration, sequence]
