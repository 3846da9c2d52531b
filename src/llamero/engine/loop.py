"""The training loop: the same for language modelling and instruction tuning.

The loss of a step is Σ weight·nll over its supervised tokens divided by Σ weight over the whole step, so
that accumulating k micro-batches is the same as one batch k times as large.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Deferred, Interrupted
from llamero.engine import resume
from llamero.engine.batches import Batch, Batches
from llamero.engine.metrics import Metrics, read_lines
from llamero.engine.noise import noise_of
from llamero.engine.optimizer import adamw, load_moments, save_moments
from llamero.engine.saving import Saver, best_of, refuse_small_disk
from llamero.engine.schedule import learning_rate
from llamero.engine.stage import StageConfig
from llamero.model.llama import Llama
from llamero.model.weights import Weights
from llamero.parallel.config import ParallelConfig
from llamero.parallel.part import Micro
from llamero.parallel.spread import Spread
from llamero.parallel.world import World


@dataclass(frozen=True)
class Outcome:
    """What a finished stage can say of itself."""

    steps: int
    tokens: int
    supervised_tokens: int
    loss: float
    """Of the last step."""
    validation_loss: float | None


def train(  # noqa: PLR0913  (all that a stage is)
    model: Llama,
    batches: Batches,
    stage: StageConfig,
    directory: Path,
    *,
    parallel: ParallelConfig,
    validation: Batches | None = None,
    export: Callable[[Spread], None] = lambda spread: None,
    seed: int = 0,
    start: Path | None = None,
    weights: Weights | None = None,
    world: World | None = None,
) -> Outcome:
    """Train a model in place, from the last checkpoint in `directory` if there is one.

    Args:
        model: In float32, the same on every process, or on the meta device; its modules are spread over the processes
            in place.
        batches: Every batch of the stage.
        stage: How to train.
        directory: For checkpoints and metrics.jsonl.
        parallel: Over which devices, and how many rows go through the model at a time.
        validation: Rows to measure the loss on every `eval_every` steps and at the end.
        export: Told of the trained model.
        seed: Decides, with the step and the samples, what is dropped.
        start: Directory that the model comes from, for `optimizer: keep`.
        weights: What a model on the meta device is filled with; a checkpoint overrides what is trained, unread.
        world: The processes, where they have met already.

    Raises:
        LlameroError: If the loss is not finite; the last checkpoint is kept.
        Interrupted: After Ctrl-C, when the step in hand is saved.
    """
    if problem := stage.too_long(batches.steps):
        raise LlameroError(problem, where=f"stage {stage.name}", fix="lower it, or train longer")
    world = world or World(parallel)
    precision = autocast(stage, world.device)
    spread = Spread(model, world, batch=batches.batch, sequence=stage.sequence, autocast=precision)
    spread.allocate()
    optimizer = adamw(spread.module, stage)
    checkpoints = directory / "checkpoints"
    first = _begin(spread, stage, optimizer, checkpoints, weights=weights, start=start)
    refuse_small_disk(checkpoints, stage, spread, steps=batches.steps)
    saver = Saver(checkpoints, stage, weights=spread.named(), optimizer=optimizer, world=world)
    run = _Run(spread, stage, batches, seed)
    bar = progress.Line(f"train {stage.name}", total=batches.steps, unit="steps", done=first)
    with _metrics(directory, first, world) as metrics, bar, Deferred() as stop, world.missing_named(), saver:
        for step in range(first, batches.steps):
            world.beat(step)
            line = run.step(step, optimizer)
            done = step + 1
            last = done == batches.steps
            if validation is not None and (last or (stage.eval_every and done % stage.eval_every == 0)):
                line["validation_loss"] = run.validate(validation, step)
            saver.look()
            line["save_seconds"] = round(saver.waited(), 3)
            metrics.write(line)
            bar.advance(1, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")
            stopped = world.any(stop.asked)
            if saver.wants(done, line.get("validation_loss")) or stopped or last:
                metrics.sync()  # a checkpoint must not outlive the lines before it
                saver.save(done, line.get("validation_loss"))
            if stopped or (last and world.any(stop.asked)):
                saver.wait()
                raise Interrupted(f"stage {stage.name} is saved after step {done} of {batches.steps}")
    if stage.export_best:
        _take_best(checkpoints, spread, optimizer)
    if stage.export_optimizer:
        save_moments(directory, spread=spread, optimizer=optimizer)
    outcome = world.told(_outcome(read_lines(directory / "metrics.jsonl")) if world.speaks else None)
    assert outcome is not None
    export(spread)
    return outcome


def _take_best(checkpoints: Path, spread: Spread, optimizer: torch.optim.Optimizer) -> None:
    """Go back to the checkpoint with the lowest validation loss."""
    world = spread.world
    best = world.told(best_of(resume.finished(checkpoints)) if world.speaks else None)
    if best is None:
        raise LlameroError(
            "`export_best`: no checkpoint has a validation loss",
            where=checkpoints,
            fix="remove this directory: the stage begins again",
        )
    step = int(best.name.removeprefix("step-"))
    resume.load(checkpoints, weights=spread.named(), optimizer=optimizer, world=world, step=step)


def _begin(
    spread: Spread,
    stage: StageConfig,
    optimizer: torch.optim.Optimizer,
    checkpoints: Path,
    *,
    weights: Weights | None,
    start: Path | None,
) -> int:
    """Fill model and optimizer and return how many steps are done: a checkpoint overrides what is trained, unread."""
    world = spread.world
    first = resume.load(checkpoints, weights=spread.named(), optimizer=optimizer, world=world)
    if weights is not None:
        with world.together():
            spread.fill(weights, trained=not first)
    if stage.optimizer == "keep" and not first:
        if start is None:
            where, fix = f"stage {stage.name}", "set `optimizer: fresh`"
            raise LlameroError("`optimizer: keep`, but no stage comes before this one", where=where, fix=fix)
        load_moments(start, spread=spread, optimizer=optimizer)
    return first


class _Silent:
    """Metrics of a process that is not the first."""

    def write(self, values: Mapping[str, float | int]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Have nothing to sync."""


