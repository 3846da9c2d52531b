"""The recipe: one release from its data to its publication, composed of the verbs' own configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llamero.core.config import Strict
from llamero.core.errors import did_you_mean
from llamero.data.config import DataConfig, VocabularyConfig
from llamero.engine.stage import StageConfig
from llamero.evaluate.config import EvaluateConfig, PerplexityTask
from llamero.parallel.config import ParallelConfig
from llamero.publish.config import PublishConfig
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.gate import DEFAULT_TEXTS, Measure
from llamero.text.templates import TEMPLATES
from llamero.train.config import ShapeConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


Place = tuple[str | int, ...]


class ScratchConfig(Strict):
    """A base that does not exist yet: its shape, and the tokenizer to train for it."""

    shape: ShapeConfig
    """Shape of the model."""
    vocabulary: VocabularyConfig
    """Its tokenizer."""


def _base_kind(value: Any) -> str:
    return "ScratchConfig" if isinstance(value, dict | ScratchConfig) else "Model"


class Recipe(Strict):
    """A release."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the release and of its model."""
    base: Annotated[
        Annotated[str, Tag("Model")] | Annotated[ScratchConfig, Tag("ScratchConfig")], Discriminator(_base_kind)
    ]
    """Model to start from: a directory relative to the recipe, `owner/name[:revision]` of the hub, or a shape."""
    template: str = "auto"
    """Chat template, one of `TEMPLATES` in text/templates.py (chatml, llama-3 …), or `auto` for the base's own."""
    seed: int = Field(default=42, ge=0)
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
        _known(self.template, {*TEMPLATES, "auto"}, ("template",), "template")
        self._extra_tokens_are_some()
        mixtures, stages = self.data.mixtures, list[str]()
        for number, stage in enumerate(self.train):
            place = ("train", number)
            _known(stage.mixture, mixtures, (*place, "mixture"), "mixture")
            if stage.init_from is not None:
                _known(stage.init_from, stages, (*place, "init_from"), "earlier stage")
            if stage.name in {*stages, "base", "final", "variants"}:
                raise _wrong((*place, "name"), f"the name `{stage.name}` is taken", "give each stage its own name")
            stages.append(stage.name)
        self._kept_moments_are_there()
        if isinstance(self.base, ScratchConfig):
            _known(self.base.vocabulary.mixture, mixtures, ("base", "vocabulary", "mixture"), "mixture")
            if not stages:
                raise _wrong(("base",), "a base that does not exist yet needs a training stage", "add `train:`")
        if self.quantize:
            for part in self.quantize.calibration.parts():
                if part.mixture is not None:
                    _known(part.mixture, mixtures, ("quantize", "calibration", "mixture"), "mixture")
        self._measured_models_are_known(stages)
        self._validation_is_there()
        self._variants_can_be_measured()
        if self.publish and not self.train and (self.template != "auto" or self.data.extra_tokens):
            raise _wrong(
                ("template",),
                "without a training stage the base is released as it is, with its own template and vocabulary",
                "remove `template` and `data.extra_tokens`, or train",
            )
        return self

    @property
    def _keeps_validation(self) -> list[str]:
        """Return the mixtures that keep validation samples."""
        return [name for name, m in self.data.mixtures.items() if any(source.val_split for source in m.sources)]

    @property
    def measured_on(self) -> Measure | None:
        """Return on what variants are measured.

        Where `quantize.measure` names nothing: the first texts of the evaluation's perplexity, then the last mixtures
        that are trained on and keep validation samples. Nothing, if there is none of that either.
        """
        measure = None if self.quantize is None else self.quantize.measure
        if measure is None or measure.texts or measure.validation:
            return measure
        tasks = [task for task in self.evaluate if isinstance(task, PerplexityTask)]
        files = list({name: path for task in tasks for name, path in task.texts.items()}.items())[:DEFAULT_TEXTS]
        trained = dict.fromkeys(stage.mixture for stage in reversed(self.train))
        keep = [name for name in trained if name in self._keeps_validation][: DEFAULT_TEXTS - len(files)]
        return measure.model_copy(update={"texts": dict(files), "validation": keep}) if files or keep else None

    def _variants_can_be_measured(self) -> None:
        if self.quantize is None or self.quantize.measure is None:
            return
        place = ("quantize", "measure")
        for mixture in self.quantize.measure.validation:
            _known(mixture, self.data.mixtures, (*place, "validation"), "mixture")
            if mixture not in self._keeps_validation:
                problem = f"mixture `{mixture}` keeps no validation samples"
                raise _wrong(place, problem, "give a source of it `val_split`")
        if self.publish and self.measured_on is None:
            problem = "variants are published, and there is no text to measure them on"
            raise _wrong(place, problem, "name some: `texts: {WikiText-2 test: FILE}`; or set `measure: null`")

    def _extra_tokens_are_some(self) -> None:
        tokens = self.data.extra_tokens
        for number, token in enumerate(tokens):
            place = ("data", "extra_tokens", number)
            if not token.strip():
                raise _wrong(place, f"{token!r} is no token", "give it a spelling")
            if token in tokens[:number]:
                raise _wrong(place, f"the token {token!r} stands here twice", "name it once: its place gives its id")

    def _kept_moments_are_there(self) -> None:
        """Refuse to go on with an optimizer that nobody leaves behind, or that learned something else."""
        stages: dict[str | None, StageConfig] = {}
        for number, stage in enumerate(self.train):
            start = stages.get(stage.init_from or next(reversed(stages), None))
            if stage.optimizer == "keep" and (wrong := _cannot_keep(stage, start)):
                raise _wrong(("train", number, "optimizer"), f"`optimizer: keep`, but {wrong[0]}", wrong[1])
            stages[stage.name] = stage

    def _validation_is_there(self) -> None:
        """Refuse what reads validation samples of a mixture that keeps none, or that a base cannot read."""
        keeps, fix = self._keeps_validation, "give a source of it `val_split`"
        for number, stage in enumerate(self.train):
            if stage.eval_every and stage.mixture not in keeps:
                problem = f"mixture `{stage.mixture}` keeps no validation samples"
                raise _wrong(("train", number, "eval_every"), problem, fix)
        for number, task in enumerate(self.evaluate):
            for mixture in task.mixtures:
                if mixture not in keeps:
                    raise _wrong(("evaluate", number), f"mixture `{mixture}` keeps no validation samples", fix)
            if task.mixtures and "base" in task.models and isinstance(self.base, str) and self.data.extra_tokens:
                problem = "the base does not have `data.extra_tokens`, so it cannot read this mixture"
                raise _wrong(("evaluate", number), problem, "set `models: [final, variants]`")

    def _measured_models_are_known(self, stages: Sequence[str]) -> None:
        models = {*stages, "base", "final", "variants", *(self.quantize.variants if self.quantize else ())}
        for number, task in enumerate(self.evaluate):
            for model in task.models:
                _known(model, models, ("evaluate", number, "models"), "model")
            if set(task.models) == {"variants"} and not self.quantize:
                raise _wrong(("evaluate", number, "models"), "there are no variants to measure", "add `quantize:`")
            for mixture in task.mixtures:
                _known(mixture, self.data.mixtures, ("evaluate", number), "mixture")


def _cannot_keep(stage: StageConfig, start: StageConfig | None) -> tuple[str, str] | None:
    """Return why a stage cannot go on with the moments of the one it starts from, and the way out."""
    if start is None:
        return "the stage starts from the base, which has no moments of an optimizer", "set `optimizer: fresh`"
    if stage.adapter is not None or start.adapter is not None:
        return f"the moments of `{start.name}` are not those of new factors of an adapter", "set `optimizer: fresh`"
    if not start.export_optimizer:
        fix = f"give `{start.name}` `export_optimizer: true`, or set `optimizer: fresh`"
        return f"stage `{start.name}`, which this one starts from, leaves none of its moments", fix
    return None


def _known(name: str, names: Collection[str], place: Place, what: str) -> None:
    if name not in names:
        raise _wrong(place, f"there is no {what} `{name}`", did_you_mean(name, names) if names else f"add one: {what}")


def _wrong(place: Place, problem: str, fix: str) -> PydanticCustomError:
    """Return an error about two parts of a recipe that do not fit, with the place of the one to mend."""
    return PydanticCustomError("recipe_rule", "{problem}", {"problem": problem, "place": place, "fix": fix})
