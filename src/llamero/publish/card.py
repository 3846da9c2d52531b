"""Model cards: metadata for the hub and Markdown for people, from artifacts and results alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llamero.checkpoint import hf
from llamero.checkpoint.loaders import VLLM, accepting, looked_at, remarks
from llamero.core.errors import LlameroError
from llamero.publish import markdown
from llamero.publish.measurements import AGREEMENT, MT_BENCH, PERPLEXITY, PRINTED, category_tables, score_table, series
from llamero.publish.picture import Point
from llamero.publish.provided import INSTALLED, formats, provided_files
from llamero.publish.release import BASE, SCRATCH
from llamero.publish.training import ancestry_table, mixtures, packing_notes, stage_table, training_notes
from llamero.text.messages import Message
from llamero.text.render import render, resolve
from llamero.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.publish.config import PublishConfig
    from llamero.publish.measurements import Series
    from llamero.publish.release import ReleaseInputs, Variant

HUB = "https://huggingface.co"

PICTURE = "kl-against-size.png"
"""Beside the card of the quantized files."""

_BESIDE_FILES = {PERPLEXITY, AGREEMENT}
"""Tasks that stand in the table of quantized files."""

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # it is Markdown
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "count": markdown.count,
    "size": markdown.size,
    "plural": markdown.plural,
    "fence": markdown.fence,
}


@dataclass(frozen=True)
class Shape:
    """What the files of a model say of it."""

    parameters: int
    size_bytes: int
    """Of the files of weights."""
    dtype: str
    config: Mapping[str, Any]
    """config.json."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model expects it, with `{system_message}` and `{prompt}` to fill in."""

    name: str
    text: str
    alone: str
    """The same without a system message."""
    system: bool
    """The template has a place for a system message."""


def read_shape(directory: Path) -> Shape:
    """Return what the files of a model say of it."""
    tensors = hf.open_tensors(directory)
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in tensors.specs.values()})
    return Shape(
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in tensors.specs.values()),
        size_bytes=sum(path.stat().st_size for path in set(tensors.files.values())),
        dtype=" and ".join(dtypes),
        config=hf.read_config(directory),
    )


def read_prompt(directory: Path, template: str) -> Prompt | None:
    """Return the prompt of a model; `None` for a model that comes without a template and was given none."""
    tokenizer = load_tokenizer(directory)
    if template == "auto" and tokenizer.chat_template is None:
        return None
    asked, told = Message("user", "{prompt}"), Message("system", "{system_message}")
    way = resolve(template, tokenizer)
    name = "the model's own" if template == "auto" else template
    alone = render([asked], way, tokenizer, add_generation_prompt=True).text
    try:
        return Prompt(name, render([told, asked], way, tokenizer, add_generation_prompt=True).text, alone, system=True)
    except LlameroError:  # a model's own template may refuse system messages, and the card says so
        return Prompt(name, alone, alone, system=False)


