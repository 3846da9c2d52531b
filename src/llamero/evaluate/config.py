"""What a recipe says of its evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict


class _Task(Strict):
    models: list[str] = ["base", "final", "variants"]
    """Which models: `base`, `final`, `variants` (all quantized ones), a training stage, or one variant."""


class H4Task(_Task):
    """The Open LLM Leaderboard of 2023 and its parts."""

    tasks: Literal["h4", "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc"]
    """`h4` is all four and their mean."""
    data: str
    """Directory with the benchmark files, relative to the recipe (layout in docs/evaluate.md)."""
    compat: Literal["leaderboard-2023"] = "leaderboard-2023"
    """Whose prompts, few-shot draws and averages."""
    limit: int | None = Field(default=None, gt=0)
    """Questions of each task (for MMLU of each subject), after its shuffle."""
    subjects: int | None = Field(default=None, gt=0)
    """MMLU subjects to take, the first ones by name; all by default."""
    truthfulqa: Literal["2021", "later"] = "2021"
    """Edition of TruthfulQA; the published scores used that of 2021."""


class ToyWorldTask(_Task):
    """Held-out questions of the toy world, four options each."""

    tasks: Literal["toy_world"]
    """Name of the task."""
    seed: int = 1
    """Which world."""
    per_category: int = Field(default=200, gt=0)
    """Questions of each category."""


class PerplexityTask(_Task):
    """Perplexity of texts by the strided window, and agreement with the unquantized model."""

    tasks: Literal["perplexity"]
    """Name of the task."""
    texts: dict[str, str] = {}
    """Text files by the name that reports use, relative to the recipe."""
    validation: list[str] = []
    """Mixtures of the recipe; their validation documents are measured, each by itself."""
    window: int = Field(default=512, ge=2)
    """Tokens of a window over a text."""
    stride: int = Field(default=256, ge=1)
    """Tokens between windows; the rest of a window is context."""
    tokens: int | None = Field(default=None, gt=1)
    """Tokens of each text to use, from its start; all by default."""

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.texts and not self.validation:
            raise ValueError("give `texts` or `validation`")
        return self


class SamplesTask(_Task):
    """What the model says to a few prompts, greedily: read it before you believe a score."""

    tasks: Literal["samples"]
    """Name of the task."""
    prompts: list[str] = Field(min_length=1)
    """What the user says, one conversation each."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest answer."""
    models: list[str] = ["final"]
    """Which models."""


EvaluateConfig = Annotated[H4Task | ToyWorldTask | PerplexityTask | SamplesTask, Field(discriminator="tasks")]
"""Every task there is. To add one: a class here, a function in run.TASKS, a test."""
