"""A recipe at the size of a laptop: the same stages in the same order, over the same kind of layout, on toy data.

What a release is made of stays: objectives, schedules, dropout, template, extra tokens, variants, cards. What costs
time or has to be fetched goes, and every key that changes is listed with what it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamero.core.errors import LlameroError
from llamero.corpus import known
from llamero.corpus.toy_files import ToyFile
from llamero.data.config import FileSource, MixtureConfig, ToyWorldSource
from llamero.engine.stage import ProbeConfig, StageConfig
from llamero.evaluate.config import (
    WITH_MMLU,
    EvaluateConfig,
    H4Task,
    HumanEvalTask,
    LmEvalTask,
    MtBenchTask,
    NeedleTask,
    PerplexityTask,
    SamplesTask,
    SamplingTask,
    ToyWorldTask,
    WikitextTask,
)
from llamero.parallel.config import ParallelConfig
from llamero.quantize.config import CalibrationSource, QuantizeConfig
from llamero.quantize.gate import Measure
from llamero.recipe.schema import Recipe, ScratchConfig
from llamero.text.templates import TEMPLATES
from llamero.train.config import ShapeConfig

SUFFIX = "-tiny"
"""What a tiny release's name ends with, so that it is never taken for the real one."""
PROCESSES = 4
"""Most processes of a tiny layout."""
SHAPE = {"hidden": 128, "layers": 4, "heads": 4, "mlp": 256, "context": 256}
"""A width that groups of 128 divide, and layers for two pipeline ranks of two pieces."""
VOCABULARY = 512
STEPS = 12
ROWS = 8
"""Of a step; as many samples, where a step is counted in samples."""
SEQUENCE = 128
"""Tokens of a row in the stage with the longest rows; the others keep their proportion to it."""
SAMPLES = 400
"""Of a source; of message trees, trees."""
VALIDATION = 0.1
CALIBRATION = 4096
QUESTIONS = 2
LEFT_OUT: dict[type, str] = {
    NeedleTask: "a tiny model's context holds no haystack",
    MtBenchTask: "a judge is paid for, or as large as the release",
}
RANK = 32
"""Of an adapter: the narrowest layer of `SHAPE` is twice as wide."""
NEW_TOKENS = 16
LONGEST_SAID = 120
"""Characters of a value that a change shows."""
SMALL = 256
"""Width up to which a base that is here is small enough to be kept."""

_AXES = ("tensor", "pipeline", "ring", "ulysses", "shard", "replicate")
"""In the order in which they are kept, where there are too many for `PROCESSES`."""


@dataclass(frozen=True)
class Change:
    """A key that a tiny recipe has another value of."""

    key: str
    before: str
    after: str
    why: str = ""


@dataclass(frozen=True)
class Base:
    """What a tiny model takes over from its base.

    Args:
        grouped: Whether several heads share one key/value head.
        tied: Whether the head is the embedding.
        theta: Base of its rotary wavelengths.
        width: Of its residual stream.
    """

    grouped: bool
    tied: bool
    theta: float
    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Base:
        """Return what a config.json says."""
        heads = config.get("num_attention_heads")
        theta = {"rope_theta": 10000.0, **config, **(config.get("rope_parameters") or {})}["rope_theta"]
        return cls(
            grouped=config.get("num_key_value_heads", heads) != heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            theta=float(theta),
            width=int(config.get("hidden_size", 0)),
        )


LLAMA_2_70B = Base(grouped=True, tied=False, theta=10000.0, width=8192)
"""What a base is taken for of which nothing is here."""


@dataclass(frozen=True)
class Scaled:
    """A tiny recipe."""

    recipe: Recipe
    changes: tuple[Change, ...]
    files: tuple[ToyFile, ...]
    """What has to be written before it runs."""


def tiny(
    recipe: Recipe,
    *,
    here: Callable[[str], bool],
    base: Base | None = None,
    toys: str = "toy",
    processes: int | None = None,
) -> Scaled:
    """Return a recipe at the size of a laptop.

    Args:
        recipe: The real one; it is not changed.
        here: Whether a path of the recipe leads somewhere.
        base: Of its base, where its config is at hand.
        toys: Directory for files of toy data, relative to the recipe.
        processes: How many there are; one means a layout of one. By default as many as the tiny layout takes.

    Raises:
        LlameroError: It trains nothing, or begins with an adapter, and its base is not small itself.
    """
    return _Tiny(recipe, here, base, toys, processes).result()


