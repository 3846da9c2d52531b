"""What is known of the data of a stage before it is trained: from the run directory, or from what somebody says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llamero.core import artifact
from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus.dataset import Dataset
from llamero.engine.batches import Batches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from llamero.engine.stage import StageConfig
    from llamero.recipe.schema import Recipe

FILL = 0.98
"""Share of the places of packed rows that hold a token, where it is not known: what best-fit leaves of chats."""


@dataclass(frozen=True)
class Said:
    """What somebody says of a stage's data."""

    tokens: int
    samples: int | None = None

    @classmethod
    def parse(cls, text: str) -> tuple[str, Said]:
        """Return the stage and what is said of it: `STAGE=TOKENS` or `STAGE=TOKENS/SAMPLES`.

        Raises:
            LlameroError: If it is neither.
        """
        stage, _, numbers = text.partition("=")
        tokens, slash, samples = numbers.replace(",", "").replace("_", "").partition("/")
        fix = "write for example --tokens sft=375772920, or with the samples --tokens sft=375772920/793569"
        try:
            said = cls(int(tokens), int(samples) if slash else None)
        except ValueError as error:
            raise LlameroError(f"`--tokens {text}` is not STAGE=TOKENS[/SAMPLES]", fix=fix) from error
        if not stage or said.tokens < 1 or (said.samples is not None and not 1 <= said.samples <= said.tokens):
            raise LlameroError(f"`--tokens {text}` is not STAGE=TOKENS[/SAMPLES]", fix=fix)
        return stage, said


@dataclass(frozen=True)
class Data:
    """What the plan of a stage needs to know of its data."""

    rows: int
    """Packed rows of a step, of the largest where they differ."""
    step_tokens: float
    """Tokens of a step, on average."""
    steps: int | None
    """Nothing where it depends on what is not known."""
    attended: float | None
    """Tokens that a token sees on average; nothing where rows may be one document each."""
    learned: float
    """Share of the tokens that are learned."""
    notes: tuple[str, ...]
    """Where it is known from, and what is assumed."""

    @property
    def tokens(self) -> int | None:
        """Return the tokens of all steps."""
        return None if self.steps is None else round(self.steps * self.step_tokens)


def of_stage(stage: StageConfig, recipe: Recipe, out: Path, said: Said | None) -> Data:
    """Return what is known: what is said, else what stands tokenized in the run directory, else the recipe alone.

    Args:
        stage: The stage.
        recipe: Its recipe.
        out: The run directory, which need not be there.
        said: What somebody says of the data.
    """
    if said is not None:
        return _from_said(stage, said)
    directory = _tokenized(stage, recipe, out)
    return _from_recipe(stage) if directory is None else _from_dataset(stage, directory, recipe.seed)


def sayings(texts: Sequence[str], recipe: Recipe) -> Mapping[str, Said]:
    """Return what is said of each stage.

    Raises:
        LlameroError: If the recipe has no such stage.
    """
    found = dict(Said.parse(text) for text in texts)
    names = [stage.name for stage in recipe.train]
    for name in found:
        if name not in names:
            fix = did_you_mean(name, names) if names else "the recipe has no stages"
            raise LlameroError(f"--tokens: there is no stage `{name}`", fix=fix)
    return found


def _tokenized(stage: StageConfig, recipe: Recipe, out: Path) -> Path | None:
    """Return the dataset in a run directory that was made of the stage's mixture as the recipe has it."""
    wanted = {
        "mixture": recipe.data.mixtures[stage.mixture].decides(),
        "template": recipe.template,
        "seed": recipe.seed,
    }
    for path in sorted(out.glob(f"data-{stage.mixture}-*/{artifact.MANIFEST}")):
        found = artifact.read(path.parent)
        if all(found.config.get(key) == value for key, value in wanted.items()):
            return path.parent
    return None


def _from_dataset(stage: StageConfig, directory: Path, seed: int) -> Data:
    dataset = Dataset(directory)
    tokens, roles = dataset.tokens("train"), dataset.roles("train")
    if roles is None:
        raise LlameroError("the dataset has no roles, so nobody knows what is to be learned", where=directory)
    batches = Batches(tokens, roles, stage, seed=seed, where=directory.name)
    report = batches.report
    lengths = np.minimum(tokens.lengths.astype(np.float64) - 1, stage.sequence)
    attended = float((lengths * (lengths + 1) / 2).sum() / max(1.0, lengths.sum()))
    per_row = report.fill * stage.sequence
    rows = len(batches) / batches.steps if stage.batch_samples else batches.batch
    learned = report.supervised_tokens / max(1, report.tokens)
    return Data(batches.batch, per_row * rows, batches.steps, attended, learned, (f"data: {directory}",))


def _from_said(stage: StageConfig, said: Said) -> Data:
    rows, step = stage.batch, stage.batch * stage.sequence * FILL
    notes = ["data: as said by --tokens; every token is taken to be learned"]
    attended = None
    if said.samples is not None:
        mean = said.tokens / said.samples
        attended = (min(mean, stage.sequence) + 1) / 2
        notes.append(
            f"samples are taken to be alike, {mean:,.1f} tokens each; where they are not, attention takes more"
        )
    if stage.batch_samples is not None:
        if said.samples is None:
            notes.append(f"a step has {stage.batch} rows at most: how many, --tokens with /SAMPLES would tell")
        else:
            step = stage.batch_samples * said.tokens / said.samples
            rows = min(stage.batch, math.ceil(step / (FILL * stage.sequence)))
            notes.append(f"{stage.batch_samples} samples of a step are about {rows} packed rows")
    steps = stage.steps
    if steps is None and stage.epochs is not None:
        steps = math.ceil(stage.epochs * said.tokens / step)
    return Data(rows, step, steps, attended, 1.0, tuple(notes))


def _from_recipe(stage: StageConfig) -> Data:
    notes = ["data: not tokenized yet; rows are taken to be full, one sample each, and all of it to be learned"]
    if stage.batch_samples is not None:
        notes.append(
            f"a step has {stage.batch} rows at most: samples are packed, and how many rows they need is known once "
            "`llamero data tokenize` has run, or by --tokens STAGE=TOKENS/SAMPLES"
        )
    if stage.steps is None:
        notes.append("`epochs` become steps once `llamero data tokenize` has run, or by --tokens STAGE=TOKENS")
    return Data(stage.batch, stage.batch * stage.sequence, stage.steps, None, 1.0, tuple(notes))
