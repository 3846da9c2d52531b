"""What a run has finished, kept in files, so that a run that was killed goes on and ends with the same bits."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from llamero.core.journal import Journal
from llamero.model.llama import Llama

T = TypeVar("T")

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


class Others(Protocol):
    """The processes that share the work; `llamero.parallel.world.World` is one."""

    @property
    def rank(self) -> int:
        """Return the number of this process."""
        ...

    @property
    def size(self) -> int:
        """Return how many there are."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return what every process has to say."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Let what one process refuses end all of them with its message."""
        ...


class Finished:
    """The passes that are finished, in memory and in files of a directory, one file per process.

    Args:
        directory: Where; `None` keeps nothing.
        identity: What decides every bit; what was found under another identity is not looked at.
        others: Processes that share the work; they agree on what is finished when they begin.

    Raises:
        LlameroError: A file cannot be read, or written.
    """

    def __init__(self, directory: Path | None, identity: Sequence[str], others: Others | None = None) -> None:
        self._others = others
        self._journal: Journal | None = None
        self._own: list[tuple[int, Part]] = []
        found: list[tuple[int, Part]] = []
        if directory is not None:
            here = directory / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
            self._journal = Journal(here / f"{0 if others is None else others.rank}.jsonl")
            found = [_part(record) for path in sorted(here.glob("*.jsonl")) for record in Journal(path).records]
        self._parts = dict(found if others is None else others.gather(found)[0])

    def __contains__(self, number: object) -> bool:
        return number in self._parts

    def add(self, number: int, part: Part) -> None:
        """Keep what a pass found; it is in the file when this returns."""
        self._own.append((number, part))
        if self._journal is not None:
            names = ("places", "log_likelihoods", "greedy")
            self._journal.append({"pass": number, **{k: v.tolist() for k, v in zip(names, part, strict=True)}})

    def all(self) -> list[Part]:
        """Return what all passes of all processes found, in their order."""
        said = [self._own] if self._others is None else self._others.gather(self._own)
        for parts in said:
            self._parts |= dict(parts)
        return [self._parts[number] for number in sorted(self._parts)]


def _part(record: Mapping[str, Any]) -> tuple[int, Part]:
    places, sums, greedy = record["places"], record["log_likelihoods"], record["greedy"]
    return record["pass"], (np.array(places, dtype=int), np.array(sums, dtype=float), np.array(greedy, dtype=bool))
