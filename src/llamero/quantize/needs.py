"""How much memory and disk a calibration takes, from the shape of a model alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from llamero.model.config import LlamaConfig
from llamero.quantize import kept
from llamero.quantize.calibrate import GROUP_TOKENS

_PROGRAM = 500_000_000
"""Bytes of Python, torch and what they load."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a calibration takes at its height, about."""

    memory: int
    """Of the process, one stream of activations and one variant at a time."""
    file: int
    """Of activations that wait on disk while it lasts, before and after a layer, so that a killed run goes on."""
    kept: int
    """Of statistics on disk where they are kept."""


def needs(config: LlamaConfig, lengths: Sequence[int], *, itemsize: int = 2, solve: bool = True) -> Needs:
    """Return what a calibration takes.

    Two heights are compared. While text goes through a layer, there are the layer, the sums (half of each second
    moment in float64, as large as the whole in float32) and, at their end, the largest moment once more. While a layer
    is solved, there are the layer and its weights in float32, the moments, their factors, and the largest weight
    three more times.

    Args:
        config: Shape of the model.
        lengths: Tokens of each sequence.
        itemsize: Bytes of a number in the forward pass.
        solve: Whether GPTQ solves the layers; otherwise text only goes through them.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    values = config.num_kv_heads * config.head_dim
    weights = 2 * hidden * heads + 2 * hidden * values + 3 * hidden * inner
    moments = [4 * width**2 for width in (hidden, heads, hidden, inner)]
    activations = sum(lengths) * hidden * itemsize
    group = min(sum(lengths), GROUP_TOKENS + max(lengths))
    passing = group * (3 * hidden + 3 * inner) * itemsize + 3 * 4 * group * inner
    through = max(weights * itemsize + passing, 4 * weights, max(moments)) + sum(moments)
    solving = 8 * weights + 2 * sum(moments) + 3 * 4 * hidden * inner if solve else 0
    return Needs(_PROGRAM + max(through, solving), 2 * activations, kept.bytes_of(config))
