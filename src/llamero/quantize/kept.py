"""Statistics kept on disk, so that other variants later need no new pass through the model.

They are an artifact: whole or not there, under the digest of all that decides them. Of each second moment the half on
and below the diagonal is kept.
"""

import hashlib
import logging
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from llamero.checkpoint import hf
from llamero.core import artifact, files, progress
from llamero.core.artifact import Artifact, Identity
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.load import load_block
from llamero.quantize import calibrate
from llamero.quantize.calibrate import UNQUANTIZED, Layer, Walk
from llamero.quantize.statistics import INPUTS, Channels, Statistics

log = logging.getLogger(__name__)

ROWS = 1024
"""Rows of a second moment that are kept together."""

HEAD = "head"
_OF_CHANNELS = ("energy", "mean_abs", "absmax")

VERSION = 1
"""Raised when the same model and tokens give other statistics."""


def identity(model: Path, tokens: Sequence[Int[Tensor, " time"]], *, dtype: torch.dtype, root: Path) -> Identity:
    """Return what decides the statistics: the model's files, the tokens and the arithmetic.

    The tokens hold all of it that text, tokenizer, template and sequence length decide.

    Args:
        model: Directory of the unquantized model.
        tokens: Calibration text.
        dtype: To compute in.
        root: Where statistics are kept; digests of files that did not change since are remembered there.
    """
    root.mkdir(parents=True, exist_ok=True)
    seen = hashlib.sha256()
    for ids in tokens:
        seen.update(len(ids).to_bytes(8, "little") + ids.to("cpu", torch.int64).numpy().tobytes())
    how = {"compute": str(dtype).removeprefix("torch."), "group_tokens": calibrate.GROUP_TOKENS}
    parents = {"model": files.ContentDigests(root / ".digests.json")(model), "tokens": seen.hexdigest()}
    return Identity("calibration", "calibration", how, parents, VERSION)


def bytes_of(config: LlamaConfig) -> int:
    """Return about how many bytes the statistics of a model take on disk."""
    wide = (config.hidden_size, config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size)
    return config.num_layers * sum(2 * width * (width + ROWS) for width in wide)


def layers(
    walk: Walk, model: Path, config: LlamaConfig, who: Identity, *, root: Path, first: int = 0
) -> Generator[Layer, None, None]:
    """Yield the layers of a walk, from what is kept of it or else keeping it.

    Of several processes each reads what is kept; the first keeps it, and all walk.

    Args:
        walk: Through the unquantized model; begun only where nothing is kept. It is told what flows into the head.
        model: Its directory.
        config: Its shape.
        who: What decides the statistics.
        root: Where they are kept.
        first: Layer from which on they are asked for, where all are kept.

    Raises:
        LlameroError: What is kept is damaged.
    """
    world = walk.world
    found = world.told(artifact.find(root, who))
    if found is not None:
        log.info("statistics of an earlier run are used: %s", found.path)
        yield from _read(found, model, config, walk, first)
        return
    unfinished = artifact.partial(root, who)  # of a run that was cut off
    there = all((unfinished / f"{_stem(number)}.safetensors").exists() for number in range(walk.first))
    if not world.told(there):
        walk.restart()
    if not world.speaks:
        yield from walk
        return
    if walk.first == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("statistics are kept: about %.1f GB in %s", bytes_of(config) / 1e9, who.path(root))
    with artifact.build(root, who) as build:
        done = [build.path / f"{_stem(number)}.safetensors" for number in range(walk.first)]
        digests = {path.name: files.sha256(path) for path in done}
        for layer in walk:
            path = _write(build.path, layer)
            digests[path.name] = files.sha256(path)
            yield layer
            del layer  # before the next one is read, not after
        path = _write_head(build.path, walk)
        digests[path.name] = files.sha256(path)
        build.summary = {"layers": config.num_layers, "sha256": digests}


def _write(directory: Path, layer: Layer) -> Path:
    parts = dict(part for name, each in layer.statistics.items() for part in _parts(f"{layer.number}.{name}", each))
    specs = {name: hf.Spec(tuple(part.shape), part.dtype) for name, part in parts.items()}
    (path,) = hf.write_tensors(directory, specs, parts.items(), stem=_stem(layer.number), shard_bytes=1 << 62)
    return path


def _write_head(directory: Path, walk: Walk) -> Path:
    head = walk.heads[UNQUANTIZED]  # the walk has come to its end
    parts = {f"{HEAD}.{name}": getattr(head, name) for name in _OF_CHANNELS}
    parts[f"{HEAD}.tokens"] = torch.tensor([head.tokens])
    specs = {name: hf.Spec(tuple(part.shape), part.dtype) for name, part in parts.items()}
    (path,) = hf.write_tensors(directory, specs, parts.items(), stem=HEAD)
    return path


def _stem(number: int) -> str:
    return f"layer-{number:05}"


def _parts(name: str, found: Statistics) -> Iterator[tuple[str, Tensor]]:
    for start, stop in _rows(len(found.second_moment)):
        yield f"{name}.{start}", found.second_moment[start:stop, :stop]
    yield f"{name}.mean_abs", found.mean_abs
    yield f"{name}.absmax", found.absmax
    yield f"{name}.tokens", torch.tensor([found.tokens])


def _rows(width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, width, ROWS):
        yield start, min(start + ROWS, width)


def _read(found: Artifact, model: Path, config: LlamaConfig, walk: Walk, first: int) -> Iterator[Layer]:
    weights, tensors, device = hf.open_tensors(model), hf.open_tensors(found.path), walk.device
    _check(found, HEAD)
    for number in progress.track(range(first, config.num_layers), "solve", unit="layers"):
        _check(found, _stem(number))
        statistics = {name: _statistics(tensors, f"{number}.{name}", device) for name in INPUTS}
        block = load_block(config, weights, number, dtype=None, device=device)
        layer = Layer(number, block, statistics)
        del statistics, block
        yield layer
        del layer  # before the next one is read, not after
    energy, mean_abs, absmax = (tensors[f"{HEAD}.{name}"].to(device) for name in _OF_CHANNELS)
    walk.heads[UNQUANTIZED] = Channels(energy, mean_abs, absmax, int(tensors[f"{HEAD}.tokens"]))


def _check(found: Artifact, stem: str) -> None:
    path = found.path / f"{stem}.safetensors"
    if not path.exists() or files.sha256(path) != found.summary["sha256"].get(path.name):
        raise LlameroError(
            "these statistics of an earlier run are damaged",
            where=path,
            fix=f"remove {found.path}; the next run makes it again",
        )


def _statistics(tensors: hf.Tensors, name: str, device: torch.device) -> Statistics:
    mean_abs, absmax, tokens = (tensors[f"{name}.{part}"] for part in ("mean_abs", "absmax", "tokens"))
    moment = torch.empty(len(mean_abs), len(mean_abs), device=device)
    for start, stop in _rows(len(mean_abs)):
        part = tensors[f"{name}.{start}"].to(device)
        moment[start:stop, :stop] = part
        moment[:start, start:stop] = part[:, :start].T
    return Statistics(moment, mean_abs.to(device), int(tokens), absmax.to(device))
