"""Artifacts: directories named by a digest of everything that decided their content.

An artifact is built in `<stage>-<digest>.partial`; its manifest `artifact.json` is written last and the
directory then renamed, so that what carries the final name is finished. A killed build leaves its partial
directory, and the next run of the same stage finds there what can be continued.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamero.core import files
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MANIFEST = "artifact.json"
DIGITS = 12
"""Digits of the digest that stand in a directory's name."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    path: Path
    kind: str
    stage: str
    digest: str
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    """Digest of each input by its role."""
    summary: Mapping[str, Any]
    """What its maker wants to tell the stages after it (counts, sizes)."""


@dataclass(frozen=True)
class Identity:
    """What decides an artifact: the same identity is the same content."""

    kind: str
    stage: str
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    version: int = 1
    """Raised when the code that makes this kind changes what it makes."""

    @property
    def digest(self) -> str:
        """Return the name of the content."""
        decided = {"kind": self.kind, "version": self.version, "config": self.config, "parents": self.parents}
        return files.digest(decided)

    def path(self, root: Path) -> Path:
        """Return where this artifact stands in a run directory."""
        return root / f"{self.stage}-{self.digest[:DIGITS]}"


def find(root: Path, identity: Identity) -> Artifact | None:
    """Return the finished artifact of this identity, if there is one."""
    path = identity.path(root)
    return read(path) if (path / MANIFEST).exists() else None


def read(path: Path) -> Artifact:
    """Return a finished artifact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        keys = ("kind", "stage", "digest", "config", "parents", "summary")
        return Artifact(path, **{key: manifest[key] for key in keys})
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        problem = f"no `{error.args[0]}` in it" if isinstance(error, KeyError) else str(error)
        raise LlameroError(f"not an artifact: {problem}", where=path / MANIFEST, fix="remove the directory") from error


def partial(root: Path, identity: Identity) -> Path:
    """Return where this artifact stands while it is made."""
    final = identity.path(root)
    return final.with_name(final.name + ".partial")


class Build:
    """An artifact in the making: write into `path`, set `summary`, and it is finished when the block ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {}


@contextmanager
def build(root: Path, identity: Identity) -> Iterator[Build]:
    """Make an artifact: on a clean exit it is whole under its final name, on any other its partial stays.

    Raises:
        LlameroError: The disk is full, or something that is no artifact has the final name.
    """
    final = identity.path(root)
    if final.exists():  # else the rename at the end would fail, when all the work is done
        raise LlameroError(
            f"its place is taken by something without a finished `{MANIFEST}`", where=final, fix="remove it"
        )
    unfinished = partial(root, identity)
    with files.disk_errors_named(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
        work = Build(unfinished)
        yield work
        manifest = {
            "kind": identity.kind,
            "stage": identity.stage,
            "digest": identity.digest,
            "version": identity.version,
            "config": identity.config,
            "parents": identity.parents,
            "summary": work.summary,
        }
        files.write_json(unfinished / MANIFEST, manifest)
        files.sync(unfinished)
        unfinished.rename(final)


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Hold a run directory for one process; a second one is told who has it. A killed process lets go."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / ".lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise LlameroError(
                f"another run is at work here (process {lock.read().strip() or 'unknown'})",
                where=root,
                fix="wait for it, or choose another directory with --out",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
