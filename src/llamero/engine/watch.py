"""metrics.jsonl and probes.jsonl as TensorBoard or Weights & Biases show them; both read what is written anyway."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from llamero.core.errors import LlameroError, did_you_mean
from llamero.engine.metrics import PROBES, read_lines, read_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from llamero.engine.metrics import Sample

GROUPS = {
    "loss/": "source/",
    "validation_loss/": "val_source/",
    "validation_accuracy/": "val_source_accuracy/",
    "validation_": "val/",
    "probe_": "probe/",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_gib": "memory/allocated_gib",
    "reserved_gib": "memory/reserved_gib",
    "time/": "time/",
    "slowest/": "slowest/",
}
"""What the beginning of a key becomes; the first that fits, and `train/` before all others."""


def tagged(line: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a line, without its step, under the names that boards group by."""
    return {_tag(key): value for key, value in line.items() if key != "step"}


def _tag(key: str) -> str:
    start = next((start for start in GROUPS if key.startswith(start)), None)
    return f"train/{key}" if start is None else GROUPS[start] + key.removeprefix(start)


class Board(Protocol):
    """Where curves are shown."""

    def show(self, curve: str, line: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        """Add one step of a training stage, with what the model says after it if that was asked."""
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

    def show(self, curve: str, line: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        """Add one step of a training stage, with what the model says after it if that was asked."""
        if curve not in self._writers:
            self._writers[curve] = self._make(curve)
        step, writer = int(line["step"]), self._writers[curve]
        for tag, value in tagged(line).items():
            writer.add_scalar(tag, value, step)
        for number, sample in enumerate(samples):
            quoted = sample["text"].replace("\n", "\n> ")
            writer.add_text(f"probe/{number}", f"**{sample['prompt']}**\n\n> {quoted}", step)

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
        self._table = wandb.Table
        self._runs: dict[str, wandb.Run] = {}

    def show(self, curve: str, line: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        """Add one step of a training stage, with what the model says after it if that was asked."""
        if curve not in self._runs:
            self._runs[curve] = self._start(curve)
        about: dict[str, object] = dict(tagged(line))
        if samples:
            rows = [[sample["prompt"], sample["text"]] for sample in samples]
            about["probe/answers"] = self._table(columns=["prompt", "answer"], data=rows)
        self._runs[curve].log(about, step=int(line["step"]))

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
                asked = {probe["step"]: probe["samples"] for probe in read_probes(metrics.with_name(PROBES))}
                for line in read_lines(metrics):
                    if line["step"] > shown.get(curve, 0):
                        target.show(curve, line, asked.get(int(line["step"]), ()))
                        shown[curve] = int(line["step"])
            if not follow:
                return sum(shown.values())
            time.sleep(seconds)
    finally:
        target.close()
