"""How a model is converted."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict

Target = Literal["hf", "meta", "megatron"]
"""What can be written."""
KindName = Literal[Target, "gguf"]
"""What can be read; GGUF is written by `llamero quantize`."""


class ConvertConfig(Strict):
    """What the command line says."""

    to: Target
    """`hf`: a Hugging Face directory, `meta`: Meta's consolidated.*.pth, `megatron`: a Megatron release checkpoint."""
    tensor: int = Field(default=1, ge=1)
    """Tensor ranks of a Megatron checkpoint."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline ranks of a Megatron checkpoint."""
    shards: int = Field(default=1, ge=1)
    """Files of a Meta directory."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights; as in the source where it is not stated."""
    true_vocab: int | None = Field(default=None, ge=1)
    """Rows of the vocabulary that are real; the rest, padding, is cut off."""
    context: int | None = Field(default=None, ge=1)
    """Longest input in tokens, where the source does not say."""
    rope_factor: float | None = Field(default=None, gt=0)
    """Factor of `use_scaled_rope` in a Meta directory, which does not say it: 8 for Llama 3.1, 32 for Llama 3.2."""
    verify: bool = False
    """Compare the logits of both sides."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.to != "megatron" and (self.tensor, self.pipeline) != (1, 1):
            raise ValueError("`tensor` and `pipeline` are of Megatron checkpoints (`--to megatron`)")
        if self.to != "meta" and self.shards != 1:
            raise ValueError("`shards` are of Meta directories (`--to meta`)")
        return self
