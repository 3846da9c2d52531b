"""train: a model and a tokenized mixture in, a trained Hugging Face directory out."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamero.core.errors import LlameroError
from llamero.corpus import megatron
from llamero.engine import resume
from llamero.engine.batches import Batches
from llamero.engine.loop import train
from llamero.engine.stage import StageConfig
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import DTYPES, load_model, save_model
from llamero.model.rope import Default
from llamero.parallel.config import ParallelConfig
from llamero.text.tokenizer import Tokenizer, load_tokenizer
from llamero.train.config import ShapeConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def run(
    stage: StageConfig,
    *,
    start: Path | ShapeConfig,
    data: Path,
    tokenizer: Path,
    parallel: ParallelConfig,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Train one stage and write its model; return what the card says of it.

    Args:
        stage: How.
        start: Directory of the model to start from, or the shape of a fresh one.
        data: Artifact of the mixture.
        tokenizer: Directory with the release's tokenizer files.
        parallel: Over what devices.
        seed: Decides fresh weights and the order of the data.
        out: Where the model, metrics.jsonl and (while it trains) the checkpoints go.
    """
    vocabulary = load_tokenizer(tokenizer)
    model = _model(start, vocabulary, seed=seed).to(device(parallel))
    if stage.sequence > model.config.max_position_embeddings:
        raise LlameroError(
            f"`sequence: {stage.sequence}` is longer than the model's context of "
            f"{model.config.max_position_embeddings} tokens",
            where=f"stage {stage.name}",
            fix="lower `sequence`",
        )
    batches = _batches(data, "train", stage, seed=seed)
    validation = _batches(data, "val", stage, seed=seed) if _has_validation(data) else None
    if stage.eval_every and validation is None:
        raise LlameroError(
            f"`eval_every: {stage.eval_every}` has nothing to measure on: the mixture has no validation samples",
            where=f"stage {stage.name}",
            fix="give a source `val_split`, or remove `eval_every`",
        )
    outcome = train(model, batches, stage, out, parallel=parallel, validation=validation)
    save_model(model, out, dtype=DTYPES[stage.export])
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)
    resume.remove(out / "checkpoints")
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "loss": outcome.loss,
        "validation_loss": outcome.validation_loss,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "packing": batches.report.to_json(),
    }


def device(parallel: ParallelConfig) -> torch.device:
    """Return the device to work on."""
    if parallel.device.startswith("cuda") and not torch.cuda.is_available():
        raise LlameroError("there is no CUDA device", where="parallel.device", fix="set it to `auto` or `cpu`")
    if parallel.device != "auto":
        return torch.device(parallel.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(data: Path, split: str, stage: StageConfig, *, seed: int) -> Batches:
    tokens, roles = megatron.Reader(data / f"{split}-text"), megatron.Reader(data / f"{split}-role")
    return Batches(tokens, roles, stage, seed=seed, where=f"{data.name}, {split}")


def _has_validation(data: Path) -> bool:
    return len(megatron.Reader(data / "val-text")) > 0


def _model(start: Path | ShapeConfig, tokenizer: Tokenizer, *, seed: int) -> Llama:
    if isinstance(start, ShapeConfig):
        model = Llama(fresh_config(start, tokenizer))
        initialize(model, seed=seed)
        return model
    model = load_model(start, dtype=torch.float32)
    return grow_vocabulary(model, len(tokenizer))


def fresh_config(shape: ShapeConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """Return the config of a fresh model.

    Raises:
        LlameroError: If the heads do not divide the width.
    """
    kv = shape.kv_heads or shape.heads
    if shape.hidden % (2 * shape.heads) or shape.heads % kv:
        raise LlameroError(
            f"hidden {shape.hidden} with {shape.heads} heads and {kv} key/value heads: the width must be a multiple "
            "of twice the heads, the heads of the key/value heads",
            where="base",
        )
    head_dim = shape.hidden // shape.heads
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        rope=Default(shape.theta, head_dim),
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        carried={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
    )


def grow_vocabulary(model: Llama, size: int) -> Llama:
    """Return the model with at least `size` embedding rows; new rows start at the mean of the old ones."""
    old = model.config.vocab_size
    if size <= old:
        return model
    larger = Llama(replace(model.config, vocab_size=size))
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if parameter.shape == stored[name].shape:
                parameter.copy_(stored[name])
            else:
                parameter[:old] = stored[name]
                parameter[old:] = stored[name].mean(0)
    return larger
