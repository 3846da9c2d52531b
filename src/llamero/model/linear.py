"""Linear layers."""

from torch import nn


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Return a plain linear layer without drawing random weights: they are loaded, or drawn by `initialize`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    assert isinstance(layer, nn.Linear)
    return layer
