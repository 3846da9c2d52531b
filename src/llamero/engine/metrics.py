"""metrics.jsonl: one line a step, the record that TensorBoard, wandb, the picture and the card read.

Keys of a line: `step`, `loss`, `lr`, `grad_norm`, `tokens`, `supervised_tokens`; `loss/SOURCE` of every source that
the step has tokens of; `tokens_per_second`, `tokens_per_second_per_gpu`, `mfu` where the device's peak is known;
`memory_gib` (of the process that has most: the peak allocated on CUDA, resident on CPU), `reserved_gib`; `time/PHASE`,
seconds where it took longest, and which rank that was, `slowest/PHASE`; of a validation `validation_loss`,
`validation_accuracy`, and both of every source.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from llamero.core import files

PROBES = "probes.jsonl"
"""File of the probes beside metrics.jsonl: a line each."""


class Sample(TypedDict):
    """What a model said to a prompt."""

    prompt: str
    text: str


class Metrics:
    """Appends lines to metrics.jsonl; what a killed run wrote beyond its checkpoint is taken back first.

    Args:
        path: The file.
        step: Steps that count as done; lines of later steps are removed.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [line for line in _read(path) if line["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force what was written to disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()


MEASURED = re.compile(r"(time|slowest)/.*|tokens_per_second.*|mfu|memory_gib|reserved_gib")
"""Keys of what a run measures of itself; all else is the same whenever the recipe is."""


def decided(line: Mapping[str, float]) -> dict[str, float]:
    """Return what of a line the recipe decides, not the machine."""
    return {key: value for key, value in line.items() if not MEASURED.fullmatch(key)}


class Silent:
    """Metrics of a process that is not the first."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Have nothing to sync."""


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; a last line that a kill cut off is left out."""
    return _read(path)


def read_probes(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of probes: `step`, numbers, and the `samples`."""
    return _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]
