"""The recipe: one release from its data to its publication, composed of the verbs' own configs."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llamero.core.config import Strict
from llamero.core.errors import did_you_mean
from llamero.data.config import DataConfig, VocabularyConfig
from llamero.engine.stage import StageConfig
from llamero.evaluate.config import EvaluateConfig, PerplexityTask
from llamero.parallel.config import ParallelConfig
from llamero.publish.config import PublishConfig
from llamero.quantize.config import QuantizeConfig
from llamero.train.config import ShapeConfig


class ScratchConfig(Strict):
    """A base that does not exist yet: its shape, and the tokenizer to train for it."""

    shape: ShapeConfig
    """Shape of the model."""
    vocabulary: VocabularyConfig
    """Its tokenizer."""


class Recipe(Strict):
    """A release."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the release and of its model."""
    base: str | ScratchConfig
    """Model to start from: a directory relative to the recipe, `owner/name[:revision]` of the hub, or a shape."""
    template: str = "auto"
    """Chat template: orca-hashes, alpaca, chatml, llama-2, llama-3, vicuna, plain, or auto for the base's own."""
    seed: int = 42
    """Decides fresh weights, splits and the order of data."""
    data: DataConfig = DataConfig()
    """Sources and mixtures."""
    train: list[StageConfig] = []
    """Training stages, one after the other."""
    quantize: QuantizeConfig | None = None
    """Quantized variants."""
    evaluate: list[EvaluateConfig] = []
    """Measurements."""
    publish: PublishConfig | None = None
    """The release and its card."""
    parallel: ParallelConfig = ParallelConfig()
    """Devices; never decides the result."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        stages: list[str] = []
        for stage in self.train:
            _known(stage.mixture, self.data.mixtures, f"stage `{stage.name}` learns from mixture")
            if stage.init_from is not None:
                _known(stage.init_from, stages, f"stage `{stage.name}` starts from stage")
            if stage.name in {*stages, "base", "final", "variants"}:
                raise ValueError(f"the stage name `{stage.name}` is taken; give each stage its own")
            stages.append(stage.name)
        if isinstance(self.base, ScratchConfig):
            _known(self.base.vocabulary.mixture, self.data.mixtures, "the tokenizer is trained on mixture")
            if not stages:
                raise ValueError("a base that does not exist yet needs a training stage")
        if self.quantize and self.quantize.calibration.mixture is not None:
            _known(self.quantize.calibration.mixture, self.data.mixtures, "calibration uses mixture")
        models = {*stages, "base", "final", "variants", *(self.quantize.variants if self.quantize else ())}
        for task in self.evaluate:
            for model in task.models:
                _known(model, models, f"`{task.tasks}` measures model")
            for mixture in task.validation if isinstance(task, PerplexityTask) else ():
                _known(mixture, self.data.mixtures, "perplexity reads mixture")
        return self


def _known(name: str, names: object, who: str) -> None:
    known = set(names)  # type: ignore[call-overload]
    if name not in known:
        raise ValueError(f"{who} `{name}`, which does not exist; {did_you_mean(name, known) if known else 'none does'}")
