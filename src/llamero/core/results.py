"""What a stage measured: a JSON record that says which inputs made it, so that publish can read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from llamero.core import files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "results.json"


@dataclass(frozen=True)
class Result:
    """One measurement of one model."""

    task: str
    """`toy_world`, `arc_challenge`, `perplexity` …"""
    model: str
    """Name of the measured model in its release: `base`, a training stage, a variant."""
    metrics: Mapping[str, float]
    """What was measured; shares in 0..1."""
    protocol: str
    """How, in one line: few-shot count, window and stride, edition of the data."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What decided it: model digest, data files, limit, seed, dtype."""
    notes: tuple[str, ...] = ()
    """Counts that the reader must know: truncated, missing subjects."""
    samples: tuple[Mapping[str, str], ...] = ()
    """What the model said: `prompt` and `answer`."""


def write(directory: Path, results: list[Result]) -> None:
    """Write the results of a stage."""
    write_file(directory / FILE, results)


def write_file(path: Path, results: list[Result]) -> None:
    """Write results to a file."""
    files.write_json(path, {"results": [asdict(r) for r in results], "software": software()})


def read(directory: Path) -> list[Result]:
    """Return the results of a stage."""
    records = json.loads((directory / FILE).read_text(encoding="utf-8"))["results"]
    return [
        Result(**{**record, "notes": tuple(record["notes"]), "samples": tuple(record["samples"])}) for record in records
    ]


def software() -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    found = {}
    for name in ("llamero", "torch", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
