"""The training loop: the same for language modelling and instruction tuning.

The loss of a step is Σ weight·nll over its supervised tokens divided by Σ weight over the whole step, so
that accumulating k micro-batches is the same as one batch k times as large.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Deferred, Interrupted
from llamero.engine import resume
from llamero.engine.ahead import Ahead
from llamero.engine.batches import Batch, Batches
from llamero.engine.metrics import PROBES, Metrics, Silent, read_lines
from llamero.engine.noise import noise_of
from llamero.engine.optimizer import adamw, load_moments, save_moments
from llamero.engine.phases import PHASES, Phases, largest, memory_of
from llamero.engine.probes import Probe, Prober
from llamero.engine.saving import Saver, best_of, refuse_small_disk
from llamero.engine.schedule import learning_rate
from llamero.engine.stage import StageConfig
from llamero.engine.work import pairs_of, peak_of, work_of
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
    """Of the exported step."""
    exported_step: int
    """The last, or that of the best validation."""
    validation_loss: float | None
    validation_accuracy: float | None
    """Share of the supervised tokens that are the likeliest."""


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
    probe: Probe | None = None,
    saved: Callable[[], None] = lambda: None,
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
        probe: What is asked on the way.
        saved: Told on the first process when a checkpoint is begun, for what may be looked at then.

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
    with world.missing_named():
        first = _begin(spread, stage, optimizer, checkpoints, weights=weights, start=start)
    refuse_small_disk(checkpoints, stage, spread, steps=batches.steps)
    saver = Saver(checkpoints, stage, weights=spread.named(), optimizer=optimizer, world=world)
    run = _Run(spread, stage, batches, seed)
    ahead = Ahead(run.work, range(first, batches.steps))
    bar = progress.Line(f"train {stage.name}", total=batches.steps, unit="steps", done=first)
    with (
        _lines(directory / "metrics.jsonl", first, world) as metrics,
        _prober(probe, directory, first, run) as prober,
        bar,
        ahead,
        Deferred() as stop,
        world.missing_named(),
        saver,
    ):
        for step in range(first, batches.steps):
            world.beat(step)
            line = run.step(step, ahead, optimizer)
            done = step + 1
            last = done == batches.steps
            if validation is not None and (last or (stage.eval_every and done % stage.eval_every == 0)):
                with run.phases("validation"):
                    line |= run.validate(validation, step)
            if prober is not None and prober.due(done, last=last):
                with run.phases("probe"):
                    line |= prober.ask(done)
            with run.phases("save"):
                saver.look()
            stopped = run.compare(line, stop.asked)
            metrics.write(line)
            bar.advance(1, _note(line))
            if saver.wants(done, line.get("validation_loss")) or stopped or last:
                with run.phases("save"):
                    metrics.sync()  # a checkpoint must not outlive the lines before it
                    saver.save(done, line.get("validation_loss"))
                    if world.speaks:
                        saved()
            if stopped or (last and world.any(stop.asked)):
                saver.wait()
                raise Interrupted(f"stage {stage.name} is saved after step {done} of {batches.steps}")
    with world.missing_named():
        exported = _take_best(checkpoints, spread, optimizer) if stage.export_best else batches.steps
        if stage.export_optimizer:
            save_moments(directory, spread=spread, optimizer=optimizer)
        outcome = world.told(_outcome(read_lines(directory / "metrics.jsonl"), exported) if world.speaks else None)
        assert outcome is not None
        export(spread)
    return outcome


def _take_best(checkpoints: Path, spread: Spread, optimizer: torch.optim.Optimizer) -> int:
    """Go back to the checkpoint with the lowest validation loss and return its step."""
    world = spread.world
    with world.together():
        best = best_of(resume.finished(checkpoints)) if world.speaks else None
    best = world.told(best)
    if best is None:
        raise LlameroError(
            "`export_best`: no checkpoint has a validation loss",
            where=checkpoints,
            fix="remove this directory: the stage begins again",
        )
    step = int(best.name.removeprefix("step-"))
    return resume.load(checkpoints, weights=spread.named(), optimizer=optimizer, world=world, step=step)


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
        with world.together():
            load_moments(start, spread=spread, optimizer=optimizer)
    return first


def _lines(path: Path, first: int, world: World) -> AbstractContextManager[Metrics | Silent]:
    return Metrics(path, step=first) if world.speaks else nullcontext(Silent())


@contextmanager
def _prober(probe: Probe | None, directory: Path, first: int, run: "_Run") -> Iterator[Prober | None]:
    if probe is None:
        yield None
        return
    with _lines(directory / PROBES, first, run.world) as file:
        yield Prober(probe, run.stage, run.spread, sweep=run.nll, file=file)


def _note(line: Mapping[str, float]) -> str:
    mfu = f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
    return f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s{mfu}"


def autocast(stage: StageConfig, device: torch.device) -> torch.dtype | None:
    """Return the precision of products, or nothing where it is that of the weights."""
    wanted = stage.precision
    if wanted == "float32" or (wanted == "auto" and device.type == "cpu"):
        return None
    return torch.bfloat16


def _outcome(lines: list[dict[str, float]], exported: int) -> Outcome:
    """Return the sum of a stage, over all the runs that it took."""
    line = lines[exported - 1]
    return Outcome(
        steps=len(lines),
        tokens=int(sum(line["tokens"] for line in lines)),
        supervised_tokens=int(sum(line["supervised_tokens"] for line in lines)),
        loss=line["loss"],
        exported_step=exported,
        validation_loss=line.get("validation_loss"),
        validation_accuracy=line.get("validation_accuracy"),
    )


@dataclass(frozen=True)
class _Known:
    """What batches have; as plain numbers it can be summed over processes."""

    weight: float
    tokens: float
    supervised: float
    pairs: float
    """Of tokens that attention compares."""
    weights: Sequence[float]
    """Of each source."""
    targets: Sequence[float]
    """Supervised tokens of each source."""

    def flat(self, factor: float = 1.0) -> list[float]:
        """Return all numbers times a factor."""
        numbers = [self.weight, self.tokens, self.supervised, self.pairs, *self.weights, *self.targets]
        return [factor * number for number in numbers]

    @classmethod
    def of(cls, flat: Sequence[float]) -> "_Known":
        """Return what `flat` was made of."""
        size = (len(flat) - 4) // 2
        weight, tokens, supervised, pairs = flat[:4]
        return cls(weight, tokens, supervised, pairs, flat[4 : 4 + size], flat[4 + size :])


def _each(key: str, batches: Batches, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """Return the mean of each source that there is something of; nothing where sources are not told apart."""
    found = zip(batches.sources, sums, counts, strict=False)
    return {f"{key}/{name}": total / count for name, total, count in found if count}


class Work(NamedTuple):
    """What a step is on this process."""

    rows: list[int]
    """Of the whole step."""
    parts: list[Batch]
    """This process's micro-batches: as many on every process, the last ones perhaps empty."""
    micros: list[Micro]
    """The same, as they go through the model."""
    known: "_Known"


