"""Adapters on disk: what a model's is written as, and a model that takes one up."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llamero.checkpoint import hf, peft
from llamero.core.download import resolve_model, split_name
from llamero.core.errors import LlameroError
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import EMBEDDING, HEAD, Linear, linears, updates, wrap
from llamero.model.llama import Llama

_EMBEDDING, _HEAD = f"{EMBEDDING}.weight", f"{HEAD}.weight"


def save_adapter(model: Llama, config: AdapterConfig, directory: Path, *, base: str) -> None:
    """Write a model's adapter in PEFT's layout.

    Args:
        model: With its adapter attached.
        config: What it was attached by.
        directory: Where to.
        base: Directory or hub name (`owner/name[:revision]`) of the model without it.
    """
    said = describe(model, config, base=base)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    specs = {name: hf.Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    stream_adapter(directory, said, specs, tensors.items())


def describe(model: Llama, config: AdapterConfig, *, base: str) -> peft.Adapter:
    """Return what the adapter_config.json of a model with an adapter says; it may be without storage.

    Args:
        model: With its adapter attached.
        config: What it was attached by.
        base: Directory or hub name (`owner/name[:revision]`) of the model without it.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tied = model.config.tie_word_embeddings and _EMBEDDING in trained
    if tied:  # PEFT keeps two copies
        trained.add(_HEAD)
    whole = {name.rpartition(".")[0] for name in trained if not name.endswith(peft.FACTORS)}
    name, revision = split_name(base)
    return peft.Adapter(
        base=name,
        rank=config.lora,
        alpha=config.stated_alpha,
        targets=_targets(model),
        rslora=config.rslora,
        dropout=config.dropout,
        # whole names but for the unmistakable: PEFT takes the `norm` of `input_layernorm` for a `norm`
        modules_to_save=tuple(sorted("embed_tokens" if name == EMBEDDING else name for name in whole)),
        gaussian=config.init == "gaussian",
        tied=tied,
        revision=revision,
    )


