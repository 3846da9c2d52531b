"""What goes into a release, and what follows from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llamero.core.errors import LlameroError
from llamero.engine.stage import StageConfig
from llamero.publish.markdown import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.core.artifact import Artifact
    from llamero.core.results import Result

SCRATCH = "trained from scratch"
"""What stands for a base that did not exist."""
BASE = "base"
"""What results call the model that the user started from."""

_STAGE_PREFIX = "train-"


@dataclass(frozen=True)
class Variant:
    """A quantized model."""

    name: str
    method: Literal["gptq", "rtn", "awq", "gguf", "gguf-rtn", "bitsandbytes"]
    layout: Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "gguf", "bitsandbytes"]
    bits: int
    group_size: int
    """Input channels that share one grid; -1 is all of a row."""
    actorder: Literal["none", "static", "desc"]
    sym: bool
    damp: float | None
    size_bytes: int
    bits_per_weight: float
    """Of the quantized layers, scales included."""
    tokens: int
    """Calibration tokens that were used."""
    calibration: Mapping[str, Any]
    """`source` and `sequence` of the text that GPTQ looked at."""
    modules: Sequence[Mapping[str, Any]]
    """What became of each linear layer: `name`, `damp`, `dead_channels`."""
    notes: Sequence[str]
    """What was done otherwise than the name says, as its maker tells it."""

    @property
    def calibrated(self) -> bool:
        """Return whether the calibration text had a part in it."""
        return self.method not in ("rtn", "bitsandbytes")

    @property
    def departures(self) -> list[str]:
        """Return what did not go as asked for."""
        raised = [m["damp"] for m in self.modules if self.damp is not None and m["damp"] > self.damp]
        dead = [m["dead_channels"] for m in self.modules if m["dead_channels"]]
        found = [f"{plural(len(raised), 'layer')} needed more damping, up to {max(raised):g}"] if raised else []
        if dead:
            channels, layers = plural(sum(dead), "input channel"), plural(len(dead), "layer")
            found.append(f"{channels} of {layers} had only zeros as calibration input")
        return [*found, *self.notes]


@dataclass(frozen=True)
class Withheld:
    """A quantized model that was made and is not published."""

    name: str
    size_bytes: int
    reason: str
    kl: Mapping[str, float]
    """Nats per token, by the text that it was measured on."""


@dataclass(frozen=True)
class Gate:
    """Which quantized models are good enough."""

    max_kl: float
    """Largest KL on any text, nats per token."""
    withheld: Sequence[Withheld] = ()
    anyway: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with those that are published all the same."""


@dataclass(frozen=True)
class TrainedStage:
    """A training stage: how it was described, and what came out."""

    config: StageConfig
    artifact: Artifact

    @property
    def name(self) -> str:
        """Return its name."""
        return self.config.name


@dataclass(frozen=True)
class ReleaseInputs:
    """Everything that a release is made of; all of it finished.

    Args:
        name: Of the recipe.
        recipe: As JSON, for the card.
        base: What the recipe starts from: a hub name, a directory, or `SCRATCH`.
        template: Name of the chat template.
        model: The final model; the base where nothing was trained.
        stages: Training stages, in order.
        data: Tokenized mixtures.
        variants: Quantized models.
        results: Measurements of `base`, stages (by name) and variants (by name).
        base_on_hub: `base` names a model of the hub, not a directory.
        gate: Which variants are published; `None` if they were not measured to be judged.
    """

    name: str
    recipe: Mapping[str, Any]
    base: str
    template: str
    model: Artifact
    stages: Sequence[Artifact]
    data: Sequence[Artifact]
    variants: Sequence[Artifact]
    results: Sequence[Result]
    base_on_hub: bool = False
    gate: Gate | None = None

    def __post_init__(self) -> None:
        named = Counter(variant.name for variant in self.quantized)
        twice = [name for name, times in named.items() if times > 1]
        if twice:
            raise LlameroError(
                f"two variants are called `{twice[0]}`",
                where=self.name,
                fix="each variant becomes a branch of its own: give each its own name",
            )
        unknown = sorted({result.model for result in self.results} - set(self.model_names))
        if unknown:
            raise ValueError(f"results of {unknown}, which are no models of this release: {self.model_names}")

    @cached_property
    def trained(self) -> tuple[TrainedStage, ...]:
        """Return the training stages."""
        return tuple(_trained(artifact) for artifact in self.stages)

    @cached_property
    def quantized(self) -> tuple[Variant, ...]:
        """Return the quantized models."""
        keys = [field.name for field in fields(Variant)]
        return tuple(Variant(**{key: artifact.summary[key] for key in keys}) for artifact in self.variants)

    @property
    def final(self) -> str:
        """Return what results call the final model."""
        return self.trained[-1].name if self.trained else BASE

    @property
    def model_names(self) -> list[str]:
        """Return what results call the models, in the order in which they were made."""
        return [BASE, *(stage.name for stage in self.trained), *(variant.name for variant in self.quantized)]


def _trained(artifact: Artifact) -> TrainedStage:
    if not artifact.stage.startswith(_STAGE_PREFIX):
        raise ValueError(f"{artifact.stage} is no training stage")
    name = artifact.stage.removeprefix(_STAGE_PREFIX)
    return TrainedStage(StageConfig.model_validate({"name": name, **artifact.config["stage"]}), artifact)
