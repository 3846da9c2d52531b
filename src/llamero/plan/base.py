"""The shape of the model that a recipe starts from, without its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llamero.core.download import resolve_model
from llamero.core.errors import LlameroError
from llamero.model.adapters import attach, trainable
from llamero.model.config import LlamaConfig, from_hf
from llamero.model.llama import Llama
from llamero.model.load import load_config
from llamero.plan import known
from llamero.recipe.schema import Recipe, ScratchConfig

if TYPE_CHECKING:
    from pathlib import Path

    from llamero.engine.stage import StageConfig


def base_config(recipe: Recipe, root: Path) -> tuple[LlamaConfig, str]:
    """Return the shape of a recipe's base, and where it is known from.

    Looks for a directory, then on the hub, then in the table of published shapes (`known`).

    Args:
        recipe: The recipe.
        root: Directory that its relative paths start from.

    Raises:
        LlameroError: If none of them has it.
    """
    if isinstance(recipe.base, ScratchConfig):
        shape, size = recipe.base.shape, recipe.base.vocabulary.size
        keys = {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": size,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads or shape.heads,
            "max_position_embeddings": shape.context,
            "rope_theta": shape.theta,
            "tie_word_embeddings": shape.tied,
        }
        return from_hf(keys, where="base.shape"), "the recipe's shape"
    local = root / recipe.base
    if local.exists():
        return load_config(local), str(local)
    try:
        directory = resolve_model(recipe.base, weights=False)
        if directory.is_dir() and not (directory / "config.json").is_file():
            raise LlameroError("no config.json", where=recipe.base)
        return load_config(directory), f"config.json of {recipe.base}"
    except LlameroError as error:
        name = known.find(recipe.base)
        if name is None:
            shapes = ", ".join(known.SHAPES)
            fix = f"{error.fix or 'give a directory'}; or name a published shape ({shapes}) with --set base=NAME"
            raise LlameroError(error.problem, where=error.where, fix=fix) from error
        return known.config_of(name), f"the table of published shapes, {name}: {recipe.base} is {error.problem}"


def trained_config(config: LlamaConfig, recipe: Recipe) -> LlamaConfig:
    """Return the shape with rows for the recipe's extra tokens, all of them taken to be new.

    Args:
        config: Of the base.
        recipe: The recipe.
    """
    if isinstance(recipe.base, ScratchConfig):
        return config
    return replace(config, vocab_size=config.vocab_size + len(recipe.data.extra_tokens))


def parameters(config: LlamaConfig, stage: StageConfig | None = None) -> tuple[int, int]:
    """Return how many parameters a model has, those of an adapter included, and how many of them a stage trains.

    Args:
        config: The model.
        stage: The stage; all are trained where it has no adapter.
    """
    with torch.device("meta"):
        model = Llama(config)
        whole = sum(parameter.numel() for parameter in model.parameters())
        if stage is None or stage.adapter is None:
            return whole, whole
        attach(model, stage.adapter, seed=0)
        trained = sum(parameter.numel() for parameter in trainable(model))
        return whole + trained, trained
