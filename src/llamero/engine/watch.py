"""metrics.jsonl as TensorBoard or Weights & Biases show it; both read what is written anyway."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from llamero.core.errors import LlameroError, did_you_mean
from llamero.engine.metrics import read_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class Board(Protocol):
    """Where curves are shown."""

    def show(self, curve: str, line: Mapping[str, float]) -> None:
        """Add one step of a training stage."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Event files in `<run>/tensorboard`, one folder a stage."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise LlameroError("TensorBoard is not installed", fix="pip install 'llamero[observe]'") from error
        self._make: Callable[[str], SummaryWriter] = lambda curve: SummaryWriter(str(run / "tensorboard" / curve))
        self._writers: dict[str, SummaryWriter] = {}

    def show(self, curve: str, line: Mapping[str, float]) -> None:
        """Add one step of a training stage."""
        if curve not in self._writers:
            self._writers[curve] = self._make(curve)
        for key, value in line.items():
            if key != "step":
                self._writers[curve].add_scalar(key, value, int(line["step"]))

    def close(self) -> None:
        """Flush all files."""
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """One wandb run a stage, in the project that is called like the run directory."""

    def __init__(self, run: Path) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise LlameroError("wandb is not installed", fix="pip install 'llamero[observe]'") from error
        self._start = lambda curve: wandb.init(project=run.name, name=curve, reinit="create_new", dir=str(run))
        self._runs: dict[str, wandb.Run] = {}

    def show(self, curve: str, line: Mapping[str, float]) -> None:
        """Add one step of a training stage."""
        if curve not in self._runs:
            self._runs[curve] = self._start(curve)
        self._runs[curve].log(dict(line), step=int(line["step"]))

    def close(self) -> None:
        """Finish all runs."""
        for run in self._runs.values():
            run.finish()


BOARDS: dict[str, Callable[[Path], Board]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""Every board there is."""


def watch(run: Path, board: str, *, follow: bool, seconds: float = 5.0) -> int:
    """Show every step of every training stage of a run directory, and return how many there were.

    Args:
        run: Run directory.
        board: `tensorboard` or `wandb`.
        follow: Keep looking for new steps until interrupted.
        seconds: Between looks.
    """
    if board not in BOARDS:
        raise LlameroError(f"unknown board `{board}`", fix=did_you_mean(board, BOARDS))
    if not run.is_dir():
        raise LlameroError("no such run directory", where=run)
    shown: dict[str, int] = {}
    target = BOARDS[board](run)
    try:
        while True:
            for metrics in sorted(run.glob("train-*/metrics.jsonl")):
                curve = metrics.parent.name.removesuffix(".partial")
                for line in read_lines(metrics):
                    if line["step"] > shown.get(curve, 0):
                        target.show(curve, line)
                        shown[curve] = int(line["step"])
            if not follow:
                return sum(shown.values())
            time.sleep(seconds)
    finally:
        target.close()
