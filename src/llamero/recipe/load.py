"""A recipe from its file: mixtures composed, overrides applied, checked, and every error at its line."""

from __future__ import annotations

import re
import types
import typing
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from llamero.core.errors import LlameroError, did_you_mean
from llamero.data.config import MixtureConfig
from llamero.recipe import compose, lines
from llamero.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a file.

    Args:
        path: YAML file.
        overrides: `key.key=value`; a list item goes by its number or its name (`train.sft.lr=1e-5`).
    """
    node = compose.resolve(lines.read(path), path)
    value = lines.value(node)
    for override in overrides:
        _apply(value, override)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise _explain(error, node, value) from error


def _apply(value: Any, override: str) -> None:
    place, equals, text = override.partition("=")
    if not equals or not place:
        raise LlameroError(f"`--set {override}` is not key=value", fix="write for example --set train.sft.lr=1e-5")
    *path, last = place.split(".")
    if last == compose.EXTENDS:
        raise LlameroError(f"`--set {override}`: what a mixture extends stands in its recipe", fix="change the recipe")
    for key in path:
        value = _step(value, key, override)
    if isinstance(value, list):
        value[_index(value, last, override)] = _value(text, override)
    elif isinstance(value, dict):
        value[last] = _value(text, override)
    else:
        raise LlameroError(f"`--set {override}`: there is nothing below `{'.'.join(path)}`")


def _value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LlameroError(f"`--set {override}`: the value is not YAML", fix="quote it") from error


def _step(value: Any, key: str, override: str) -> Any:
    if isinstance(value, list):
        return value[_index(value, key, override)]
    if not isinstance(value, dict) or not isinstance(value.get(key, {}), dict | list):
        raise LlameroError(f"`--set {override}`: there is nothing below `{key}`")
    return value.setdefault(key, {})


def _index(items: list[Any], key: str, override: str) -> int:
    """Return the place of a list item that is given by number or name."""
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [
        str(item.get("name", item.get("source", item.get("tasks")))) if isinstance(item, dict) else item
        for item in items
    ]
    if key in names:
        return names.index(key)
    raise LlameroError(f"`--set {override}`: no item `{key}`", fix=did_you_mean(key, names))


def _explain(error: ValidationError, node: yaml.Node, value: Any) -> LlameroError:
    """Return the first problem with its line, key, value and way out, and how many there are."""
    problems = error.errors(include_url=False)
    # a mistyped key makes two errors, of which "missing" says less
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    context = first.get("ctx", {})
    place: tuple[str | int, ...] = context.get("place", first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    got = "" if isinstance(first["input"], dict | list | BaseModel) else f" (got {first['input']!r})"
    fix: str | None = context.get("fix")
    if first["type"] == "extra_forbidden":
        text, fix = "unknown key", _nearest_key(place)
    elif first["type"] == "union_tag_invalid":
        text = f"unknown {context['discriminator']} `{context['tag']}`"
        fix = did_you_mean(context["tag"], [name.strip(" '") for name in context["expected_tags"].split(",")])
    elif first["type"] == "literal_error":
        fix = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", context["expected"]))
    elif first["type"] == "model_type":
        text = f"expected keys and their values: {', '.join(_keys_at(place))}"
    elif first["type"] == "union_tag_not_found":
        text, got, fix = f"{context['discriminator']} is missing", "", f"add {context['discriminator']}"
    elif first["type"] == "missing" and place:
        fix = f"add `{place[-1]}`"
    if fix is None and place and re.search("_type$|_parsing$|_mismatch$", first["type"]):
        fix = _meaning(place)
    key = ".".join(_keys(place, value)) or "recipe"
    more = f"; {len(problems) - 1} more" if len(problems) > 1 else ""
    return LlameroError(f"{key}: {text}{got}{more}", where=lines.find(node, place), fix=fix)


_KINDS = {"Model", "ScratchConfig", "FileSource", "ToyWorldSource"}
"""Names of kinds that pydantic puts into a location."""


def _keys(place: Sequence[Any], value: Any) -> list[str]:
    """Return the parts of a location that are the file's own keys; the schema adds the names of kinds."""
    keys: list[str] = []
    for number, part in enumerate(place):
        if (isinstance(value, list) and isinstance(part, int)) or (isinstance(value, dict) and part in value):
            value = value[part]
        elif number != len(place) - 1 or part in _KINDS:  # the last is the key in question, there or not
            continue
        keys.append(str(part))
    return keys


_ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "train_iters": "steps",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_length": "sequence",
    "max_seq_length": "sequence",
    "seq_length": "sequence",
    "seq_len": "sequence",
    "warmup_steps": "warmup",
    "lr_warmup_iters": "warmup",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "batch_size": "batch",
    "global_batch_size": "batch_samples",
    "per_device_train_batch_size": "parallel.micro_batch",
    "micro_batch_size": "parallel.micro_batch",
    "gradient_accumulation_steps": "batch",
    "max_grad_norm": "clip",
    "clip_grad": "clip",
    "adam_epsilon": "eps",
    "adam_eps": "eps",
    "bf16": "precision",
    "gradient_checkpointing": "parallel.recompute",
    "activation_checkpointing": "parallel.recompute",
    "eval_steps": "eval_every",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
    "save_interval": "save_every",
    "save_total_limit": "keep",
    "lora": "adapter",
    "hidden_dropout": "dropout",
    "tp": "tensor",
    "tensor_parallel": "tensor",
    "tensor_model_parallel_size": "tensor",
    "pp": "pipeline",
    "pipeline_parallel": "pipeline",
    "pipeline_model_parallel_size": "pipeline",
    "dp": "replicate",
    "data_parallel": "replicate",
    "fsdp": "shard",
    "zero_stage": "zero",
    "num_gpus": "gpus",
    "nproc_per_node": "gpus",
    "world_size": "gpus",
}
"""What other trainers call a key of a stage or of `parallel:`."""


def _keys_at(place: tuple[str | int, ...]) -> list[str]:
    return sorted({name for model in _models_at(Recipe, place) for name in model.model_fields})


def _meaning(place: tuple[str | int, ...]) -> str | None:
    """Return what a key means, as its documentation has it."""
    *around, last = place
    for model in _models_at(Recipe, tuple(around)):
        field = model.model_fields.get(str(last))
        if field is not None and field.description:
            return f"`{last}`: {' '.join(field.description.split())}"
    return None


def _nearest_key(place: tuple[str | int, ...]) -> str:
    *around, last = place
    models = list(_models_at(Recipe, tuple(around)))
    ours = _ELSEWHERE.get(str(last).lower().replace("-", "_"), "")
    if ours and any(ours in model.model_fields or ours.startswith("parallel.") for model in models):
        return f"it is called `{ours}` here"
    fitting = [model for model in models if around and _tag_fits(model, around[-1])]
    known = {name for model in fitting or models for name in model.model_fields}
    known |= {compose.EXTENDS} if MixtureConfig in models else set()
    return did_you_mean(str(last), known) if known else "remove it"


def _tag_fits(model: type[BaseModel], tag: str | int) -> bool:
    return any(tag in typing.get_args(field.annotation) for field in model.model_fields.values())


def _models_at(annotation: Any, place: tuple[str | int, ...]) -> Iterator[type[BaseModel]]:
    """Yield the models that may stand at a location of the recipe."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not place:
            yield annotation
            return
        field = annotation.model_fields.get(str(place[0]))
        if field is not None:
            yield from _models_at(field.annotation, place[1:])
        else:
            yield from _models_at(annotation, place[1:])  # the name of a kind
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in arguments:
            yield from _models_at(argument, place)
    elif arguments and place:
        for argument in arguments[-1:]:
            yield from _models_at(argument, place[1:])


def models_within(annotation: Any) -> set[type[BaseModel]]:
    """Return every config class that a recipe is made of; the reference page and its test walk them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.values()
        return {annotation}.union(*(models_within(field.annotation) for field in fields))
    return set[type[BaseModel]]().union(*(models_within(argument) for argument in typing.get_args(annotation)))