@dataclass(frozen=True)
class Cards:
    """The cards of a release.

    Args:
        config: What the recipe says of its publication.
        inputs: What the release is made of.
        shape: Of the final model.
        prompt: Of the final model.
        curves: File name of the loss curve of each stage, beside the card.
    """

    config: PublishConfig
    inputs: ReleaseInputs
    shape: Shape
    prompt: Prompt | None
    curves: Mapping[str, str]

    # -- names and links

    @property
    def quantized_name(self) -> str:
        """Return the name of the repository of quantized files."""
        return f"{self.inputs.name}-GPTQ"

    @property
    def _quantized_repository(self) -> str | None:
        return None if self.config.repository is None else f"{self.config.repository}-GPTQ"

    @property
    def _base_id(self) -> str | None:
        """Return the hub name of the base."""
        if self.config.base_model is not None:
            return self.config.base_model
        return self.inputs.base.partition(":")[0] if self.inputs.base_on_hub else None

    @property
    def _base_link(self) -> str | None:
        """Return Markdown that names the base; a directory by its last part only, the rest is its owner's business."""
        if self._base_id is not None:
            revision = self.inputs.base.partition(":")[2] if self.inputs.base_on_hub else ""
            link = f"[{self._base_id}]({HUB}/{self._base_id})"
            return f"{link} (revision `{revision}`)" if revision else link
        return None if self.inputs.base == SCRATCH else f"`{PurePath(self.inputs.base).name}`"

    def _load_name(self, variant: Variant | None = None) -> str:
        """Return what to load a model by."""
        if variant is None:
            return self.config.repository or f"./{self.inputs.name}"
        if self._quantized_repository is not None:
            return f"{self._quantized_repository}:{variant.name}"
        return f"./{self.quantized_name}/{variant.name}"

    def _branch(self, variant: Variant) -> str:
        where = variant.name
        if self._quantized_repository is not None:
            where = f"{HUB}/{self._quantized_repository}/tree/{variant.name}"
        return f"[{variant.name}]({where})"

    def _link(self, name: str, repository: str | None) -> str:
        return f"[{name}](../{name})" if repository is None else f"[{repository}]({HUB}/{repository})"

    @property
    def _labels(self) -> dict[str, str]:
        """Return how tables call each model."""
        inputs = self.inputs
        labels = {name: name for name in inputs.model_names}
        labels[BASE] = "base" if self._base_link is None else f"base: {self._base_link}"
        labels[inputs.final] = f"**{inputs.name}**" + (f" ({inputs.final})" if inputs.trained else "")
        return labels

    # -- cards

    def model(self) -> str:
        """Return the card of the unquantized model."""
        data = self._data(
            base_model=self._base_id if self.inputs.trained else None,
            tags=["llamero", *dict.fromkeys(stage.config.objective for stage in self.inputs.trained)],
            eval_results=self._eval_results() or None,
            base_model_relation="finetune" if self.inputs.trained and self._base_id else None,
            model_creator=self.config.creator,
        )
        measured = series(self.inputs.results)
        return _written(
            data,
            "model.md.jinja",
            **self._common(measured),
            title=self.inputs.name,
            stage_table=stage_table(self.inputs.trained),
            notes=training_notes(self.inputs.trained),
            packing=packing_notes(self.inputs.trained),
            curves=[(stage.name, self.curves[stage.name]) for stage in self.inputs.trained],
            mixtures=mixtures(self.inputs.data),
            radars=list(self.radars),
            samples=[(self._labels[result.model], result) for result in self.inputs.results if result.samples],
            recipe=markdown.fence(_yaml(self.inputs.recipe), "yaml"),
        )

    def quantized(self) -> str:
        """Return the card of the quantized files."""
        variants, trained = self.inputs.quantized, bool(self.inputs.trained)
        base = self._base_id if not trained and self._base_id else self.config.repository
        data = self._data(
            base_model=base,
            tags=[
                "llamero",
                *(name.lower() for name in formats(variants)),
                *dict.fromkeys(f"{variant.bits}-bit" for variant in variants),
            ],
            base_model_relation="quantized" if base else None,
            model_creator=self.config.creator if trained else None,
            quantized_by=self.config.creator,
        )
        measured = series(self.inputs.results)
        beside = _of(measured, [v.name for v in variants], tasks=_BESIDE_FILES)
        others = [part for part in measured if part.task not in _BESIDE_FILES]
        final = (f"unquantized: {self._link(self.inputs.name, self.config.repository)}", self.inputs.final)
        directories = [variant for variant in variants if variant.layout in INSTALLED]
        on_grids = [variant for variant in directories if variant.layout != "bitsandbytes"]
        return _written(
            data,
            "quantized.md.jinja",
            **(self._common(measured) | self._scores(others)),
            title=f"{self.inputs.name} {', '.join(formats(variants))}",
            provided=provided_files(
                variants, beside, link=self._branch, original=(*final, self.shape.dtype, self.shape.size_bytes)
            ),
            beside=beside,
            notes={variant.name: variant.departures for variant in variants if variant.departures},
            methods={variant.method for variant in variants},
            calibrated=any(variant.calibrated for variant in variants),
            damped=any(variant.damp is not None for variant in variants),
            symmetric=[variant.name for variant in on_grids if variant.sym],
            asymmetric=[variant.name for variant in on_grids if not variant.sym],
            first=variants[0],
            for_transformers=directories[0] if directories else None,
            installed=INSTALLED,
            for_llamacpp=next((variant for variant in variants if variant.layout == "gguf"), None),
            looked_at=looked_at(),
            remarks=remarks(variants),
            variants_count=len(variants),
            picture=PICTURE if self.points else None,
            for_vllm=next((variant for variant in on_grids if VLLM in accepting(variant)), None),
        )

    @property
    def radars(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return MT-Bench's scores by category of every model that has them, by the file of the picture."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for part in series(self.inputs.results):
            models = {
                self.inputs.name if name == self.inputs.final else name: part.categories(result)
                for name, result in part.results.items()
            }
            if part.task == MT_BENCH and any(models.values()):
                found[f"mt-bench{'' if not found else f'-{len(found) + 1}'}.png"] = models
        return found

    @property
    def points(self) -> dict[str, list[Point]]:
        """Return size and KL of every variant, those that are not published as well, by the text it was measured on."""
        found: dict[str, list[Point]] = {}
        for part in series(self.inputs.results):
            if part.task == AGREEMENT:
                sizes = {variant.name: variant.size_bytes for variant in self.inputs.quantized}
                made = [Point(n, sizes[n], r.metrics["kl"], True) for n, r in part.results.items() if n in sizes]
                found.setdefault(_titled(part.text or "", part.number), []).extend(made)
        for variant in self.inputs.gate.withheld if self.inputs.gate else ():
            for text, kl in variant.kl.items():
                found.setdefault(text, []).append(Point(variant.name, variant.size_bytes, kl, False))
        return {text: points for text, points in found.items() if points}

    def _data(self, **own: Any) -> ModelCardData:
        config = self.config
        own["tags"] = [*own["tags"], *config.tags]
        return ModelCardData(
            license=config.license,
            language=config.languages or None,
            datasets=config.datasets or None,
            library_name="transformers",
            pipeline_tag="text-generation",
            model_name=self.inputs.name,
            model_type=self.shape.config.get("model_type"),
            prompt_template=None if self.prompt is None else self.prompt.text,
            **own,
        )

    def _eval_results(self) -> list[EvalResult]:
        """Return the final model's own results for the hub."""
        found: list[EvalResult] = []
        for part in series(self.inputs.results):
            if self.inputs.final not in part.results:
                continue
            task, dataset = PRINTED[part.task], PRINTED[part.task].dataset or part.text or part.task
            found += [
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=part.title,
                    dataset_config=None if part.number is None else f"measurement {part.number}",
                    dataset_args={"protocol": part.protocol},
                    metric_type=metric.key,
                    metric_name=metric.title,
                    metric_value=metric.value(part.results[self.inputs.final].metrics),
                )
                for metric in task.metrics
            ]
        return found

    def _common(self, measured: Sequence[Series]) -> dict[str, Any]:
        config = self.config
        return {
            "config": config,
            "inputs": self.inputs,
            "scratch": self.inputs.base == SCRATCH,
            "base_link": self._base_link,
            "shape": self.shape,
            "parameters": markdown.parameters(self.shape.parameters),
            "prompt": self.prompt,
            "prompt_block": None if self.prompt is None else markdown.fence(self.prompt.text),
            "model_link": self._link(self.inputs.name, config.repository),
            "quantized_link": self._link(self.quantized_name, self._quantized_repository),
            "quantized_repository": self._quantized_repository,
            "formats": formats(self.inputs.quantized),
            "load_name": self._load_name,
            "sampling": config.sampling.model_dump(exclude_none=True),
            "ancestry": ancestry_table(self.inputs),
            **self._scores(measured),
        }

    def _scores(self, measured: Sequence[Series]) -> dict[str, Any]:
        return {
            "measured": measured,
            "scores": score_table(measured, self._labels),
            "categories": category_tables(measured, self._labels),
        }


def _of(measured: Sequence[Series], models: Sequence[str], *, tasks: set[str]) -> list[Series]:
    return [part for part in measured if part.task in tasks and any(model in part.results for model in models)]


def _titled(text: str, number: int | None) -> str:
    return text if number is None else f"{text} ({number})"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110).strip()


def _written(data: ModelCardData, template: str, **values: Any) -> str:
    """Return a card, after reading its metadata back as the hub would."""
    body = _ENVIRONMENT.get_template(template).render(**values)
    text = f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"
    read = ModelCard(text).data.to_dict()
    if read != data.to_dict():
        raise ValueError(f"metadata change when they are read back: {data.to_dict()} became {read}")
    return text
