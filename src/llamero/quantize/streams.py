"""Which activations each variant is solved from: those of the unquantized model, or of a quantized one."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llamero.quantize.calibrate import UNQUANTIZED
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.variants import Variant, parse

_WIDTHS = range(2, 9)
"""Widths of which there is a variant to lead a stream; others follow the unquantized model."""


@dataclass(frozen=True)
class Stream:
    """Activations that some variants are solved from."""

    name: str
    variants: tuple[Variant, ...]
    leader: Variant | None
    """The variant through whose weights they flow; it need not be one of those. `None`: through the unquantized."""


def plan(config: QuantizeConfig, variants: Sequence[Variant], layers: Collection[tuple[int, int]]) -> list[Stream]:
    """Return the streams of a config, in a fixed order; which they are does not depend on what else is made.

    Args:
        config: Says how activations propagate.
        variants: What is made.
        layers: Inputs and outputs of the quantized layers.
    """
    mode = config.calibration.propagation
    if mode == "shared":
        return [Stream(UNQUANTIZED, tuple(variants), None)]
    if mode == "exact":
        return [Stream(variant.name, (variant,), variant) for variant in variants]
    if mode == "reference":
        named = config.calibration.reference
        leader = _leader(4, layers) if named is None else parse(named, sym=config.sym)
        return [Stream("reference", tuple(variants), leader)]
    streams = []
    for bits in dict.fromkeys(variant.bits if variant.bits in _WIDTHS else 0 for variant in variants):
        mine = tuple(v for v in variants if v.bits == bits or (not bits and v.bits not in _WIDTHS))
        name, leader = (f"{bits} bits", _leader(bits, layers)) if bits else (UNQUANTIZED, None)
        streams.append(Stream(name, mine, leader))
    return streams


def _leader(bits: int, layers: Collection[tuple[int, int]]) -> Variant:
    """Return what stands for all variants of a width: symmetric GPTQ in groups of 128 where those divide all layers."""
    group = -1 if any(inputs % 128 for inputs, _ in layers) else 128
    return parse(f"gptq-{bits}bit-{group}g-actorder_static-ct", sym=True)


def ask_what_is_felt(config: QuantizeConfig, planned: Iterable[Stream]) -> bool:
    """Return whether how the loss feels outputs is measured.

    A variant that leads a stream asks as those do that are made: its weights do not depend on what else is made.
    """
    solved = (variant for stream in planned for variant in (*stream.variants, stream.leader) if variant is not None)
    return config.sensitivity > 0 and any(variant.method == "gptq" for variant in solved)
