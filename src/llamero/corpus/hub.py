"""Rows of data sets of the hub, streamed through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llamero.core.errors import LlameroError
from llamero.corpus.rows import Raw


def read(name: str, split: str, *, subset: str | None = None, data_files: str | None = None) -> Iterator[Raw]:
    """Yield the rows of a split.

    Args:
        name: `owner/name`.
        split: Its split, or several with `+` between.
        subset: Its configuration, where it has several.
        data_files: The file to read, where it has several.

    Raises:
        LlameroError: The library is not there, or the data set cannot be read.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise LlameroError(
            "reading a hub data set needs the `datasets` library", where=name, fix="pip install 'llamero[data]'"
        ) from error
    which: dict[str, Any] = {} if data_files is None else {"data_files": data_files}
    which |= {} if subset is None else {"name": subset}
    number = 0
    try:
        for number, row in enumerate(load_dataset(name, split=split, streaming=True, **which), 1):
            yield Raw(f"{name}:{split}:row {number}", dict(row))
    except (OSError, ValueError) as error:  # what the library raises for names, splits and the network
        said = str(error).partition("\n")[0] or type(error).__name__
        raise LlameroError(
            f"the hub data set cannot be read: {said}",
            where=f"{name}, split {split}, after row {number}",
            fix="check name and `split:`, or give the path of a copy; for a gated one ask for access, `hf auth login`",
        ) from error
