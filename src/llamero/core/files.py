"""Files that are whole or not there: written beside, then renamed; and the digests that name them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: Path, text: str | bytes, *, shared: bool = False) -> None:
    """Write a file that no reader ever sees half of.

    Args:
        path: Where.
        text: What; text is written as UTF-8.
        shared: Other processes may write the same file at the same time. Each then writes beside it under a name
            of its own, which a kill leaves there for good; else the next writing takes the same name again.
    """
    beside = path.with_name(f".{path.name}.{os.getpid() if shared else 'new'}")
    try:
        with beside.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # on a full disk a half-written file would only be in the way


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(directory: Path) -> None:
    """Force the files of a directory to disk, so that a rename after it is not ahead of them."""
    found = [path for path in directory.rglob("*") if not path.is_symlink()]
    for path in [*found, directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors_named(where: Path) -> Iterator[None]:
    """Turn a full disk into an error that says so; everything else passes."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise no_room(error, where) from error


def is_disk_full(error: OSError) -> bool:
    """Return whether there was no room to write: no space, a quota, or a limit on file sizes."""
    return error.errno in _FULL


def no_room(error: OSError, where: Path | str) -> LlameroError:
    """Return what to tell the user of a full disk."""
    return LlameroError(
        f"no room to write ({error.strerror}); what was finished before is kept",
        where=where,
        fix="free some space and run the same command again: it goes on where it stopped",
    )


def sha256(path: Path) -> str:
    """Return the digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """Return the one JSON text of a value, for digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Return the digest of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _counts(path: Path, directory: Path) -> bool:
    """Return whether a file belongs to a directory's content.

    Hidden files and folders are tools' own (.git, .cache), and a README does not change what a model computes.
    """
    hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
    return not hidden and path.suffix != ".md" and path.is_file()


class ContentDigests:
    """Digests of files outside the run, remembered by path, size and time so that a second run need not read them.

    Args:
        memory: JSON file that remembers.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, ValueError):  # it only saves time: broken is as good as absent
            self._known = json.loads(memory.read_text(encoding="utf-8"))

    def __call__(self, path: Path) -> str:
        """Return the digest of a file, or of a directory: of its files' names and contents."""
        if not path.exists():
            raise LlameroError("no such file or directory", where=path)
        if path.is_dir():
            parts = {str(p.relative_to(path)): self(p) for p in sorted(path.rglob("*")) if _counts(p, path)}
            return digest(parts)
        stat = path.stat()
        key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if known and known[:2] == stamp:
            return known[2]
        content = sha256(path)
        self._known[key] = [*stamp, content]
        write_atomically(self._memory, json.dumps(self._known, indent=2), shared=True)
        return content
