"""What a model said to every request, one JSON line each, so that two runs can be compared and a killed one goes on.

A line of its own opens what one task configuration writes: `about`, with everything that moves scores. Then, in the
order they were asked, one line per request:

    task, doc, choice     which request
    prompt                SHA-256 (16 digits) of the ids of the context as the model saw them
    context_tokens        how many those are
    tokens                ids of the continuation, or of the answer that was written
    log_likelihood        of the continuation, in nats (none for an answer that was written)
    greedy                whether each of its tokens is the likeliest
    text                  the answer that was written (only there)
    truncated             tokens that the context lost on its left
    scores                of the document that it belongs to
"""

from __future__ import annotations

import hashlib
import json
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from llamero.core.errors import LlameroError
from llamero.core.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

ABOUT = "about"
FILE = "samples.jsonl"


class Key(NamedTuple):
    """Which request of which task."""

    task: str
    doc: int
    choice: int


def prompt_digest(ids: Sequence[int]) -> str:
    """Return what names a prompt, as the model saw it."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()[:16]


def text_digest(arguments: Sequence[object]) -> str:
    """Return what names a prompt of which only the text is known: what a model was asked, and how."""
    return hashlib.sha256(json.dumps(list(arguments), default=str).encode()).hexdigest()[:16]


class SampleFile:
    """The samples of a run, some of which may be there already.

    Args:
        path: The file; it need not be there. `None` keeps nothing.
        writes: Whether this process does; of several one does, and all read.
    """

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path = path
        self._journal = Journal(path) if path is not None and writes else None
        records = [] if path is None else self._journal.records if self._journal is not None else read(path)
        self._records = list(records)
        self._there = {key_of(row): row for row in rows_of(self._records)}

    def begin(self, label: str, about: Mapping[str, Any]) -> None:
        """Say what the samples to come were made with.

        Args:
            label: Of the task configuration.
            about: Everything that moves its scores.

        Raises:
            LlameroError: The file holds samples of the same task that were made with something else.
        """
        if self._path is None:
            return
        said = json.loads(json.dumps({ABOUT: label, **about}))
        for record in self._records:
            if record.get(ABOUT) == label:
                _refuse_other(record, said, self._path)
                return
        if self._journal is not None:
            self._journal.append(said)

    def known(self, keys: Iterable[Key]) -> list[dict[str, Any]] | None:
        """Return the lines of some requests if all of them are there, else nothing."""
        found = [self._there.get(key) for key in keys]
        return [row for row in found if row is not None] if None not in found else None

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the lines of some requests; those that are there stay as they are."""
        for row in rows:
            key = key_of(row)
            if key in self._there:
                continue
            self._there[key] = row
            if self._journal is not None:
                self._journal.append(row)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that somebody else may be writing: half a line at its end is left out.

    Raises:
        LlameroError: A line is no JSON object.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    found = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    with suppress(LlameroError):  # a whole line but for its end counts, as it does for a journal
        found.append(_record(last, str(path)))
    return found


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LlameroError("not JSON", where=where, fix="give a file of samples") from error
    if not isinstance(record, dict):
        raise LlameroError("not a JSON object", where=where, fix="give a file of samples")
    return record


def rows_of(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines that hold samples."""
    return [record for record in records if ABOUT not in record]


def key_of(row: Mapping[str, Any]) -> Key:
    """Return which request a line is of.

    Raises:
        LlameroError: The line is none of a sample file.
    """
    try:
        return Key(str(row["task"]), int(row["doc"]), int(row["choice"]))
    except (KeyError, TypeError, ValueError) as error:
        raise LlameroError(
            f"a line is no sample: it has {', '.join(map(str, row)) or 'nothing'}",
            fix="give a file that `llamero evaluate … --out DIR` wrote",
        ) from error


def _refuse_other(there: Mapping[str, Any], said: Mapping[str, Any], path: Path) -> None:
    other = [key for key in {**there, **said} if there.get(key) != said.get(key)]
    if other:
        key = other[0]
        raise LlameroError(
            f"it holds samples made with another `{key}` ({there.get(key)!r}, now {said.get(key)!r})",
            where=path,
            fix="give another directory with --out, or remove this file",
        )
