"""What a run has finished, on disk, so that the same command goes on after a kill.

A journal tells it: one line for everything that has been forced to disk, each with its checksum, appended and forced
to disk in turn. A line that a kill cut off is the end of the journal. The activations between two layers are beside it.
Of several processes each has a journal of its own, and hears at every layer what the others have noted; the first one
puts all that is left of them into its own when it begins.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save
from torch import Tensor

from llamero.core import files
from llamero.parallel.world import World
from llamero.quantize import calibrate
from llamero.quantize.config import AFTERWARDS, QuantizeConfig
from llamero.quantize.waiting import KeptWaiting

END = ".progress"
"""How the names of these directories end."""

REST = "rest"
"""The part of a decoder layer that is not quantized."""

VERSION = 3
"""Raised when what a run writes, or how it remembers it, changes."""


def decided(
    config: QuantizeConfig,
    *,
    model: Path,
    tokens: Sequence[Int[Tensor, " time"]],
    device: str | torch.device = "cpu",
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Return what decides the bytes of a run, but for the variants: each is remembered by itself.

    The model's files count by their names, sizes and times: to read them all would take long.

    Args:
        config: Of the run.
        model: Directory of the unquantized model.
        tokens: Calibration text.
        device: Where to compute.
        shard_bytes: Largest file of weights.
    """
    seen = hashlib.sha256()
    for ids in tokens:
        seen.update(len(ids).to_bytes(8, "little") + ids.to("cpu", torch.int64).numpy().tobytes())
    how = config.model_dump(mode="json", exclude={"variants", "calibration", *AFTERWARDS})
    calibration = {"compute": config.calibration.arithmetic, "keep": config.calibration.keep}
    calibration |= {"propagation": config.calibration.propagation, "reference": config.calibration.reference}
    return {
        "version": VERSION,
        "torch": torch.__version__,
        "device": torch.device(device).type,
        "group_tokens": calibrate.GROUP_TOKENS,
        "model": [str(model.resolve()), *(_stamp(path) for path in sorted(model.iterdir()) if path.is_file())],
        "imatrix": None if config.imatrix is None else _stamp(Path(config.imatrix)),
        "tokens": seen.hexdigest(),
        "shard_bytes": shard_bytes,
        **how,
        "calibration": calibration,
    }


def _stamp(path: Path) -> list[Any]:
    about = path.stat()
    return [path.name, about.st_size, about.st_mtime_ns]


def place(root: Path, decides: Mapping[str, Any]) -> Path:
    """Return where a run that is decided so remembers what it has finished."""
    return root / f"quantize-{files.digest(decides)[:12]}{END}"


@dataclass(frozen=True)
class Commit:
    """Something of a variant that is on disk."""

    layer: int | None
    """Decoder layer; `None`: outside of them."""
    part: str
    """Linear layers by the key of their input in `INPUTS`, `REST`, or another name that the run gives."""
    tensors: list[str]
    """Their names in the variant's files."""
    modules: list[dict[str, Any]]
    """What is reported of linear layers."""
    seconds: float


