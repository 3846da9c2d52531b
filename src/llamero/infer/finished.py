"""What a run has finished, kept in files, so that a run that was killed goes on and ends with the same bits."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from llamero.core.errors import LlameroError
from llamero.core.files import disk_errors_named
from llamero.model.llama import Llama

Part = tuple[Int[np.ndarray, " asked"], Float[np.ndarray, " asked"], Bool[np.ndarray, " asked"]]
"""What a pass finds: numbers of sequences, their log-likelihoods as far as it sees them, whether greedy says that."""

SAMPLE = 64
"""Numbers of each tensor that a fingerprint looks at, at either end."""


def fingerprint(model: Llama) -> str:
    """Return a digest of a model: its config, and some numbers of each of its tensors."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat((flat[:SAMPLE], flat[-SAMPLE:])).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Finished:
    """The passes that are finished, in memory and in files of a directory, one file per process.

    Args:
        directory: Where; `None` keeps nothing.
        identity: What decides every bit; what was found under another identity is not looked at.
        others: Processes that share the work; they agree on what is finished when they begin.
    """

    def __init__(self, directory: Path | None, identity: Sequence[str], others: Any = None) -> None:
        self._others = others
        self._file: IO[str] | None = None
        self._parts: dict[int, Part] = {}
        rank = 0 if others is None else others.rank
        if directory is not None:
            here = directory / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
            with disk_errors_named(here):
                here.mkdir(parents=True, exist_ok=True)
                if rank == 0:
                    self._parts = dict(_read(here))
                self._file = _appended(here / f"{rank}.jsonl")
        if others is not None:
            self._parts = dict(others.gather(list(self._parts.items()))[0])
        self._own: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, number: object) -> bool:
        return number in self._parts

    def add(self, number: int, part: Part) -> None:
        """Keep what a pass found; it is on disk when this returns."""
        self._parts[number] = part
        self._own.append(number)
        if self._file is not None:
            with disk_errors_named(Path(self._file.name)):
                self._file.write(json.dumps([number, *(each.tolist() for each in part)]) + "\n")
                self._file.flush()

    def all(self) -> Iterator[Part]:
        """Yield what all passes of all processes found, in their order."""
        if self._others is not None:
            for said in self._others.gather([(number, self._parts[number]) for number in self._own]):
                self._parts |= dict(said)
        for number in sorted(self._parts):
            yield self._parts[number]


def _appended(path: Path) -> IO[str]:
    """Return a file to add lines to; half a line at its end, left by a kill, is taken away."""
    file = path.open("a+", encoding="utf-8", newline="\n")
    file.seek(0)
    whole = file.read()
    end = len(whole[: whole.rfind("\n") + 1].encode())
    file.truncate(end)
    file.seek(end)
    return file


def _read(directory: Path) -> Iterator[tuple[int, Part]]:
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # written when the run was killed
            try:
                number, places, sums, greedy = json.loads(line)
            except ValueError as error:
                raise LlameroError(
                    "a line of the file of finished requests is broken", where=path, fix="delete it"
                ) from error
            yield number, (np.array(places, dtype=np.int64), np.array(sums, dtype=float), np.array(greedy, dtype=bool))
