"""The training loop: the same for language modelling and instruction tuning.

The loss of a step is Σ weight·nll over its supervised tokens divided by Σ weight over the whole step, so
that accumulating k micro-batches is the same as one batch k times as large.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Deferred, Interrupted
from llamero.engine import resume
from llamero.engine.batches import Batch, Batches
from llamero.engine.metrics import Metrics, read_lines
from llamero.engine.noise import noise_of
from llamero.engine.optimizer import adamw, load_moments, save_moments
from llamero.engine.schedule import learning_rate
from llamero.engine.stage import StageConfig
from llamero.kernels.cross_entropy import linear_cross_entropy
from llamero.model.dropout import Noise
from llamero.model.llama import Llama
from llamero.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Outcome:
    """What a finished stage can say of itself."""

    steps: int
    tokens: int
    supervised_tokens: int
    loss: float
    """Of the last step."""
    validation_loss: float | None


def train(
    model: Llama,
    batches: Batches,
    stage: StageConfig,
    directory: Path,
    *,
    parallel: ParallelConfig,
    validation: Batches | None = None,
    seed: int = 0,
    start: Path | None = None,
) -> Outcome:
    """Train a model in place, from the last checkpoint in `directory` if there is one.

    Args:
        model: In float32, on its device.
        batches: Every batch of the stage.
        stage: How to train.
        directory: For checkpoints and metrics.jsonl.
        parallel: How many rows go through the model at a time.
        validation: Rows to measure the loss on every `eval_every` steps and at the end.
        seed: Decides, with the step and the samples, what is dropped.
        start: Directory that the model comes from, for `optimizer: keep`.

    Raises:
        LlameroError: If the loss is not finite; the last checkpoint is kept.
        Interrupted: After Ctrl-C, when the step in hand is saved.
    """
    if problem := stage.too_long(batches.steps):
        raise LlameroError(problem, where=f"stage {stage.name}", fix="lower it, or train longer")
    optimizer = adamw(model, stage)
    checkpoints = directory / "checkpoints"
    first = resume.load(checkpoints, model=model, optimizer=optimizer)
    if stage.optimizer == "keep" and not first:
        if start is None:
            where, fix = f"stage {stage.name}", "set `optimizer: fresh`"
            raise LlameroError("`optimizer: keep`, but no stage comes before this one", where=where, fix=fix)
        load_moments(start, model=model, optimizer=optimizer)
    run = _Run(model, stage, batches, parallel, seed)
    bar = progress.Line(f"train {stage.name}", total=batches.steps, unit="steps", done=first)
    with Metrics(directory / "metrics.jsonl", step=first) as metrics, bar, Deferred() as stop:
        for step in range(first, batches.steps):
            line = run.step(step, optimizer)
            done = step + 1
            last = done == batches.steps
            if validation is not None and (last or (stage.eval_every and done % stage.eval_every == 0)):
                line["validation_loss"] = run.validate(validation, step)
            metrics.write(line)
            bar.advance(1, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")
            if done % stage.save_every == 0 or stop.asked or last:
                metrics.sync()  # a checkpoint must not outlive the lines before it
                resume.save(checkpoints, step=done, model=model, optimizer=optimizer)
            if stop.asked:
                raise Interrupted(f"stage {stage.name} is saved after step {done} of {batches.steps}")
    if stage.export_optimizer:
        save_moments(directory, model=model, optimizer=optimizer)
    return _outcome(read_lines(directory / "metrics.jsonl"))


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
    def __init__(self, model: Llama, stage: StageConfig, batches: Batches, parallel: ParallelConfig, seed: int) -> None:
        self.model, self.stage, self.batches, self.seed = model, stage, batches, seed
        self.device = model.model.embed_tokens.weight.device
        self.micro = parallel.micro_batch or stage.batch

    def step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float | int]:
        """Take one optimizer step and return its line of metrics."""
        began = time.monotonic()
        rate = learning_rate(self.stage, step, steps=self.batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = self.batches.rows_of(step)
        parts = [self.batches.assemble(rows[i : i + self.micro]) for i in range(0, len(rows), self.micro)]
        total_weight = sum(float(part.weights.sum()) for part in parts)
        loss = 0.0
        for part in parts:
            share = self._loss_sum(part, self._noise(part, step), self.stage.z_loss) / total_weight
            share.backward()
            loss += share.item()
        norm = self._clip()
        if not math.isfinite(loss) or not math.isfinite(norm):  # before the weights take any of it
            what = f"loss of step {step + 1} is {loss}, its gradient's norm {norm}"
            raise self._not_finite(what, rows, [number for part in parts for number in part.documents])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens, supervised = sum(len(p.ids) for p in parts), sum(len(p.targets) for p in parts)
        seconds = time.monotonic() - began
        line = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens}
        line |= {"supervised_tokens": supervised, "tokens_per_second": round(tokens / seconds, 1)}
        if self.device.type == "cuda":
            line["max_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        return line

    def _noise(self, part: Batch, step: int) -> Noise | None:
        layers = self.model.config.num_layers
        return noise_of(part, self.stage, layers=layers, seed=self.seed, step=step, device=self.device)

    def _loss_sum(self, part: Batch, noise: Noise | None = None, z_loss: float = 0.0) -> Tensor:
        with self._precision():
            hidden = self.model.packed_hidden(part.ids.to(self.device), part.lengths, noise)
            learned = hidden if len(part.learned) == len(part.ids) else hidden[part.learned.to(self.device)]
            targets, weights = part.targets.to(self.device), part.weights.to(self.device)
            return linear_cross_entropy(learned, self.model.lm_head.weight, targets, weights, z_loss)

    def _precision(self) -> AbstractContextManager[object]:
        wanted = self.stage.precision
        if wanted == "float32" or (wanted == "auto" and self.device.type == "cpu"):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _clip(self) -> float:
        limit = self.stage.clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def _not_finite(self, what: str, rows: Sequence[int], documents: Sequence[int]) -> LlameroError:
        return LlameroError(
            f"the {what} (rows {_few(rows)}; documents {_few(sorted(set(documents)))})",
            where=f"stage {self.stage.name}",
            fix="lower `lr`, or look at these documents; the last checkpoint before this step is kept",
        )

    @torch.no_grad()
    def validate(self, validation: Batches, step: int) -> float:
        """Return the loss per unit of weight over all validation rows; it must be finite."""
        loss = weight = 0.0
        for start in range(0, len(validation), self.micro):
            rows = range(start, min(start + self.micro, len(validation)))
            part = validation.assemble(rows)
            loss += self._loss_sum(part).item()
            if not math.isfinite(loss):
                raise self._not_finite(f"validation loss after step {step + 1} is {loss}", rows, part.documents)
            weight += float(part.weights.sum())
        return loss / weight


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
