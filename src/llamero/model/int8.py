"""Int8 as in LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): each row over the largest of its values, times 127.

Of the weights only: inputs stay as they are, so that no outliers among them need a way of their own.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

STEP = 1 / 127


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight matrix in int8."""

    values: Int8[Tensor, "out d"]
    scale: Float[Tensor, " out"]
    """Largest value of each row, float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, d)."""
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, stop: int) -> "Codes":
        """Return some of the output channels."""
        return Codes(self.values[start:stop], self.scale[start:stop])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
        """Return the weights that are meant, in the order of operations of bitsandbytes."""
        return self.values.to(dtype) * self.scale.to(dtype)[:, None] * STEP

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers, by name."""
        return {"values": self.values, "scale": self.scale}


def encode(weight: Float[Tensor, "out d"]) -> Codes:
    """Return the nearest codes; rows of zeros get zeros."""
    scale = weight.float().abs().amax(1)
    codes = torch.round(weight.float() * (127 / scale.clamp(min=torch.finfo(torch.float32).tiny))[:, None])
    return Codes(codes.to(torch.int8), scale)
