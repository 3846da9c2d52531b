"""convert: a model directory of one kind in, one of another kind out; one layer is held at a time."""

import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from llamero.checkpoint import hf
from llamero.checkpoint.megatron import is_megatron
from llamero.checkpoint.meta import is_meta
from llamero.convert import companions, gguf, megatron, meta, verify
from llamero.convert.config import ConvertConfig, KindName
from llamero.convert.model import Model, counting, open_hf, reshaped, track
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.core.gguf import find as find_gguf
from llamero.model.load import DTYPES, EMBEDDING, write_config


def _is_hf(directory: Path) -> bool:
    weights = any(path for container in hf.CONTAINERS for path in directory.glob(container.pattern))
    return weights and (directory / "config.json").exists()


def _write_hf(model: Model, directory: Path, options: ConvertConfig) -> None:
    specs = model.tensors.specs
    hf.write_tensors(directory, specs, track(list(specs), model.tensors.__getitem__))


class Kind(NamedTuple):
    """A kind of model directory."""

    recognise: Callable[[Path], bool]
    open: Callable[[Path, ConvertConfig], Model]
    write: Callable[[Model, Path, ConvertConfig], None] | None
    """Nothing where it is only read."""


KINDS: dict[KindName, Kind] = {
    "hf": Kind(_is_hf, lambda directory, options: open_hf(directory), _write_hf),
    "meta": Kind(is_meta, meta.open_model, meta.write_model),
    "megatron": Kind(is_megatron, megatron.open_model, megatron.write_model),
    "gguf": Kind(lambda path: find_gguf(path) is not None, gguf.open_gguf_model, None),
}
"""Every kind there is. To add one: a file that reads and writes it, a line here, one in `verify.SIDES`, and its
name in `KindName`."""


@dataclass(frozen=True)
class Report:
    """What was done."""

    kind: KindName
    """What the source was."""
    parameters: int
    largest_bytes: int
    """Size of the largest layer (or embedding): so much, and what is written at a time, is held."""
    peak_bytes: int
    """Most memory that the process had, libraries and mapped pages of files included."""
    notes: tuple[str, ...]
    verified: verify.Verified | None


def kind_of(directory: Path) -> KindName:
    """Return what kind of model a directory, or a file, holds."""
    found: list[KindName] = [name for name, kind in KINDS.items() if kind.recognise(directory)]
    if len(found) != 1:
        raise LlameroError(
            f"holds several kinds of weights: {', '.join(found)}" if found else "holds no weights that are known here",
            where=directory,
            fix="give a directory with config.json and *.safetensors, with params.json and consolidated.*.pth, or with "
            "latest_checkpointed_iteration.txt, or a GGUF file",
        )
    return found[0]


def run(source: Path, out: Path, options: ConvertConfig) -> Report:
    """Convert a model and return what was done.

    The output is made in `OUT.partial` and gets its name when it is whole and, if that was asked for, verified.

    Args:
        source: Directory of a model, or a GGUF file.
        out: Where to; must not be there.
        options: How.
    """
    if out.exists():
        raise LlameroError("is there already", where=out, fix="choose another directory, or remove it")
    source = find_gguf(source) or source
    kind, write = kind_of(source), KINDS[options.to].write
    assert write is not None  # `to` names none that is only read
    _refuse_unused(kind, options)
    opened = KINDS[kind].open(source, options)
    found = companions.find(source, opened.config, also=source.parent if kind == "meta" else None)
    model = _named(reshaped(opened, dtype=_dtype(options), vocabulary=options.true_vocab), found)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was cut off
    broken: dict[str, int] = {}
    with files.disk_errors_named(partial):
        partial.mkdir(parents=True)
        write(counting(model, broken), partial, options)
        write_config(model.config, partial, dtype=model.tensors.specs[EMBEDDING].dtype)
        notes = companions.write(found, partial, options.to, model.config)
        verified = (
            _verify(kind, replace(opened, config=model.config), source, options, partial) if options.verify else None
        )
        files.sync(partial)
        partial.rename(out)
    notes = [*model.notes, *notes, *_say_broken(broken)]
    count = sum(spec.nbytes // spec.dtype.itemsize for spec in model.tensors.specs.values())
    return Report(kind, count, largest(model), _peak(), tuple(notes), verified)


def _dtype(options: ConvertConfig) -> torch.dtype | None:
    return None if options.dtype is None else DTYPES[options.dtype]


def _refuse_unused(kind: KindName, options: ConvertConfig) -> None:
    """Refuse what would be ignored."""
    if kind in ("hf", "gguf") and options.context is not None:
        says = "config.json" if kind == "hf" else "metadata"
        raise LlameroError(f"the {says} of the source says how long inputs may be", where="--context")
    if kind != "meta" and options.rope_factor is not None:
        raise LlameroError("only Meta directories leave the factor open", where="--rope-factor")


def _named(model: Model, found: companions.Companions) -> Model:
    """Return a model whose config names its first and last token, if its tokenizer does and it does not yet."""
    if found.tokenizer is None or "bos_token_id" in model.config.carried:
        return model
    ids = {"bos_token_id": found.tokenizer.bos_id, "eos_token_id": found.tokenizer.eos_id}
    return replace(model, config=replace(model.config, carried={**ids, **model.config.carried}))


def _verify(kind: KindName, model: Model, source: Path, options: ConvertConfig, out: Path) -> verify.Verified:
    """Return how far the logits of the output are from those of the source, or refuse it."""
    written = KINDS[options.to].open(out, ConvertConfig(to=options.to))
    ids = verify.some_ids(model.config)
    found = verify.compare(verify.logits(kind, model, source, ids), verify.logits(options.to, written, out, ids))
    verify.refuse_different(found, written.tensors.specs[EMBEDDING].dtype, where=out)
    return found


def _say_broken(broken: dict[str, int]) -> list[str]:
    return [f"{count} numbers in `{name}` are not finite (NaN or infinite)" for name, count in broken.items() if count]


def largest(model: Model) -> int:
    """Return the bytes of the largest layer, or of the embedding or the head if they are larger."""
    sizes: dict[str, int] = {}
    for name, spec in model.tensors.specs.items():
        part = ".".join(name.split(".")[:3])
        sizes[part] = sizes.get(part, 0) + spec.nbytes
    return max(sizes.values())


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # systems differ in what they count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