class _Keys:
    """A part of a recipe as its file has it, and the list of what is put in the place of other values."""

    def __init__(self, keys: dict[str, Any], place: str, log: list[Change]) -> None:
        self.keys, self._place, self._log = keys, place, log

    def put(self, key: str, before: object, after: object, why: str = "") -> None:
        """Set a key; `None` takes it away. What is as it was is left alone."""
        if before == after:
            return
        if after is None:
            self.keys.pop(key, None)
        else:
            self.keys[key] = after
        place = ".".join(part for part in (self._place, key) if part)
        self._log.append(Change(place, _said(before), _said(after), why))

    def most(self, key: str, before: float, most: float, why: str = "") -> None:
        """Lower a number."""
        self.put(key, before, min(before, most), why)


def _said(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or "none"
    said = f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
    return said if len(said) <= LONGEST_SAID else f"{said[:LONGEST_SAID]}…"


@dataclass
class _Tiny:
    recipe: Recipe
    here: Callable[[str], bool]
    base: Base | None
    toys: str
    processes: int | None
    log: list[Change] = field(default_factory=list)
    files: list[ToyFile] = field(default_factory=list)

    def result(self) -> Scaled:
        recipe = self.recipe
        keys = recipe.model_dump(mode="json", exclude_unset=True)
        said = self._part(keys, "")
        said.put("name", recipe.name, recipe.name + SUFFIX, "never published under the real name")
        self._start(said)
        for name, mixture in recipe.data.mixtures.items():
            self._mixture(keys["data"]["mixtures"][name], name, mixture)
        longest = max((stage.sequence for stage in recipe.train), default=SEQUENCE)
        for stage, own in zip(recipe.train, keys.get("train", ()), strict=True):
            _stage(self._part(own, f"train.{stage.name}"), stage, longest=longest)
            if stage.adapter is not None:
                adapter = self._part(own["adapter"], f"train.{stage.name}.adapter")
                adapter.most("lora", stage.adapter.lora, RANK, "no rank is larger than a layer")
            if stage.probe is not None:
                self._probe(own, stage.name, stage.probe)
        if recipe.quantize is not None:
            self._quantize(keys["quantize"].setdefault("calibration", {}), recipe.quantize)
            if recipe.quantize.measure is not None:
                self._measure(keys["quantize"], recipe.quantize.measure)
        if recipe.evaluate:
            keys["evaluate"] = list(self._evaluate(keys["evaluate"]))
        if recipe.publish is not None:
            _publish(self._part(keys["publish"], "publish"), recipe)
        _layout(self._part(keys.setdefault("parallel", {}), "parallel"), recipe.parallel, self.processes)
        return Scaled(Recipe.model_validate(keys), tuple(self.log), tuple(self.files))

    def _part(self, keys: dict[str, Any], place: str) -> _Keys:
        return _Keys(keys, place, self.log)

    # -- base

    def _start(self, said: _Keys) -> None:
        """Put a fresh small model in the place of a base that is large or not here."""
        recipe = self.recipe
        if isinstance(recipe.base, ScratchConfig):
            before, keys = recipe.base.shape, said.keys["base"]
            if before.hidden > SHAPE["hidden"]:
                after = like(_kind(before)).model_dump(mode="json", exclude_none=True)
                self._part(keys, "base").put("shape", before.model_dump(exclude_none=True), after)
            vocabulary = self._part(keys["vocabulary"], "base.vocabulary")
            vocabulary.most("size", recipe.base.vocabulary.size, VOCABULARY)
            return
        if self.base is not None and self.base.width <= SMALL and self.here(recipe.base):
            return
        self._refuse_what_needs_a_base()
        taken, why = self.base, "fresh, of the same kind"
        if taken is None:
            taken, why = LLAMA_2_70B, "its config is not here: fresh, of the kind of Llama 2 70B"
        shape, vocabulary = like(taken), {"size": VOCABULARY, "mixture": recipe.train[0].mixture}
        after = {"shape": shape.model_dump(mode="json", exclude_none=True), "vocabulary": vocabulary}
        said.put("base", recipe.base, after, f"{why}; its tokenizer is trained on the first mixture")
        self._template(said)

    def _refuse_what_needs_a_base(self) -> None:
        first = self.recipe.train[0] if self.recipe.train else None
        if first is not None and first.adapter is None:
            return
        problem = "the first stage trains an adapter" if first is not None else "the recipe trains nothing"
        raise LlameroError(
            f"{problem}, and --scale tiny puts a model with fresh weights in the place of `{self.recipe.base}`",
            where="base",
            fix=f"give a small one: --set base=DIR, of a model at most {SMALL} wide",
        )

    def _template(self, said: _Keys) -> None:
        """Give a fresh vocabulary the tokens that its template needs, which the base's own may have had."""
        name = self.recipe.template
        if name == "auto":
            said.put("template", name, "chatml", "the base's own template is not here")
            name = "chatml"
        tokens = self.recipe.data.extra_tokens
        missing = [token for token in TEMPLATES[name].special if token not in tokens]
        data = self._part(said.keys.setdefault("data", {}), "data")
        data.put("extra_tokens", tokens, [*tokens, *missing], f"template {name} needs them")

    # -- data

    def _mixture(self, keys: dict[str, Any], name: str, mixture: MixtureConfig) -> None:
        said = self._part(keys, f"data.mixtures.{name}")
        said.most("min_assistant_tokens", mixture.min_assistant_tokens, 4, "toy answers are short")
        if mixture.lengthen is not None:
            lengthen = self._part(keys["lengthen"], f"data.mixtures.{name}.lengthen")
            lengthen.most("length", mixture.lengthen.length, SEQUENCE)
            lengthen.most("long_from", mixture.lengthen.long_from, SEQUENCE // 4)
        if mixture.decontaminate is not None:
            against = mixture.decontaminate.against
            found = {test: path for test, path in against.items() if self.here(path)}
            if not found:
                said.put("decontaminate", against, None, "these test sets are not here")
            else:
                decontaminate = self._part(keys["decontaminate"], f"data.mixtures.{name}.decontaminate")
                decontaminate.put("against", against, found, "the others are not here")
        for number, source in enumerate(mixture.sources):
            place = self._part(keys["sources"][number], f"data.mixtures.{name}.sources.{source.source}")
            if isinstance(source, ToyWorldSource):
                place.most("count", source.count, SAMPLES)
            elif isinstance(source, FileSource):
                self._file(place, name, source)
            if 0 < source.val_split < VALIDATION:
                place.put(
                    "val_split", source.val_split, VALIDATION, "of few samples, some have to be left to measure on"
                )

    def _file(self, said: _Keys, mixture: str, source: FileSource) -> None:
        if isinstance(source.refusals, str) and not self.here(source.refusals):
            said.put("refusals", source.refusals, True, "the phrases are not here")
        if source.join_chars is not None:
            said.most("join_chars", source.join_chars, 200)
        if source.path is not None and self.here(source.path):
            said.put("limit", source.limit, min(source.limit or SAMPLES, SAMPLES))
            return
        published = known.lookup(source.source)
        layout = source.layout or (published.layout if published is not None else "messages")
        languages = tuple(source.lang.replace(" ", "").split(",")) if source.lang else (source.language or "en",)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{mixture}-{source.source}")
        file = ToyFile(f"{self.toys}/{name}.jsonl", layout, SAMPLES, len(self.files) + 1, languages)
        self.files.append(file)
        for key in ("hub", "subset", "data_files", "split"):
            said.keys.pop(key, None)
        said.keys["layout"] = layout
        before = source.path or f"{source.hub} of the hub"
        rows = "trees" if layout.startswith("oasst") else "texts" if layout == "text" else "chats"
        said.put("path", before, file.path, f"{SAMPLES} toy {rows}, layout {layout}")

    # -- training

    def _probe(self, own: dict[str, Any], name: str, probe: ProbeConfig) -> None:
        """Ask little and often; leave out questions whose files are not here."""
        said, place = self._part(own["probe"], f"train.{name}.probe"), self._part(own, f"train.{name}")
        if probe.data is not None and not self.here(probe.data):
            if not probe.prompts:
                return place.put("probe", probe.task, None, "its questions are not here")
            for key in ("task", "data"):
                said.put(key, getattr(probe, key), None, "its questions are not here")
        said.most("every", probe.every, STEPS // 2)
        if probe.task is not None:
            said.most("questions", probe.questions, QUESTIONS)
        if probe.prompts:
            said.put("prompts", probe.prompts, probe.prompts[:QUESTIONS])
            said.most("max_new_tokens", probe.max_new_tokens, NEW_TOKENS)
        return None

    # -- what comes after training

    def _quantize(self, keys: dict[str, Any], config: QuantizeConfig) -> None:
        said, calibration = self._part(keys, "quantize.calibration"), config.calibration
        said.most("sequence", calibration.sequence, SEQUENCE)
        said.most("tokens", calibration.tokens, CALIBRATION)
        if not self.recipe.train:
            return
        own = self.recipe.train[-1].mixture
        left = [part for part in calibration.parts(own) if part.mixture is not None or self._is_here(part)]
        if calibration.text is not None and not self.here(str(calibration.text)):
            said.put("text", str(calibration.text), None, "it is not here")
        missing = [part for part in calibration.sources if part not in left]
        if missing:
            kept = [each for each, part in zip(keys["sources"], calibration.sources, strict=True) if part in left]
            said.put("sources", [part.name for part in missing], kept or None, "these are not here")
        if not left or not (calibration.mixture or calibration.text or calibration.sources):
            said.put("mixture", calibration.mixture, own, "text that is here")

    def _is_here(self, source: CalibrationSource) -> bool:
        return source.path is not None and self.here(str(source.path))

    def _measure(self, keys: dict[str, Any], measure: Measure) -> None:
        texts = {name: path for name, path in measure.texts.items() if self.here(path)}
        kept = any(source.val_split for mixture in self.recipe.data.mixtures.values() for source in mixture.sources)
        if measure.texts and not texts and not kept:
            keys["measure"] = None
            self.log.append(Change("quantize.measure", _said(measure.texts), "null", "the texts are not here"))
            return
        said = self._part(keys.setdefault("measure", {}), "quantize.measure")
        said.put("texts", measure.texts, texts, "the others are not here")
        said.most("tokens", measure.tokens, CALIBRATION)
        for key, before in (("window", measure.window), ("stride", measure.stride)):
            if before is not None:
                said.most(key, before, SEQUENCE)

    def _evaluate(self, tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the tasks that can be done here."""
        for number, (task, keys) in enumerate(zip(self.recipe.evaluate, tasks, strict=True)):
            said = self._part(keys, f"evaluate.{number}")
            if type(task) in LEFT_OUT:
                said.put("", task.tasks, None, f"left out: {LEFT_OUT[type(task)]}")
            elif self._small(task, said):
                yield keys
            else:
                said.put("", task.tasks, None, "left out: what it measures with is not here")

    def _small(self, task: EvaluateConfig, said: _Keys) -> bool:
        """Shrink a task; return whether there is something to do."""
        match task:
            case H4Task():
                if not self.here(task.data):
                    return False
                said.put("limit", task.limit, min(task.limit or QUESTIONS, QUESTIONS))
                if task.tasks in WITH_MMLU:
                    said.put("subjects", task.subjects, task.subjects[:1] if isinstance(task.subjects, list) else 1)
            case LmEvalTask():
                said.put("limit", task.limit, min(task.limit or QUESTIONS, QUESTIONS))
            case PerplexityTask() | WikitextTask():
                return self._small_texts(task, said)
            case ToyWorldTask():
                said.most("per_category", task.per_category, QUESTIONS)
            case SamplesTask():
                said.put("prompts", task.prompts, task.prompts[:QUESTIONS])
                said.most("max_new_tokens", task.max_new_tokens, NEW_TOKENS)
            case SamplingTask() | HumanEvalTask():
                if not all(self.here(path) for path in task.files.values()):
                    return False
                said.put("limit", task.limit, 1)
        return True

    def _small_texts(self, task: PerplexityTask | WikitextTask, said: _Keys) -> bool:
        """Shrink a task that reads texts; return whether there are any."""
        texts = {name: path for name, path in task.texts.items() if self.here(path)}
        if not texts and not (isinstance(task, PerplexityTask) and task.validation):
            return False
        said.put("texts", task.texts, texts, "the others are not here")
        if isinstance(task, WikitextTask):
            said.put("max_length", task.max_length, None, "the tiny model's own")
            said.put("limit", task.limit, 1)
        else:
            said.most("window", task.window, SEQUENCE)
            if "stride" in task.model_fields_set or task.protocol == "window":
                said.most("stride", task.stride, SEQUENCE // 2)
            said.put("tokens", task.tokens, min(task.tokens or CALIBRATION, CALIBRATION))
        return True


def like(base: Base) -> ShapeConfig:
    """Return the shape of a tiny model of the same kind as a base."""
    kv_heads = SHAPE["heads"] // 2 if base.grouped else SHAPE["heads"]
    return ShapeConfig.model_validate({**SHAPE, "kv_heads": kv_heads, "theta": base.theta, "tied": base.tied})


def _kind(shape: ShapeConfig) -> Base:
    return Base(shape.kv_heads not in (None, shape.heads), shape.tied, shape.theta, shape.hidden)


def _stage(said: _Keys, stage: StageConfig, *, longest: int) -> None:
    """Shorten a stage."""
    sequence = min(stage.sequence, max(SEQUENCE // 4, SEQUENCE * stage.sequence // max(longest, SEQUENCE)))
    said.put("sequence", stage.sequence, sequence)
    if stage.policy in ("error", "drop"):
        said.put("overlong", stage.policy, "truncate", "rows are short")
    if stage.batch_tokens is not None:
        said.keys.pop("batch", None)
        said.most("batch_tokens", stage.batch_tokens, ROWS * sequence)
    elif stage.batch_samples is not None:
        said.keys.pop("batch", None)
        said.most("batch_samples", stage.batch_samples, ROWS)
    else:
        said.most("batch", stage.batch, ROWS)
    steps = min(stage.steps or STEPS, STEPS)
    said.put("epochs", stage.epochs, None)
    said.put("steps", stage.steps, steps)
    if stage.decay is not None and stage.decay >= 1:
        said.most("decay", stage.decay, max(1, steps // 4))
    falls = stage.decay or 0
    level = steps // 4 if falls >= 1 else min(steps // 4, int(steps * (1 - falls)))
    said.most("warmup", stage.warmup, max(1, level))
    said.most("eval_every", stage.eval_every, max(1, steps // 2))
    said.most("save_every", stage.save_every, max(1, steps // 2))


def _publish(said: _Keys, recipe: Recipe) -> None:
    """Say on the card what it is."""
    publish = recipe.publish
    assert publish is not None
    if publish.repository is not None:
        said.put("repository", publish.repository, publish.repository + SUFFIX)
    said.put("base_model", publish.base_model, None, "it starts from another")
    said.put("datasets", publish.datasets, [], "it learns from toy data")
    told = f"A rehearsal of {recipe.name} on a laptop (`--scale tiny`): a tiny model, a few steps, little data."
    said.put("description", publish.description, told)


def _layout(said: _Keys, parallel: ParallelConfig, processes: int | None) -> None:
    """Take two devices of every axis that has several, as far as there are processes."""
    said_sizes = parallel.model_dump() | {"shard": parallel.sharded}
    sizes: dict[str, int] = {axis: said_sizes[axis] for axis in _AXES}
    taken: dict[str, int] = dict.fromkeys(_AXES, 1)
    room = 1 if processes == 1 else PROCESSES
    for axis, size in sizes.items():
        if size > 1 and room >= 2:
            taken[axis], room = 2, room // 2
    why = "one process" if processes == 1 else f"two of each, {PROCESSES} processes at most"
    for axis, size in taken.items():
        said.put(axis, sizes[axis], size, why)
    said.put("gpus", parallel.gpus, math.prod(taken.values()), why)
    if parallel.offload and taken["shard"] * taken["replicate"] == 1:
        said.put("offload", True, False, "nothing is spread by `shard` or `replicate` any more")
    said.most("stages_per_rank", parallel.stages_per_rank, 2)
    said.put("compile", parallel.compile, False, "it takes longer than the run")
