"""Whether a recipe fits the model that it starts from: what can be known before the first step is refused here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamero.core import gguf
from llamero.core.errors import LlameroError
from llamero.evaluate.config import PerplexityTask, WikitextTask
from llamero.parallel.layout import refuse_impossible
from llamero.quantize.variants import fitting, refuse_misfits
from llamero.recipe.schema import ScratchConfig
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from llamero.recipe.schema import Recipe


@dataclass(frozen=True)
class Base:
    """What must be known of the base."""

    context: int
    """Tokens of its longest sequence."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def widths(self) -> set[tuple[int, int]]:
        """Return input and output channels of its linear layers."""
        hidden, inner, heads = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        attention = {(hidden, heads), (hidden, self.num_kv_heads * self.head_dim), (heads, hidden)}
        return attention | {(hidden, inner), (inner, hidden)}


def refuse_what_does_not_fit(recipe: Recipe, directory: Path | None) -> None:
    """Refuse lengths beyond the context, groups that divide no width, impossible layouts, and tokens that are missing
    or cannot be added.

    Args:
        recipe: The recipe.
        directory: Of the base; `None` if it does not exist yet.
    """
    in_gguf = None if directory is None else gguf.find(directory)
    if in_gguf is not None and (recipe.train or recipe.quantize is not None):
        raise LlameroError(
            f"the base is a model in GGUF ({in_gguf.name}); training and quantizing need a Hugging Face directory",
            where="base",
            fix=f"llamero convert {in_gguf} DIRECTORY --to hf",
        )
    base = _from_shape(recipe.base) if isinstance(recipe.base, ScratchConfig) else _from_directory(directory)
    if base is not None:
        _refuse_long(recipe, base)
        _refuse_groups(recipe, base)
        for stage in recipe.train:
            refuse_impossible(recipe.parallel, base, batch=stage.batch)
    _refuse_missing_tokens(recipe, directory)
    if directory is not None and recipe.data.extra_tokens:
        from llamero.data.vocabulary import refuse_unfit_tokens  # and with it all that reads data

        refuse_unfit_tokens(recipe.data.extra_tokens, load_tokenizer(directory))


def without_misfits(recipe: Recipe, directory: Path | None) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe without those of the default variants that the base cannot become, and why it cannot.

    Variants that the recipe names are left alone: `refuse_what_does_not_fit` speaks of them.

    Args:
        recipe: The recipe.
        directory: Of the base; `None` if it does not exist yet.
    """
    base = _from_shape(recipe.base) if isinstance(recipe.base, ScratchConfig) else _from_directory(directory)
    config = recipe.quantize
    if base is None or config is None or "variants" in config.model_fields_set:
        return recipe, {}
    if directory is None:
        kept, left = fitting(config.parsed(), base.widths)
        if not kept:
            refuse_misfits(config.parsed(), base.widths, where="quantize.variants")
    else:
        from llamero.model.load import load_config
        from llamero.quantize.choose import choose  # and with it all that quantizes

        kept, left = choose(config, load_config(directory), source=directory, where="quantize.variants")
    named = {model for task in recipe.evaluate for model in task.models} & left.keys()
    if named:
        name = min(named)
        raise LlameroError(f"`{name}` cannot be made: {left[name]}", where="evaluate", fix="measure another model")
    fewer = config.model_copy(update={"variants": tuple(variant.name for variant in kept)})
    return recipe.model_copy(update={"quantize": fewer}), left


def _from_shape(base: ScratchConfig) -> Base:
    shape = base.shape
    kv_heads = shape.kv_heads or shape.heads
    if shape.hidden % (2 * shape.heads) or shape.heads % kv_heads:
        raise LlameroError(
            f"hidden {shape.hidden} with {shape.heads} heads and {kv_heads} key/value heads",
            where="base.shape",
            fix="the width must be a multiple of twice the heads, the heads of the key/value heads",
        )
    return Base(
        context=shape.context,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=base.vocabulary.size,
    )


def _from_directory(directory: Path | None) -> Base | None:
    """Return what config.json says; a file that says less is refused where the model is loaded, with its reasons."""
    if directory is None or not (directory / "config.json").is_file():
        return None
    said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    keys = ("max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if not isinstance(said, dict) or not all(isinstance(said.get(key), int) for key in (*keys, "vocab_size")):
        return None
    context, hidden, inner, layers, heads = (said[key] for key in keys)
    kv_heads, head_dim = said.get("num_key_value_heads"), said.get("head_dim")
    return Base(
        context=context,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads if isinstance(kv_heads, int) else heads,
        head_dim=head_dim if isinstance(head_dim, int) else hidden // heads,
        vocab_size=said["vocab_size"],
    )


def _refuse_long(recipe: Recipe, base: Base) -> None:
    lengths = {f"train.{stage.name}.sequence": stage.sequence for stage in recipe.train}
    if recipe.quantize is not None:
        lengths["quantize.calibration.sequence"] = recipe.quantize.calibration.sequence
        if recipe.quantize.measure is not None:
            lengths["quantize.measure.window"] = recipe.quantize.measure.sight(base.context)[0]
    for number, task in enumerate(recipe.evaluate):
        if isinstance(task, PerplexityTask) and task.texts:
            lengths[f"evaluate.{number}.window"] = task.window
        if isinstance(task, WikitextTask) and task.max_length is not None:
            lengths[f"evaluate.{number}.max_length"] = task.max_length
    for key, length in lengths.items():
        if length > base.context:
            raise LlameroError(
                f"{length} tokens are more than the model's context of {base.context}", where=key, fix="lower it"
            )


def _refuse_groups(recipe: Recipe, base: Base) -> None:
    if recipe.quantize is not None:
        refuse_misfits(recipe.quantize.parsed(), base.widths, where="quantize.variants")


def _refuse_missing_tokens(recipe: Recipe, directory: Path | None) -> None:
    if recipe.template == "auto":
        return
    missing = [token for token in TEMPLATES[recipe.template].special if token not in recipe.data.extra_tokens]
    if missing and directory is not None:
        tokenizer = load_tokenizer(directory)
        missing = [token for token in missing if tokenizer.id(token) is None]
    if missing:
        raise LlameroError(
            f"template {recipe.template} needs the tokens {', '.join(missing)}, which the vocabulary does not have",
            where="template",
            fix=f"add them: data.extra_tokens: {json.dumps(missing)}",
        )
