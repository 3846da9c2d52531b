"""What of a model rests as the blocks of a GGUF file: linear layers decoded when they are used, a table row by row."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from llamero.core.gguf import TYPES
from llamero.model import kquants
from llamero.model.linear import PackedLinear

BLOCKS = "blocks"
"""Name of the bytes, in a module and among the tensors that it is filled from."""

AT_ONCE = {"cpu": 1 << 19}
"""Weights that are decoded together: on a CPU what stays in its cache, which is two to seven times as fast as a whole
layer of a 7B at a time (`benchmarks/kquant_linear.py`)."""
_AT_ONCE_ELSEWHERE = 1 << 24
"""Of a head over 128,256 tokens all weights would be two gigabytes."""


def _empty(rows: int, width: int, kind: str) -> UInt8[Tensor, "rows bytes"]:
    return torch.empty(rows, TYPES[kind].row_bytes(width), dtype=torch.uint8)


def _split(blocks: UInt8[Tensor, "rows bytes"], width: int) -> tuple[Tensor, ...]:
    return blocks.split(max(1, AT_ONCE.get(blocks.device.type, _AT_ONCE_ELSEWHERE) // width))


class KQuantLinear(PackedLinear):
    """A linear layer that rests as blocks of a GGUF file.

    Args:
        inputs: Input channels, a multiple of the type's block.
        outputs: Output channels.
        kind: A name of `kquants.KINDS`.
        bias: Whether there is one.
    """

    names = (BLOCKS,)
    blocks: UInt8[Tensor, "out bytes"]

    def __init__(self, inputs: int, outputs: int, *, kind: str, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.kind = kind
        self.register_buffer(BLOCKS, _empty(outputs, inputs, kind))

    def extra_repr(self) -> str:
        """Return what a printed model says of it."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight that the blocks of a layer like this one stand for; decoded in float32, rounded once."""
        blocks = codes[BLOCKS]
        weight = torch.empty(len(blocks), self.in_features, dtype=dtype, device=blocks.device)
        pieces = _split(blocks, self.in_features)
        for place, rows in zip(weight.split(len(pieces[0])), pieces, strict=True):
            place.copy_(kquants.decode(rows, self.kind))
        return weight

    def cuts(self, of: int, *, outputs: bool) -> bool:
        """Return whether the blocks can be cut into so many equal shares of outputs, or of inputs: at whole blocks."""
        if outputs:
            return self.out_features % of == 0
        return self.in_features % (of * TYPES[self.kind].block) == 0

    def _cut(self, codes: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        return {BLOCKS: codes[BLOCKS].chunk(of, dim=0 if outputs else 1)[share].contiguous()}

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Apply the layer in the dtype of its input; without a gradient no more than a part is ever decoded."""
        if torch.is_grad_enabled():
            return super().forward(x)
        pieces = _split(self.blocks, self.in_features)
        out = torch.cat([F.linear(x, kquants.decode(rows, self.kind).to(x.dtype)) for rows in pieces], dim=-1)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class KQuantEmbedding(nn.Module):
    """A table of embeddings that rests as blocks of a GGUF file; only the rows that are looked up are decoded.

    Args:
        rows: Tokens.
        width: Channels, a multiple of the type's block.
        kind: A name of `kquants.KINDS`.
        dtype: Of what is looked up.
    """

    blocks: UInt8[Tensor, "rows bytes"]

    def __init__(self, rows: int, width: int, *, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.kind, self.dtype = kind, dtype
        self.register_buffer(BLOCKS, _empty(rows, width, kind))

    def extra_repr(self) -> str:
        """Return what a printed model says of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind}"

    def forward(self, ids: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d"]:
        """Return the rows of some tokens."""
        rows = kquants.decode(self.blocks[ids.flatten()], self.kind)
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)


def make_room(model: nn.Module, kinds: Mapping[str, str], *, dtype: torch.dtype) -> None:
    """Replace the layers and the table whose weights are blocks, on the meta device.

    Args:
        model: Without storage.
        kinds: Type of each such module, by its name.
        dtype: Of the embeddings that are looked up.
    """
    with torch.device("meta"):
        for name, kind in kinds.items():
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                table = KQuantEmbedding(module.num_embeddings, module.embedding_dim, kind=kind, dtype=dtype)
                model.set_submodule(name, table)
            else:
                assert isinstance(module, nn.Linear)
                bias = "bias" in dict(module.named_parameters())
                layer = KQuantLinear(module.in_features, module.out_features, kind=kind, bias=bias)
                model.set_submodule(name, layer)
