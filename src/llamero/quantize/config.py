"""What to quantize a model to, and on which text to look at it first."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llamero.core.config import Strict
from llamero.core.errors import LlameroError
from llamero.quantize import variants


class Calibration(Strict):
    """The text that shows which inputs each layer sees."""

    mixture: str | None = None
    """Mixture of the recipe to draw from; the text that the model was tuned on is the best there is."""
    text: Path | None = None
    """A file of text to use instead of a mixture."""
    sequence: int = Field(default=512, gt=1)
    """Tokens of a sequence; longer ones cost time and memory, and should not exceed the model's context."""
    tokens: int = Field(default=65_536, gt=0)
    """Tokens in all; fewer than a layer has inputs leave GPTQ guessing."""

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if (self.mixture is None) == (self.text is None):
            raise ValueError("give either `mixture` or `text`")
        if self.tokens < self.sequence:
            raise ValueError(f"{self.tokens} tokens are less than one sequence of {self.sequence}")
        return self


class QuantizeConfig(Strict):
    """Variants of one model, all from one look at the calibration text."""

    variants: tuple[str, ...] = Field(default_factory=variants.default_set, min_length=1)
    """Names such as `gptq-4bit-128g-actorder_True`: method, bits, group size (-1: whole row), order of activation.
    Without it the default set: the published table, and beside each that vLLM refuses one that it takes; of these, what
    does not divide the model's layers is left out."""
    calibration: Calibration
    """The text to look at."""
    damp: float = Field(default=0.01, gt=0, lt=1)
    """Added to the diagonal of the second moments, as a fraction of its mean; raised, and reported, if too little."""
    refine: int = Field(default=0, ge=0)
    """Sweeps in which GPTQ's codes and scales are fitted to each other once more; 1 or 2 help at 2 and 3 bits, and each
    costs about as much as GPTQ itself."""
    sym: bool = True
    """Zero in the middle of every grid. Asymmetric grids are a little better and are read by fewer programs."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Dtype of what is not quantized: embeddings, norms, head."""

    @field_validator("variants")
    @classmethod
    def _known_and_different(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                variants.parse(name)
            except LlameroError as error:
                raise ValueError(f"{error.problem}; {error.fix}") from error
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"`{repeated[0]}` is listed twice")
        return names

    def parsed(self) -> tuple[variants.Variant, ...]:
        """Return the variants."""
        return tuple(variants.parse(name, sym=self.sym) for name in self.variants)