class _Run:
    def __init__(self, spread: Spread, stage: StageConfig, batches: Batches, seed: int) -> None:
        self.spread, self.stage, self.batches, self.seed = spread, stage, batches, seed
        self.world = spread.world
        # what every process of one share of the rows knows must be counted once
        alone = self.world.along("pipeline") == 0 and self.world.along("tensor") == 0
        self._counts, self._says_loss = float(alone), float(self.world.along("tensor") == 0)
        self.phases = Phases(self.world.device)
        self._work = work_of(spread.config, spread.specs, spread.trained)
        self._peak = peak_of(self.world.device, autocast(stage, self.world.device))

    def work(self, step: int) -> Work:
        """Return the work of a step; it touches neither model nor device, and may be made in another thread."""
        rows = self.batches.rows_of(step)
        parts = self._share(self.batches, rows)
        return Work(rows, parts, [self._micro(part, step) for part in parts], self._known(parts, self.batches))

    def step(self, step: int, ahead: "Ahead[Work]", optimizer: torch.optim.Optimizer) -> dict[str, float | int]:
        """Take one optimizer step and return its line of metrics."""
        began = time.monotonic()
        rate = learning_rate(self.stage, step, steps=self.batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with self.phases("data"):
            work = ahead.take(step)
        with self.phases("forward_backward"):
            said = _Known.of(self.world.sum(work.known.flat(self._counts)))
            tally = self._blank(self.batches, kinds=min(1, len(self.batches.sources)))
            own = self.spread.losses(work.micros, total=said.weight, z_loss=self.stage.z_loss, tally=tally)
        with self.phases("clip"):
            norm, loss, *by_source = self.spread.clip(self.stage.clip or math.inf, *self._once(own, tally))
        if not math.isfinite(loss) or not math.isfinite(norm):  # before the weights take any of it
            what = f"loss of step {step + 1} is {loss}, its gradient's norm {norm}"
            raise self._not_finite(what, work.rows, work.parts)
        with self.phases("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        line = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm}
        line |= _each("loss", self.batches, by_source, said.weights)
        line |= {"tokens": int(said.tokens), "supervised_tokens": int(said.supervised)}
        return line | self._speed(said, time.monotonic() - began)

    def _speed(self, said: "_Known", seconds: float) -> dict[str, float]:
        devices, speed = self.world.parallel.gpus, said.tokens / seconds
        line = {"tokens_per_second": round(speed, 1), "tokens_per_second_per_gpu": round(speed / devices, 1)}
        if self._peak is not None:
            flops = self._work.of(tokens=said.tokens, pairs=said.pairs, supervised=said.supervised)
            line["mfu"] = round(flops / seconds / (devices * self._peak), 4)
        return line

    def compare(self, line: dict[str, float | int], asked: bool) -> bool:
        """Add the time and memory of the process that needed most, and return whether any is asked to stop.

        One sum over all processes is the price. What follows it in a step, such as saving, counts in the next line.
        """
        memory = memory_of(self.world.device)
        found, stopped = largest(self.world, [*self.phases.taken(), *memory.values()], asked)
        for name, (value, rank) in zip((*PHASES, *memory), found, strict=True):
            if name in memory:
                line[name] = round(value, 3)
            elif value:
                line[f"time/{name}"] = round(value, 4)
                if self.world.size > 1:
                    line[f"slowest/{name}"] = rank
        return stopped

    def _blank(self, batches: Batches, *, kinds: int) -> Tensor | None:
        """Return what numbers of each source are added up in; nothing where nobody asks."""
        size = kinds, max(1, len(batches.sources))
        return torch.zeros(size, dtype=torch.float64, device=self.world.device) if kinds else None

    def _once(self, own: Tensor, tally: Tensor | None) -> tuple[Tensor, ...]:
        """Return a loss and a tally as numbers that can be summed over all processes."""
        said = own[None] if tally is None else torch.cat([own[None], tally.flatten()])
        return (self._says_loss * said).unbind()

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

    def _known(self, parts: Sequence[Batch], batches: Batches) -> "_Known":
        """Return what batches have."""
        sources = torch.zeros(2, max(1, len(batches.sources)), dtype=torch.float64)
        for part in parts:
            sources[0].index_add_(0, part.sources, part.weights.double())
            sources[1].index_add_(0, part.sources, torch.ones_like(part.weights).double())
        real = [part for part in parts if part.documents]
        return _Known(
            sum(float(part.weights.sum()) for part in parts),
            sum(part.tokens for part in parts),
            sum(len(part.targets) for part in parts),
            sum(pairs_of(part.lengths) for part in real),
            weights=sources[0].tolist(),
            targets=sources[1].tolist(),
        )

    def _not_finite(self, what: str, rows: Sequence[int], parts: Sequence[Batch]) -> LlameroError:
        mine = [number for part in parts for number in part.documents]
        documents = {number for said in self.world.gather(mine) for number in said}
        return LlameroError(
            f"the {what} (rows {_few(rows)}; documents {_few(sorted(documents))})",
            where=f"stage {self.stage.name}",
            fix="lower `lr`, or look at these documents; the last checkpoint before this step is kept",
        )

    def validate(self, validation: Batches, step: int) -> dict[str, float]:
        """Return loss per unit of weight and accuracy on supervised tokens over all validation rows.

        Raises:
            LlameroError: If the loss is not finite.
        """
        total = self._sweep(validation, f"validation loss after step {step + 1}", kinds=2)
        size = max(1, len(validation.sources))
        nll, right, said = total[1 : 1 + size], total[1 + size : 1 + 2 * size], _Known.of(total[1 + 2 * size :])
        line = {"validation_loss": total[0] / said.weight, "validation_accuracy": sum(right) / said.supervised}
        line |= _each("validation_loss", validation, nll, said.weights)
        return line | _each("validation_accuracy", validation, right, said.targets)

    def nll(self, batches: Batches) -> list[float]:
        """Return Σ weight·nll of each source over all rows of batches."""
        return self._sweep(batches, "loss of a probe", kinds=1)[1 : 1 + max(1, len(batches.sources))]

    def _sweep(self, batches: Batches, what: str, *, kinds: int) -> list[float]:
        """Return, summed over all rows: the loss, the tally, and what the rows have."""
        at_once = self.spread.passes.rows * self.spread.passes.count * self.world.parallel.data
        if self.world.size == 1:
            at_once = self.spread.passes.rows
        total: list[float] = []
        for start in range(0, len(batches), at_once):
            rows = range(start, min(start + at_once, len(batches)))
            parts = self._share(batches, rows)
            tally = self._blank(batches, kinds=kinds)
            own = self.spread.losses([_plain(part) for part in parts], backward=False, tally=tally)
            known = self._known(parts, batches).flat(self._counts)
            more = self.world.sum([*torch.stack(self._once(own, tally)).tolist(), *known])
            total = [a + b for a, b in zip(total, more, strict=True)] if total else more
            if not math.isfinite(total[0]):
                raise self._not_finite(f"{what} is {total[0]}", rows, parts)
        return total


NOTHING = torch.zeros(0, dtype=torch.int64)
EMPTY = Batch(torch.zeros(1, dtype=torch.int64), (1,), NOTHING, NOTHING, torch.zeros(0), (), (), NOTHING)
"""What a process passes through the model when the others have a row more."""


def _plain(batch: Batch) -> Micro:
    return Micro(batch.ids, batch.lengths, batch.learned, batch.targets, batch.weights, sources=batch.sources)


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
