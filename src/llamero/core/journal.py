"""JSON lines that are appended as they come: what was written stays, whatever ends the process.

A process that is killed while it writes leaves half a line; it is taken off when the file is opened again, so what
it stood for is done again and nothing else.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from llamero.core import files
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


class Journal:
    """A file of JSON objects, one a line; threads may append to it at the same time.

    Args:
        path: The file; it and its directory need not be there.

    Raises:
        LlameroError: A whole line of it is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        """What the file held when it was opened, and what was appended since."""
        if path.exists():
            self._open()

    def _open(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data and _record(data[len(whole) :]) is not None:  # all is there but the end of its line
            whole = data + b"\n"
        self.records = [self._read(line, number) for number, line in enumerate(whole.splitlines(), 1) if line.strip()]
        if whole != data:
            files.write_atomically(self.path, whole)

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        record = _record(line)
        if record is None:
            raise LlameroError(
                "not a JSON object", where=f"{self.path}:{number}", fix="remove the line, and it is made again"
            )
        return record

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one more line; it is in the file when this returns.

        Raises:
            LlameroError: The disk is full.
        """
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock, files.disk_errors_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
            self.records.append(dict(record))

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Put other lines in place of all that is there, whole or not at all.

        Raises:
            LlameroError: The disk is full.
        """
        kept = [dict(record) for record in records]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        with self._lock, files.disk_errors_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(self.path, text)
            self.records = kept


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return record if isinstance(record, dict) else None