class Progress:
    """What of a run is finished.

    Args:
        path: Directory for it. What it holds of a run that was decided otherwise is removed.
        decides: What decides the run, see `decided`.
        rank: Which of several processes this one is; the first has to have begun before the others do.

    Raises:
        LlameroError: There is no room for it.
    """

    def __init__(self, path: Path, decides: Mapping[str, Any], *, rank: int = 0) -> None:
        self.path, self.first = path, rank == 0
        self._commits: dict[str, dict[tuple[int | None, str], Commit]] = {}
        self._turned: dict[str, int] = {}
        self._news: list[dict[str, Any]] = []
        """What the other processes have not heard yet."""
        said = json.loads(json.dumps({"decides": decides}))
        with files.disk_errors_named(path):
            path.mkdir(parents=True, exist_ok=True)
            lines, length = _read(path / "journal.jsonl")
            if rank:
                self._journal = _open(path / f"journal-{rank}.jsonl", 0)
            else:
                if lines[:1] != [said]:
                    _empty(path)
                    lines, length = [], 0
                self._journal = _open(path / "journal.jsonl", length)
                if not lines:
                    self._say(said)
                lines += self._gather()
        for line in lines:
            self._take(line)

    def _gather(self) -> list[dict[str, Any]]:
        """Put into this journal what those of the others have, and remove them; return it."""
        found: list[dict[str, Any]] = []
        for path in sorted(self.path.glob("journal-*.jsonl")):
            lines, _ = _read(path)
            for line in lines:
                self._say(line)
            found += lines
            path.unlink()
        return found

    def exchange(self, world: World) -> dict[str, list[str]]:
        """Hear what the other processes have noted; return the tensors that they have written, by variant."""
        news, self._news = self._news, []
        written: dict[str, list[str]] = {}
        for rank, lines in enumerate(world.gather(news)):
            for line in lines if rank != world.rank else []:
                self._take(line)
                written.setdefault(line["variant"], []).extend(line["tensors"])
        return written

    def written(self, variant: str) -> set[str] | None:
        """Return the names of the tensors that a variant's files have; `None`: they were never begun."""
        found = self._commits.get(variant)
        return None if found is None else {name for commit in found.values() for name in commit.tensors}

    def begin(self, variant: str) -> None:
        """Note that the files of a variant are begun; what was said of it before does not count."""
        self._tell({"begin": variant})

    def done(self, variant: str, layer: int | None, part: str) -> bool:
        """Return whether a part of a variant is on disk."""
        return (layer, part) in self._commits.get(variant, {})

    def commits(self, variant: str) -> list[Commit]:
        """Return everything of a variant that is on disk."""
        return list(self._commits.get(variant, {}).values())

    def commit(self, variant: str, commit: Commit) -> None:
        """Note what is on disk."""
        line = {"variant": variant, **vars(commit)}
        self._tell(line)
        self._news.append(line)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep small tensors beside the journal, before what needs them is noted."""
        files.write_atomically(self.path / f"{name}.safetensors", save({k: v.cpu() for k, v in tensors.items()}))

    def get(self, name: str) -> dict[str, Tensor]:
        """Return tensors that were kept; none where there are none."""
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def _turn(self, stream: str, layer: int) -> None:
        if self.first:
            self._tell({"stream": stream, "layer": layer})

    def waiting(self, needed: Mapping[str, int]) -> Callable[[str, list[int], int, torch.dtype], KeptWaiting]:
        """Return what makes the activations of each stream, those of an earlier run where they serve.

        Args:
            needed: First layer of each stream of which something is still to be solved.
        """

        def make(stream: str, lengths: list[int], width: int, dtype: torch.dtype) -> KeptWaiting:
            there = self._turned.get(stream)
            name = f"activations-{list(needed).index(stream)}"
            layer = there if there is not None and there <= needed[stream] else None
            turned = partial(self._turn, stream)
            return KeptWaiting(lengths, width, dtype, directory=self.path, name=name, layer=layer, turned=turned)

        return make

    def lighten(self) -> None:
        """Remove what is only of use while layers are solved."""
        for path in self.path.iterdir():
            if path.name.startswith("activations-"):
                path.unlink()
            elif path.name.startswith("sensitivity-"):
                shutil.rmtree(path)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def _tell(self, line: dict[str, Any]) -> None:
        self._say(line)
        self._take(line)

    def _say(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode()
        self._journal.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        if "begin" in line:
            self._commits[line["begin"]] = {}
        elif "stream" in line:
            self._turned[line["stream"]] = line["layer"]
        elif "variant" in line:
            said = {key: value for key, value in line.items() if key != "variant"}
            self._commits[line["variant"]][said["layer"], said["part"]] = Commit(**said)


def forget(path: Path) -> None:
    """Remove what a run has remembered, when all of it has its place."""
    shutil.rmtree(path, ignore_errors=True)


def _empty(directory: Path) -> None:
    """Remove all but what locks it."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _open(path: Path, length: int) -> BinaryIO:
    """Open a journal behind its last whole line."""
    path.touch()
    journal = path.open("r+b")
    journal.truncate(length)
    journal.seek(length)
    return journal


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines of a journal, and how many bytes they are."""
    lines: list[dict[str, Any]] = []
    length = 0
    for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        checksum, _, text = raw.rstrip(b"\n").partition(b" ")
        if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        lines.append(json.loads(text))
        length += len(raw)
    return lines, length
