"""train: a model and a tokenized mixture in, a trained Hugging Face directory out."""

import logging
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamero.checkpoint import bitsandbytes, packed, peft
from llamero.checkpoint.hf import Spec, read_json, write_tensors
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Dataset
from llamero.engine import resume
from llamero.engine.batches import Batches
from llamero.engine.curves import loss_curve
from llamero.engine.loop import autocast, train
from llamero.engine.stage import StageConfig
from llamero.model.adapter_files import describe, stream_adapter
from llamero.model.adapters import attach, trainable
from llamero.model.config import LlamaConfig
from llamero.model.linear import shells
from llamero.model.llama import Llama
from llamero.model.load import (
    DTYPES,
    EMBEDDING,
    HEAD,
    empty_model,
    load_config,
    make_room_for_codes,
    write_config,
)
from llamero.model.rope import Default
from llamero.model.weights import Adapted, Fresh, Grown, Held, NewRows, Stored, Weights, everything
from llamero.parallel.adapted import plain_specs
from llamero.parallel.config import ParallelConfig
from llamero.parallel.spread import Spread
from llamero.parallel.world import World
from llamero.parallel.world import device as device_of
from llamero.text.tokenizer import Tokenizer, load_tokenizer
from llamero.train.config import ShapeConfig
from llamero.train.probe import probe_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SUMMARY = "training.json"
"""Says that a stage is trained and exported, and what the card says of it."""
SECONDS_BETWEEN_PICTURES = 60.0
log = logging.getLogger(__name__)


