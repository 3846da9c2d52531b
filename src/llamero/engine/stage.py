"""The description of one training stage, as it stands in a recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict

Overlong = Literal["error", "drop", "truncate", "split"]


class Learn(Strict):
    """How much a token counts in the loss, by who says it; 0 leaves it out."""

    assistant: float = Field(default=1.0, ge=0)
    """What assistants say, the end of their turn included."""
    text: float = Field(default=1.0, ge=0)
    """Plain documents, in a mixture that has some beside chats."""
    user: float = Field(default=0.0, ge=0)
    """What users say."""
    system: float = Field(default=0.0, ge=0)
    """System messages."""
    context: float = Field(default=0.0, ge=0)
    """Context given beside a question."""


class StageConfig(Strict):
    """One stage of training; a release has as many as it needs, each starting where the last ended."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the stage and of its model."""
    mixture: str
    """Mixture of the recipe's `data.mixtures` to learn from."""
    objective: Literal["sft", "lm"] = "sft"
    """`sft` learns what `learn` says (by default what assistants say); `lm` learns every token."""
    learn: Learn = Learn()
    """Weights of the loss by speaker, for `sft`."""
    init_from: str | None = None
    """Stage to start from; the one before by default, the base for the first."""

    sequence: int = Field(default=4096, ge=8)
    """Tokens of a packed row."""
    overlong: Overlong | None = None
    """What happens to a sample longer than `sequence`: `error` (the default for sft), `drop`, `truncate`,
    or `split` (the default for lm: every token of a text stays a target; chats are cut before a user's turn, and a
    turn that is longer by itself loses its end). All of it is counted."""
    batch: int = Field(default=64, gt=0)
    """Packed rows of a step, over all devices and accumulation steps."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the mixture; or give `steps`."""

    lr: float = Field(default=1e-5, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear rise from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from `lr` to `min_lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are left out."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""

    eval_every: int = Field(default=0, ge=0)
    """Steps between validations on the mixture's validation split; 0 validates at the end only."""
    save_every: int = Field(default=200, gt=0)
    """Steps between checkpoints to resume from."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the products; `auto` is float32 on CPU and bfloat16 on CUDA. Weights are float32."""
    export: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the exported weights."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"`min_lr` {self.min_lr} is above `lr` {self.lr}")
        if self.steps is not None and self.warmup > self.steps:
            raise ValueError(f"`warmup` {self.warmup} is longer than `steps` {self.steps}")
        return self

    @property
    def policy(self) -> Overlong:
        """Return what happens to over-long samples."""
        return self.overlong or ("split" if self.objective == "lm" else "error")

    def decides(self) -> dict[str, object]:
        """Return what decides the trained weights: everything but how often we look and save."""
        return self.model_dump(mode="json", exclude={"name", "eval_every", "save_every"})
