"""What a recipe says of a model that starts from nothing. A training stage itself is described in engine/stage.py."""

from __future__ import annotations

from pydantic import Field

from llamero.core.config import Strict


class ShapeConfig(Strict):
    """Shape of a fresh Llama."""

    hidden: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Decoder layers."""
    heads: int = Field(gt=0)
    """Attention heads; they divide `hidden`."""
    kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads, as many as `heads` by default; they divide `heads`."""
    mlp: int = Field(gt=0)
    """Inner width of the MLP."""
    context: int = Field(gt=0)
    """Longest sequence, max_position_embeddings."""
    theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary wavelengths."""
    tied: bool = True
    """Whether the head is the embedding."""
