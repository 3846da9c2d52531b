"""What every kind of directory is read to and written from: a Llama's config, its tensors by Hugging Face's names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamero.checkpoint import hf, packed
from llamero.checkpoint.hf import Spec, Tensors
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.load import EMBEDDING, HEAD, empty_model, load_config, stored_names


@dataclass(frozen=True)
class Model:
    """A model on disk, whatever its kind."""

    config: LlamaConfig
    tensors: Tensors
    """Every parameter by its Hugging Face name, in the order of the model, and nothing else."""
    notes: tuple[str, ...] = ()
    """What the user should know: what was passed over, or taken for granted."""


def open_hf(directory: Path) -> Model:
    """Return the model of a Hugging Face directory."""
    if packed.read_format(directory) is not None:
        raise LlameroError("the weights are quantized", where=directory, fix="convert the model it was made from")
    config = load_config(directory)
    tensors = hf.open_tensors(directory)
    stored = stored_names(empty_model(config), tensors)
    computed = sum(name.endswith("rotary_emb.inv_freq") for name in tensors)
    notes = (f"{computed} tensors `rotary_emb.inv_freq` passed over: they are computed",) if computed else ()
    specs = {name: tensors.specs[stored[name]] for name in shapes(config)}
    files = {name: tensors.files[stored[name]] for name in specs}
    view = Tensors(directory, files, specs, lambda path, name: tensors[stored[name]])
    return checked(Model(config, view, notes))


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, in the order of the model; a tied head is the embedding."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}


def checked(model: Model) -> Model:
    """Return a model whose tensors are those of its config."""
    for name, shape in shapes(model.config).items():
        if model.tensors.specs[name].shape != shape:
            raise LlameroError(
                f"tensor `{name}` is {model.tensors.specs[name].shape}, the config says {shape}",
                where=model.tensors.files[name],
                fix="a shard may be missing, or the config be that of another model",
            )
    return model


def config_beside(directory: Path) -> LlamaConfig | None:
    """Return the config.json in a directory of another kind, which says what those have no word for."""
    return load_config(directory) if (directory / "config.json").exists() else None


def agreed(stated: Mapping[str, Any], known: LlamaConfig, *, where: Path) -> LlamaConfig:
    """Return the config.json of a directory if it says the same as the files beside it.

    Args:
        stated: What they say, by field of the config; `theta` is that of the rotary embedding.
        known: The config.json.
        where: The directory.
    """
    for key, value in stated.items():
        said = known.rope.theta if key == "theta" else getattr(known, key)
        if said != value:
            raise LlameroError(
                f"config.json says {key} {said}, the weights beside it {value}",
                where=where,
                fix="remove config.json if it belongs to another model",
            )
    return known


def reshaped(model: Model, *, dtype: torch.dtype | None, vocabulary: int | None) -> Model:
    """Return a model in another precision, its vocabulary cut to so many rows; `None` leaves either."""
    rows = model.config.vocab_size if vocabulary is None else vocabulary
    if rows > model.config.vocab_size:
        raise LlameroError(
            f"a true vocabulary of {rows} tokens was asked for, there are {model.config.vocab_size} rows",
            where=model.tensors.directory,
            fix="lower --true-vocab",
        )
    config = replace(model.config, vocab_size=rows)
    specs = {
        name: Spec(shape, dtype or model.tensors.specs[name].dtype) for name, shape in shapes(config).items()
    }  # fmt: skip
    files = {name: model.tensors.files[name] for name in specs}

    def read(path: Path, name: str) -> Tensor:
        tensor = model.tensors[name]
        return (tensor[:rows] if name in (EMBEDDING, HEAD) else tensor).to(specs[name].dtype)

    return Model(config, Tensors(model.tensors.directory, files, specs, read), model.notes)


def counting(model: Model, counts: dict[str, int]) -> Model:
    """Return a model that counts, by tensor, the numbers that are not finite."""

    def read(path: Path, name: str) -> Tensor:
        tensor = model.tensors[name]
        counts[name] = sum(int((~part.isfinite()).sum()) for part in tensor.split(128))  # of all, the masks are large
        return tensor

    tensors = model.tensors
    return replace(model, tensors=Tensors(tensors.directory, tensors.files, tensors.specs, read))


def track(names: Sequence[str], read: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, showing how many are done."""
    for name in progress.track(names, "convert", unit="tensors"):
        yield name, read(name)


def must_divide(what: str, number: int, sizes: Mapping[str, int], *, where: str) -> None:
    """Refuse a number of ranks that does not divide every size, naming those that would.

    Args:
        what: Name of the ranks.
        number: How many.
        sizes: What they share, by name.
        where: The option.
    """
    common = gcd(*sizes.values())
    if common % number:
        odd = ", ".join(f"{size} {name}" for name, size in sizes.items() if size % number)
        good = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise LlameroError(f"{number} {what} do not divide {odd}", where=where, fix=f"one of: {good}")


def cached(tensors: Tensors) -> Tensors:
    """Return tensors of which the last one read is kept: several are often cut from the same."""
    last: dict[str, Tensor] = {}

    def read(path: Path, name: str) -> Tensor:
        if name not in last:
            last.clear()  # first, so that there are never two
            last[name] = tensors[name]
        return last[name]

    return Tensors(tensors.directory, tensors.files, tensors.specs, read)
