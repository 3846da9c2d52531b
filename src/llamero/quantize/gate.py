"""What is measured of every variant, and which variants are good enough to be published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict

MAX_KL = 0.5
"""Nats per token; what is further away says other things than the model it was made from."""
DEFAULT_TEXTS = 2
"""How many texts are read where a recipe names none."""
WINDOW = 512


class Measure(Strict):
    """The texts on which variants are measured beside the original."""

    texts: dict[str, str] = {}
    """Texts by the name that reports use (name the split: `WikiText-2 test`): files relative to the recipe, or
    published data sets with their split (`wikitext-2-raw-v1:test`). None of them may have been calibrated on."""
    validation: list[str] = []
    """Mixtures of the recipe whose validation documents are read. Where neither texts nor mixtures are named: two of
    the texts whose perplexity is evaluated and the mixtures that are trained on, the last one first."""
    tokens: int = Field(default=16_384, gt=1)
    """Tokens of each text, from its start."""
    window: int | None = Field(default=None, ge=2)
    """Tokens of a window over a text; 512 by default, or the model's context where that is shorter."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between windows, the rest of a window is context; half a window by default."""

    @model_validator(mode="after")
    def _strides_are_no_gaps(self) -> Self:
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(f"a stride of {self.stride} leaves gaps between windows of {self.window}")
        return self

    def sight(self, context: int) -> tuple[int, int]:
        """Return window and stride for a model with some context."""
        window = self.window or min(WINDOW, context)
        return window, self.stride or max(1, window // 2)


@dataclass(frozen=True)
class Reading:
    """What one text says about one model."""

    text: str
    protocol: str
    tokens: int
    """Positions that count."""
    broken: int
    """Positions at which the logits are not all numbers; they count nowhere else."""
    perplexity: float | None
    """`None` where no position counts, or where it is beyond any number."""
    kl: float | None = None
    """KL(original ‖ this) in nats per token; `None` of the original."""
    top1: float | None = None
    """Share of positions at which both find the same token likeliest."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model."""

    name: str
    readings: tuple[Reading, ...] = ()
    problem: str | None = None
    """Why nothing could be measured."""
    seconds: float = field(default=0.0, compare=False)
    """Of measuring; differs from run to run."""

    @property
    def kl(self) -> float | None:
        """Return the largest KL of all texts; `None` where there is none that counts."""
        found = [reading.kl for reading in self.readings if reading.kl is not None]
        return max(found, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return what the stages after this one need, the same for every run."""
        return {"name": self.name, "problem": self.problem, "texts": [asdict(reading) for reading in self.readings]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        """Return what `to_json` made."""
        return cls(value["name"], tuple(Reading(**reading) for reading in value["texts"]), value["problem"])


@dataclass(frozen=True)
class Verdict:
    """Whether a variant is published."""

    published: bool
    reason: str | None
    """What is wrong with it, whether it is published all the same or not."""


def judge(measured: Measured | None, *, max_kl: float, anyway: Sequence[str] = ()) -> Verdict:
    """Return whether a variant is good enough.

    Args:
        measured: What was measured of it; `None` if it was not asked for.
        max_kl: Largest KL on any text, nats per token.
        anyway: Variants that are published whatever was measured.
    """
    if measured is None:
        return Verdict(published=True, reason=None)
    reason = _reason(measured, max_kl)
    return Verdict(reason is None or measured.name in anyway, reason)


def _reason(measured: Measured, max_kl: float) -> str | None:
    if measured.problem is not None:
        return f"it could not be measured: {measured.problem}"
    for reading in measured.readings:
        if reading.broken:
            return (
                f"NaN or infinity among its logits at {reading.broken:,} of {reading.broken + reading.tokens:,} "
                f"positions of {reading.text}"
            )
    worst = max(measured.readings, key=lambda reading: reading.kl if reading.kl is not None else float("inf"))
    if worst.kl is None:
        return f"it has no KL on {worst.text}"
    return f"KL {worst.kl:.3g} on {worst.text}, more than {max_kl:g}" if worst.kl > max_kl else None