def run(  # noqa: PLR0913  (all that a stage is made of)
    stage: StageConfig,
    *,
    start: Path | ShapeConfig,
    data: Path,
    tokenizer: Path,
    parallel: ParallelConfig,
    seed: int,
    out: Path,
    new_rows: NewRows = "mean",
    hub_name: str | None = None,
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
        new_rows: Where the rows of tokens start that the model to start from does not have.
        hub_name: What the model to start from is called on the hub, if it is there: an adapter names it as its base.
    """
    world = World(parallel)
    decided = files.digest({"stage": stage.decides(), "seed": seed})
    if (finished := _finished(out, decided, world)) is not None:
        return finished
    with world.together():
        vocabulary = load_tokenizer(tokenizer)
        model, weights, new = _model(stage, start, vocabulary, seed=seed, new_rows=new_rows, parallel=parallel)
        batches, validation = _data(data, stage, context=model.config.max_position_embeddings, seed=seed)
        probe = probe_of(stage, model, vocabulary)
    config, parameters = model.config, sum(math.prod(spec.shape) for spec in plain_specs(model).values())
    _refuse_unknown_tokens(data, config.vocab_size, world)
    adapter = None
    if stage.adapter is not None:
        adapter = describe(model, stage.adapter, base=hub_name or str(start))
    trained = sum(parameter.numel() for parameter in trainable(model))
    picture = _Picture(stage, out)

    def export(spread: Spread) -> None:
        if adapter is not None:
            save_spread_adapter(spread, adapter, out / "adapter")
        save_spread(spread, out, dtype=DTYPES[stage.export])
        if spread.world.speaks:
            picture.draw()
            for place in (out, out / "adapter")[: 1 + (adapter is not None)]:
                _copy_tokenizer(tokenizer, place)
        spread.world.barrier()

    before = start if isinstance(start, Path) else None
    outcome = train(
        model,
        batches,
        stage,
        out,
        parallel=parallel,
        validation=validation,
        seed=seed,
        start=before,
        export=export,
        weights=weights,
        world=world,
        probe=probe,
        saved=picture.draw_now_and_then,
    )
    summary = {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "exported_step": outcome.exported_step,
        "loss": outcome.loss,
        "validation_loss": outcome.validation_loss,
        "validation_accuracy": outcome.validation_accuracy,
        "batch_rows": batches.batch,
        "parameters": parameters,
        "trained_parameters": trained,
        "vocabulary": {
            "tokens": len(vocabulary),
            "rows": config.vocab_size,
            "new": new,
            "new_rows": new_rows,
        },
        "packing": batches.report.to_json(),
    }
    if world.speaks:
        files.sync(out)
        files.write_json(out / SUMMARY, {"decided": decided, "summary": summary})
        resume.remove(out / "checkpoints")
    return summary


def _finished(out: Path, decided: str, world: World) -> dict[str, Any] | None:
    """Return the summary of a stage that a run finished just before it was cut off."""
    path = out / SUMMARY
    about = world.told(read_json(path) if world.speaks and path.exists() else {})
    if about.get("decided") != decided:
        return None
    if world.speaks:
        resume.remove(out / "checkpoints")
    return about["summary"]


class _Picture:
    """The curves of a stage, drawn where it trains."""

    def __init__(self, stage: StageConfig, out: Path) -> None:
        self._title, self._out, self._drawn = f"stage {stage.name}", out, time.monotonic()

    def draw_now_and_then(self) -> None:
        """Draw, once a minute at most; a full disk is said and ends nothing."""
        if time.monotonic() - self._drawn < SECONDS_BETWEEN_PICTURES:
            return
        try:
            self.draw()
        except OSError as error:
            log.warning("the curves of %s could not be drawn: %s", self._title, error)
        self._drawn = time.monotonic()

    def draw(self) -> None:
        """Draw."""
        loss_curve(self._out / "metrics.jsonl", self._out / "loss.png", self._title)


def _copy_tokenizer(tokenizer: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)


def save_spread(spread: Spread, directory: Path, *, dtype: torch.dtype) -> None:
    """Write config.json and the weights of a model that is spread over processes; every one of them takes part.

    The first process writes tensor by tensor, and holds one whole tensor at a time. An adapter is merged on the way:
    its update is added to the weight in float32, and the sum rounded once.
    """
    tensors = ((name, tensor.detach().to(dtype)) for name, tensor in spread.plain())
    if not spread.world.speaks:
        return _take_part(tensors)
    specs = {name: Spec(spec.shape, dtype) for name, spec in spread.plain_specs.items()}
    write_tensors(directory, specs, tensors)
    write_config(spread.config, directory, dtype=dtype)


def save_spread_adapter(spread: Spread, said: peft.Adapter, directory: Path) -> None:
    """Write the adapter of a model that is spread over processes in PEFT's layout; every one of them takes part.

    Args:
        spread: The model.
        said: What `describe` said of its adapter.
        directory: Where to.
    """
    tensors = spread.whole(trained=True)
    if not spread.world.speaks:
        return _take_part(tensors)
    specs = {name: spec for name, spec in spread.specs.items() if name in spread.trained}
    stream_adapter(directory, said, specs, tensors)


def _take_part(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for _ in tensors:
        raise AssertionError("only the first process gets whole tensors")


def _data(data: Path, stage: StageConfig, *, context: int, seed: int) -> tuple[Batches, Batches | None]:
    """Return what a stage learns from, and what it is measured on if its mixture has that."""
    if stage.sequence > context:
        raise LlameroError(
            f"`sequence: {stage.sequence}` is longer than the model's context of {context} tokens",
            where=f"stage {stage.name}",
            fix="lower `sequence`",
        )
    batches = _batches(data, "train", stage, seed=seed)
    batches.refuse_short()
    validation = _batches(data, "val", stage, seed=seed) if _has_validation(data) else None
    if stage.eval_every and validation is None:
        raise LlameroError(
            f"`eval_every: {stage.eval_every}` has nothing to measure on: the mixture has no validation samples",
            where=f"stage {stage.name}",
            fix="give a source `val_split`, or remove `eval_every`",
        )
    return batches, validation


def _batches(data: Path, split: str, stage: StageConfig, *, seed: int) -> Batches:
    dataset = Dataset(data)
    tokens, roles = dataset.tokens(split), dataset.roles(split)
    if roles is None:
        raise LlameroError("the dataset has no roles, so nobody knows what is to be learned", where=data)
    if split != "train":
        stage = stage.model_copy(update={"batch_samples": None})  # nothing is learned here, so rows may be full
    where = f"{data.name}, {split}"
    return Batches(tokens, roles, stage, seed=seed, where=where, sources=dataset.sources(split))


def _refuse_unknown_tokens(data: Path, size: int, world: World) -> None:
    """Refuse data that another tokenizer made, as far as its numbers show it; each process reads a share."""
    dataset = Dataset(data)
    for split in dataset.splits:
        flat = dataset.tokens(split).flat
        mine = range(len(flat) * world.rank // world.size, len(flat) * (world.rank + 1) // world.size)
        block = 1 << 22
        tops = [int(flat[start : min(start + block, mine.stop)].max()) for start in mine[::block]]
        top = max(world.gather(max(tops, default=0)))
        if top >= size:
            raise LlameroError(
                f"token {top} stands in the data, and the model knows {size}: they are not of one tokenizer",
                where=f"{data}, {split}",
                fix="tokenize the data again with the tokenizer of this release",
            )


def _has_validation(data: Path) -> bool:
    dataset = Dataset(data)
    return "val" in dataset.splits and len(dataset.tokens("val")) > 0


def _model(
    stage: StageConfig,
    start: Path | ShapeConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    new_rows: NewRows,
    parallel: ParallelConfig,
) -> tuple[Llama, Weights | None, int]:
    """Return the model to train, what it is to be filled with, and how many rows of its vocabulary are new."""
    where = f"stage {stage.name}"
    if isinstance(start, ShapeConfig):
        if stage.adapter is not None:
            raise LlameroError("an adapter needs a trained model to start from", where=where, fix="remove `adapter`")
        model = empty_model(fresh_config(start, tokenizer))
        return model, Fresh(model, seed), len(tokenizer)
    known = _known(load_tokenizer(start), tokenizer, where=start)
    model, weights, new = _stored(start, len(tokenizer), known=known, new_rows=new_rows, stage=stage)
    if stage.adapter is None:
        return model, weights, new
    # frozen weights rest in the precision that they are used in; those that are trained in float32
    half = autocast(stage, device_of(parallel)) is not None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
    encoded = [] if stage.adapter.base is None else shells(model, stage.adapter.base)
    attach(model, stage.adapter, seed=seed, grown=new > 0)
    return model, Adapted(weights, model, stage.adapter, seed=seed, encoded=encoded), new


def _known(old: Tokenizer, tokenizer: Tokenizer, *, where: Path) -> int:
    """Return how many tokens a model knows by its own tokenizer; the release's must call them the same."""
    for number in range(min(len(old), len(tokenizer))):
        one, other = old.backend.id_to_token(number), tokenizer.backend.id_to_token(number)
        if one is not None and one != other:
            raise LlameroError(
                f"token {number} is `{one}` to the model and `{other}` to the release: not one tokenizer",
                where=where,
                fix="start from a model whose tokenizer is that of the release, or of its `base`",
            )
    return len(old)


def _stored(start: Path, size: int, *, known: int, new_rows: NewRows, stage: StageConfig) -> tuple[Llama, Weights, int]:
    """Return a model on the meta device that knows `size` tokens, and what it is to be filled with."""
    where = f"stage {stage.name}"
    if peft.is_adapter(start):
        raise LlameroError(f"`{start}` is an adapter, no model", where=where, fix="start from the merged model")
    layout = packed.read_format(start)
    if layout is not None and stage.adapter is None:
        raise LlameroError("a packed model cannot be trained itself", where=where, fix="give the stage an `adapter`")
    if isinstance(layout, bitsandbytes.Format):
        raise LlameroError(
            "a stage does not start from bitsandbytes files",
            where=where,
            fix="start from the model that they were made of, with `base: nf4-double` in its `adapter`",
        )
    tensors, config = packed.open_tensors(start, layout), load_config(start)

    def empty(rows: int) -> Llama:
        model = empty_model(replace(config, vocab_size=rows))
        if layout is not None:
            make_room_for_codes(model, tensors, layout)
        return model

    rows = config.vocab_size
    model, known = empty(rows), min(known, rows)
    weights = Stored(model, tensors)
    if size <= known:
        return model, weights, 0
    grown = Grown(weights, rows, config.hidden_size, known, size, new_rows)
    return empty(max(rows, size)), grown, size - known


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


def grow_vocabulary(model: Llama, size: int, *, known: int, new_rows: NewRows = "mean") -> int:
    """Give a model in memory rows for `size` tokens, in its embedding and, where it is not tied, in its head (`Grown`).

    Args:
        model: Changed in place.
        size: Tokens it has to know.
        known: Tokens it knows already: those of its own tokenizer, whose rows have learned something.
        new_rows: Start at the `mean` of the known rows, or as a copy of the last of them (`copy_last`).

    Returns:
        How many rows are new.
    """
    rows, width = model.config.vocab_size, model.config.hidden_size
    known = min(known, rows)
    if size <= known:
        return 0
    grown, shape = Grown(Held(model), rows, width, known, size, new_rows), (max(rows, size), width)
    layers: dict[str, nn.Embedding | nn.Linear] = {EMBEDDING: model.model.embed_tokens}
    if not model.config.tie_word_embeddings:
        layers[HEAD] = model.lm_head
    for name, layer in layers.items():
        layer.weight = nn.Parameter(grown.part(name, everything(shape)).to(layer.weight.dtype))
    model.config = replace(model.config, vocab_size=shape[0])
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = shape[0]
    model.tie()
    return size - known