def _metrics(directory: Path, first: int, world: World) -> AbstractContextManager[Metrics | _Silent]:
    return Metrics(directory / "metrics.jsonl", step=first) if world.speaks else nullcontext(_Silent())


def autocast(stage: StageConfig, device: torch.device) -> torch.dtype | None:
    """Return the precision of products, or nothing where it is that of the weights."""
    wanted = stage.precision
    if wanted == "float32" or (wanted == "auto" and device.type == "cpu"):
        return None
    return torch.bfloat16


def _outcome(lines: list[dict[str, float]]) -> Outcome:
    """Return the sum of a stage, over all the runs that it took."""
    return Outcome(
        steps=len(lines),
        tokens=int(sum(line["tokens"] for line in lines)),
        supervised_tokens=int(sum(line["supervised_tokens"] for line in lines)),
        loss=lines[-1]["loss"],
        validation_loss=lines[-1].get("validation_loss"),
    )


class _Run:
    def __init__(self, spread: Spread, stage: StageConfig, batches: Batches, seed: int) -> None:
        self.spread, self.stage, self.batches, self.seed = spread, stage, batches, seed
        self.world = spread.world
        # what every process of one share of the rows knows must be counted once
        alone = self.world.along("pipeline") == 0 and self.world.along("tensor") == 0
        self._counts, self._says_loss = float(alone), float(self.world.along("tensor") == 0)

    def step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float | int]:
        """Take one optimizer step and return its line of metrics."""
        began = time.monotonic()
        rate = learning_rate(self.stage, step, steps=self.batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = self.batches.rows_of(step)
        parts = self._share(self.batches, rows)
        known = self._known(parts)
        weight, tokens, supervised = self.world.sum([self._counts * number for number in known])
        micros = [self._micro(part, step) for part in parts]
        own = self.spread.losses(micros, total=weight, z_loss=self.stage.z_loss)
        norm, loss = self.spread.clip(self.stage.clip or math.inf, self._says_loss * own)
        if not math.isfinite(loss) or not math.isfinite(norm):  # before the weights take any of it
            what = f"loss of step {step + 1} is {loss}, its gradient's norm {norm}"
            raise self._not_finite(what, rows, parts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        line = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": int(tokens)}
        line |= {"supervised_tokens": int(supervised), "tokens_per_second": round(tokens / seconds, 1)}
        device = self.world.device
        if device.type == "cuda":
            line["max_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        return line

    def _share(self, batches: Batches, rows: Sequence[int]) -> list[Batch]:
        """Return this process's micro-batches of a step: as many on every process, the last ones perhaps empty."""
        ranks, rank, passes = self.world.parallel.data, self.world.data_rank, self.spread.passes
        mine = rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]
        count = passes.count if self.world.size > 1 else -(-len(mine) // passes.rows)
        slices = [mine[i * passes.rows : (i + 1) * passes.rows] for i in range(count)]
        return [batches.assemble(some) if some else EMPTY for some in slices]

    def _micro(self, part: Batch, step: int) -> Micro:
        """Return what goes through the model in training, where noise falls on it."""
        noise = None
        if part.documents:
            layers, device = self.spread.config.num_layers, torch.device("cpu")
            noise = noise_of(part, self.stage, layers=layers, seed=self.seed, step=step, device=device)
        return _plain(part)._replace(noise=noise)

    def _known(self, parts: Sequence[Batch]) -> tuple[float, int, int]:
        """Return weight, tokens and supervised tokens of batches."""
        weight = sum(float(part.weights.sum()) for part in parts)
        return weight, sum(part.tokens for part in parts), sum(len(part.targets) for part in parts)

    def _not_finite(self, what: str, rows: Sequence[int], parts: Sequence[Batch]) -> LlameroError:
        mine = [number for part in parts for number in part.documents]
        documents = {number for said in self.world.gather(mine) for number in said}
        return LlameroError(
            f"the {what} (rows {_few(rows)}; documents {_few(sorted(documents))})",
            where=f"stage {self.stage.name}",
            fix="lower `lr`, or look at these documents; the last checkpoint before this step is kept",
        )

    def validate(self, validation: Batches, step: int) -> float:
        """Return the loss per unit of weight over all validation rows; it must be finite."""
        loss = weight = 0.0
        at_once = self.spread.passes.rows * self.spread.passes.count * self.world.parallel.data
        if self.world.size == 1:
            at_once = self.spread.passes.rows
        for start in range(0, len(validation), at_once):
            rows = range(start, min(start + at_once, len(validation)))
            parts = self._share(validation, rows)
            own = self.spread.losses([_plain(part) for part in parts], backward=False).item()
            more, heavier = self.world.sum([self._says_loss * own, self._counts * self._known(parts)[0]])
            loss, weight = loss + more, weight + heavier
            if not math.isfinite(loss):
                raise self._not_finite(f"validation loss after step {step + 1} is {loss}", rows, parts)
        return loss / weight


NOTHING = torch.zeros(0, dtype=torch.int64)
EMPTY = Batch(torch.zeros(1, dtype=torch.int64), (1,), NOTHING, NOTHING, torch.zeros(0), (), (), NOTHING)
"""What a process passes through the model when the others have a row more."""


def _plain(batch: Batch) -> Micro:
    return Micro(batch.ids, batch.lengths, batch.learned, batch.targets, batch.weights)


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
