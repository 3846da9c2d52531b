"""Linear layers: plain, and with weights that rest as low-bit codes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llamero.checkpoint import gptq, packed


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Return a plain linear layer without drawing random weights: they are loaded, or drawn by `initialize`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    assert isinstance(layer, nn.Linear)
    return layer


class GptqLinear(nn.Module):
    """A linear layer that rests as GPTQ codes and is dequantized whenever it is used.

    Buffers have the names and shapes of GPTQ files. Scales stay in the dtype of the file: another one would
    change the weights.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        layout: How the codes are stored.
        bias: Whether there is one.
    """

    codes = "qweight"
    """Buffer by which a packed layer is recognised in files."""
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, *, layout: gptq.Format, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.layout = inputs, outputs, layout
        for name, spec in gptq.specs(inputs, outputs, bits=layout.bits, groups=layout.groups(inputs)).items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 (float64 if that is asked for) and rounded once."""
        work = torch.promote_types(dtype, torch.float32)
        group = self.g_idx.long()
        zeros = gptq.decode_zeros(self.qzeros, self.layout.bits, offset=self.layout.zero_offset)
        weight = gptq.unpack(self.qweight, self.layout.bits).to(work)  # (d, out)
        weight.sub_(zeros.to(work).index_select(0, group)).mul_(self.scales.to(work).index_select(0, group))
        return weight.to(dtype).T

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the plain layer that this one stands for."""
        layer = linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.dequantize(dtype).contiguous())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype))
        return layer

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Apply the layer in the dtype of its input."""
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def problem(self) -> str | None:
        """Return what is wrong with the loaded codes, if anything is."""
        groups, low, high = len(self.scales), int(self.g_idx.min()), int(self.g_idx.max())
        if low < 0 or high >= groups:
            return f"g_idx names groups {low} to {high}, there are {groups}"
        return None


LAYERS: dict[type[packed.Format], type[GptqLinear]] = {
    gptq.Format: GptqLinear,
}
"""The layer of every packed format. To add one: a class above, a line here, its parser in checkpoint/packed.py."""
