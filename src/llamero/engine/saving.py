"""Saving checkpoints while training goes on.

What is saved is copied to CPU memory, and a thread writes it while training takes its next steps. A checkpoint gets its
name when every process has written its part; that is looked for at the next step and waited for at the next save, at an
interruption and at the end. Threads never talk to other processes: all agreeing is done between steps.
"""

from __future__ import annotations

import math
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Interrupted
from llamero.engine.resume import STATE, Parameters, drop, finished, loss_of, state_of
from llamero.engine.stage import StageConfig
from llamero.model.weights import finite
from llamero.parallel.spread import Spread
from llamero.parallel.world import World, local

BYTES = 12
"""Of a trained parameter in a checkpoint: its weight and two moments in float32."""


class Saver:
    """Writes the checkpoints of a stage, one at a time; every process has one, and all take part in each method.

    Leaving the block waits for what is being written, unless the run ends in an error that is not shared by all.

    Args:
        directory: Of the checkpoints.
        stage: Says how many are kept.
        weights: This process's parameters by name.
        optimizer: Their AdamW.
        world: All processes; its layout says whether training goes on while a checkpoint is written.
    """

    def __init__(
        self,
        directory: Path,
        stage: StageConfig,
        *,
        weights: Parameters,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self._directory, self._stage, self._world = directory, stage, world
        self._weights, self._optimizer = weights, optimizer
        self._planner = _Copies(pinned=world.device.type == "cuda")
        self._background = world.parallel.save_in_background
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None
        self._pending: _Pending | None = None
        with world.together():
            losses = [loss_of(path) for path in finished(directory)] if world.speaks else []
        self._best = min((loss for loss in world.told(losses) if loss is not None), default=math.inf)

    def wants(self, step: int, validation_loss: float | None) -> bool:
        """Return whether the state after a step is to be saved: it is time, or it is the best so far."""
        better = self._stage.keeps_best and validation_loss is not None and validation_loss < self._best
        return better or step % self._stage.save_every == 0

    def save(self, step: int, validation_loss: float | None = None) -> None:
        """Begin to write the checkpoint after `step` steps, when the one before it is whole.

        Raises:
            LlameroError: The one before could not be written, on any process; the same error on all.
        """
        self._finish()
        partial = self._directory / f"step-{step:08}.partial"
        self._first(lambda: _emptied(partial), partial)
        state = state_of(self._weights, lambda parameter, key: self._optimizer.state[parameter][key])
        self._planner.set_up_planner(state, is_coordinator=self._world.speaks)
        plan = self._planned()
        self._planner.take(plan, copied=self._background)
        part = _Part(plan, self._planner, FileSystemWriter(partial, per_thread_copy_ahead=0), partial)
        self._pending = _Pending(step, validation_loss, part)
        part.start()
        if validation_loss is not None:
            self._best = min(self._best, validation_loss)
        if not self._background:
            self._finish()

    def look(self) -> None:
        """Give the checkpoint that is being written its name if all processes have written their parts."""
        pending = self._pending
        if pending is None:
            return
        if self._world.sum([float(pending.part.is_alive())])[0] == 0:
            self._finish()

    def wait(self) -> None:
        """Return when the last checkpoint is whole."""
        self._finish()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shared = (LlameroError, Interrupted) if self._world.size > 1 else Exception  # raised on all processes alike
        if kind is None or issubclass(kind, shared):
            self._finish()
        elif self._pending is not None:
            self._pending.part.stop()

    def _planned(self) -> SavePlan:
        """Return what this process writes; who writes what is agreed once."""
        if self._plan is None:
            plans = self._world.gather(self._planner.create_local_plan())
            plans, self._metadata = self._planner.create_global_plan(plans)
            plan = FileSystemWriter(self._directory).prepare_global_plan(plans)[self._world.rank]
            self._plan = self._planner.finish_plan(plan)
        return self._plan

    def _finish(self) -> None:
        pending = self._pending
        if pending is None:
            return
        part = pending.part
        try:
            part.join()
        except KeyboardInterrupt:
            part.stop()
            raise
        self._pending = None
        said = self._world.gather(part.outcome)
        problems = [outcome.problem for outcome in said if outcome.problem is not None]
        if problems:
            self._first(lambda: shutil.rmtree(part.directory, ignore_errors=True), part.directory)
            raise problems[0].error(part.directory)
        self._first(lambda: self._name(pending, said), part.directory)

    def _name(self, pending: _Pending, said: list[_Outcome]) -> None:
        """Complete a checkpoint, name it, and remove those that are no longer kept."""
        partial = pending.part.directory
        assert self._metadata is not None
        results: list[list[WriteResult]] = [pickle.loads(outcome.results) for outcome in said]
        pending.part.writer.finish(self._metadata, results)
        sums = {name: value for outcome in said for name, value in sorted(outcome.sums.items())}
        sums[".metadata"] = files.sha256(partial / ".metadata")
        about = {"step": pending.step, "validation_loss": pending.validation_loss, "sha256": sums}
        files.write_json(partial / STATE, about)
        files.sync(partial)
        final = partial.with_suffix("")
        if final.exists():
            drop(final)
        partial.rename(final)
        for old in self._superfluous():
            drop(old)

    def _superfluous(self) -> list[Path]:
        """Return the checkpoints that need not be kept: all but the last ones, and the best where it is wanted."""
        there = finished(self._directory)
        old = there[: -self._stage.keep]
        if not self._stage.keeps_best:
            return old
        best = best_of(there)
        return [path for path in old if path != best]

    def _first(self, work: Callable[[], None], partial: Path) -> None:
        """Let the first process do something with a checkpoint, and raise what goes wrong with it on all."""
        problem: _Problem | None = None
        if self._world.speaks:
            try:
                work()
            except (OSError, LlameroError) as error:
                problem = _Problem.of(error)
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would only be in the way
        problem = self._world.told(problem)
        if problem is not None:
            raise problem.error(partial)


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def best_of(checkpoints: list[Path]) -> Path | None:
    """Return the checkpoint with the lowest validation loss, the first of several; `None` if none has one."""
    losses = {path: loss for path in checkpoints if (loss := loss_of(path)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


def refuse_small_disk(directory: Path, stage: StageConfig, spread: Spread, *, steps: int) -> None:
    """Refuse to begin where the disk has no room for the checkpoints and the model of a stage.

    Args:
        directory: Of the checkpoints, or where it will be.
        stage: Says how many checkpoints are kept, and how the model is exported.
        spread: The model.
        steps: Of the stage.
    """
    sizes = {name: math.prod(spec.shape) for name, spec in spread.specs.items()}
    trained = sum(sizes[name] for name in spread.trained)
    one, saves = BYTES * trained, -(-steps // stage.save_every)
    model = sum(sizes.values()) * (4 if stage.export == "float32" else 2) + 8 * trained * stage.export_optimizer
    most = max(min(saves, stage.keep + 1) * one, min(saves, stage.keep) * one + model) + one * stage.keeps_best
    there = next(path for path in (directory, *directory.parents) if path.exists())
    missing = most - one * len(finished(directory)) - shutil.disk_usage(there).free
    missing = spread.world.told(missing)
    if missing > 0:
        raise LlameroError(
            f"the disk is too small for the checkpoints and the model of stage {stage.name}: "
            f"{most / 2**30:,.2f} GiB in all, {missing / 2**30:,.2f} GiB are missing",
            where=there,
            fix="free some space, choose another directory with --out, or keep fewer checkpoints (`keep: 1`)",
        )


@dataclass(frozen=True)
class _Problem:
    """What went wrong on one process, as all of them hear of it."""

    text: str
    fix: str | None = None
    number: int = 0
    """Of the operating system's error."""

    @staticmethod
    def of(error: BaseException) -> _Problem:
        """Return what to say of an error; a full disk may hide behind what torch makes of it."""
        if isinstance(error, LlameroError):
            return _Problem(error.problem, error.fix)
        for cause in _causes(error):
            if isinstance(cause, OSError):
                return _Problem(cause.strerror or str(cause), number=cause.errno or 0)
        return _Problem(f"{type(error).__name__}: {error}")

    def error(self, where: Path) -> LlameroError:
        """Return the error to raise."""
        cause = OSError(self.number, self.text)
        if files.is_disk_full(cause):
            return files.no_room(cause, where)
        text = f"the checkpoint could not be written ({self.text}); those before it are kept"
        return LlameroError(text, where=where, fix=self.fix or "mend this and run the same command again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Outcome(NamedTuple):
    """What a process has to say of its part."""

    problem: _Problem | None = None
    results: bytes = b""
    """Pickled `WriteResult`s, which only the first process opens."""
    sums: dict[str, str] = {}
    """SHA-256 of its files by name."""


class _Copies(DefaultSavePlanner):
    """Hands copies of this process's tensors to the writer; the copies keep their memory from save to save."""

    def __init__(self, *, pinned: bool) -> None:
        super().__init__()
        self._pinned = pinned
        self._taken: dict[MetadataIndex, Tensor] = {}
        self.stopped = threading.Event()

    def take(self, plan: SavePlan, *, copied: bool) -> None:
        """Take what a plan writes; if it is copied to CPU memory, the tensors may change when this returns."""
        for item in plan.items:
            tensor = local(self.lookup_object(item.index)).detach()
            if not copied:
                self._taken[item.index] = tensor
                continue
            if item.index not in self._taken:
                self._taken[item.index] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            self._taken[item.index].copy_(tensor, non_blocking=self._pinned)
        if copied and self._pinned:
            torch.cuda.synchronize()  # the current device is the world's

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return a tensor to write.

        Raises:
            LlameroError: It has numbers that are not finite.
        """
        if self.stopped.is_set():
            raise InterruptedError("stopped")
        tensor = self._taken[write_item.index]
        if not finite(tensor):
            raise LlameroError(f"`{write_item.index.fqn}` has numbers that are not finite", fix="lower `lr`")
        return tensor


class _Part(threading.Thread):
    """Writes this process's part of a checkpoint; `outcome` says what came of it."""

    def __init__(self, plan: SavePlan, planner: _Copies, writer: FileSystemWriter, directory: Path) -> None:
        super().__init__(daemon=True, name="save")
        self._plan, self._planner = plan, planner
        self.writer, self.directory = writer, directory
        self.outcome = _Outcome(_Problem("the writing was cut off"))

    def run(self) -> None:
        """Write; nothing that goes wrong is lost, it is raised where the outcome is looked at."""
        try:
            results = self.writer.write_data(self._plan, self._planner).value()
            names = sorted({result.storage_data.relative_path for result in results})
            sums = {name: files.sha256(self.directory / name) for name in names}
            self.outcome = _Outcome(results=pickle.dumps(results), sums=sums)
        except BaseException as error:
            self.outcome = _Outcome(_Problem.of(error))

    def stop(self) -> None:
        """Let it end after the tensor in hand: nobody waits for this checkpoint."""
        self._planner.stopped.set()
        self.join()


@dataclass
class _Pending:
    step: int
    validation_loss: float | None
    part: _Part