def stream_adapter(
    directory: Path, said: peft.Adapter, specs: Mapping[str, hf.Spec], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write an adapter in PEFT's layout whose parameters come one at a time.

    Args:
        directory: Where to.
        said: What `describe` said of it.
        specs: Of the parameters that are trained.
        tensors: They, in the same order.
    """

    def both() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensors:
            yield name, value
            if said.tied and name == _EMBEDDING:
                yield _HEAD, value

    stored: dict[str, hf.Spec] = {}
    for name, spec in specs.items():
        stored[name] = spec
        if said.tied and name == _EMBEDDING:
            stored[_HEAD] = spec
    peft.stream(directory, said, stored, both())


def _targets(model: Llama) -> tuple[str, ...]:
    """Return the ends of the names of all layers with an update; whole names if others end like one of them."""
    names = sorted(updates(model))
    ends = {name.rpartition(".")[2] for name in names}
    others = (name for name, module in model.named_modules() if isinstance(module, Linear))
    return tuple(names if any(name.rpartition(".")[2] in ends for name in others) else sorted(ends))


def base_of(directory: Path) -> Path:
    """Return the directory of the model that an adapter belongs to, downloaded if need be."""
    about = peft.read(directory)
    said = about.base
    if not said:
        raise LlameroError(
            "the adapter does not say which model it belongs to",
            where=directory / peft.CONFIG,
            fix="set `base_model_name_or_path`",
        )
    beside = directory / said
    if said.startswith(".") and beside.exists():
        base = beside
    else:
        base = resolve_model(f"{said}:{about.revision}" if about.revision else said)
    if peft.is_adapter(base):
        raise LlameroError(f"the adapter's base `{said}` is an adapter itself", where=directory / peft.CONFIG)
    return base


@torch.no_grad()
def load_adapter(model: Llama, directory: Path, *, base: str | None = None) -> list[nn.Parameter]:
    """Put an adapter in PEFT's layout beside the layers of its base, and return its parameters.

    Modules that were trained whole take the place of the base's, in its dtype. The vocabulary grows if the adapter has
    rows for more tokens.

    Args:
        model: The base, packed or not; changed in place.
        directory: Of the adapter.
        base: Name of the model, if it is known: a warning says so if the adapter names another one.

    Raises:
        LlameroError: The adapter does not fit the model; the model is then as it was.
    """
    said, files = peft.read(directory), peft.open_tensors(directory)
    if base is not None and said.base and Path(base).name != Path(said.base).name:
        warnings.warn(f"{directory}: the adapter belongs to `{said.base}`, it is put on `{base}`", stacklevel=2)
    stored = {name.removeprefix(peft.PREFIX).replace(".base_layer.", "."): name for name in files}
    whole = _check(model, said, files, stored)
    _make_room(model, {name: files[stored[name]] for name in (_EMBEDDING, _HEAD) if name in whole}, tied=said.tied)
    for name in whole:
        model.get_parameter(name).copy_(files[stored[name]])
    owners = {name.rpartition(".")[0] for name in whole}
    trained = wrap(model, said, sorted(name for name in owners if not said.covers(name)))
    for name in stored:
        if name.endswith(peft.FACTORS):
            model.get_parameter(name).copy_(files[stored[name]])
    return trained


def _check(model: Llama, said: peft.Adapter, files: hf.Tensors, stored: Mapping[str, str]) -> list[str]:
    """Refuse an adapter that is not whole or not this model's; return the parameters that it replaces."""
    shapes = {
        f"{name}.{factor}": shape
        for name, layer in linears(model).items()
        if said.covers(name)
        for factor, shape in zip(
            peft.FACTORS, ((said.rank, layer.in_features), (layer.out_features, said.rank)), strict=True
        )
    }
    if not shapes:
        raise LlameroError(f"the model has no layer of {said.targets}", where=files.directory / peft.CONFIG)
    known = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    whole = [name for name in stored if name not in shapes]
    wanted = [name for name in known if name.rpartition(".")[0].endswith(said.modules_to_save)]
    if model.config.tie_word_embeddings and said.tied and {_EMBEDDING, _HEAD} & set(stored):
        wanted = [name for name in wanted if name not in (_EMBEDDING, _HEAD)]  # one stands for both
    missing = sorted(name for name in [*shapes, *wanted] if name not in stored)
    if missing:
        raise LlameroError(f"tensor `{peft.PREFIX}{missing[0]}` is missing ({len(missing)} are)", where=files.directory)
    rows = _rows(model, files, stored, tied=said.tied)
    for name, source in stored.items():
        if name not in shapes and name not in known:
            raise LlameroError(f"tensor `{source}` has no place in this model", where=files.files[source])
        shape, expected = files.specs[source].shape, shapes.get(name) or known[name]
        if name in (_EMBEDDING, _HEAD):
            expected = (max(expected[0], rows), *expected[1:])
        if shape != expected:
            raise LlameroError(
                f"tensor `{source}` is {shape}, this model with the adapter's config needs {expected}",
                where=files.files[source],
                fix=f"the adapter belongs to `{said.base}`",
            )
    return whole


def _rows(model: Llama, files: hf.Tensors, stored: Mapping[str, str], *, tied: bool) -> int:
    """Return for how many tokens an adapter has rows; 0 where it has none, or not for both embedding and head."""
    rows = [files.specs[stored[name]].shape[0] for name in (_EMBEDDING, _HEAD) if name in stored]
    whole = len(rows) == 2 or (tied and model.config.tie_word_embeddings)
    return rows[0] if rows and whole and len(set(rows)) == 1 else 0


def _make_room(model: Llama, stored: Mapping[str, Tensor], *, tied: bool) -> None:
    """Let embedding and head have as many rows as an adapter has, and part them if it has parted them."""
    if not stored:
        return
    embedding, head = model.model.embed_tokens, model.lm_head
    both = stored.get(_EMBEDDING, embedding.weight), stored.get(_HEAD, head.weight)
    same = tied or torch.equal(*(weight.to(embedding.weight) for weight in both))
    if model.config.tie_word_embeddings and not same:
        head.weight = nn.Parameter(embedding.weight.clone())
        model.config = replace(model.config, tie_word_embeddings=False)
    rows = len(next(iter(stored.values())))
    if rows > model.config.vocab_size:
        for layer in (embedding, head):
            layer.weight = nn.Parameter(layer.weight.new_empty(rows, layer.weight.shape[1]))
        model.config = replace(model.config, vocab_size=rows)
        embedding.num_embeddings = head.out_features = rows
        model.tie()
