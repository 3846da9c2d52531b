"""Small questions between training steps: how many are answered right, and what the model says to a few prompts.

Questions go through the model as it is spread, whatever the layout: each possible answer is a document, and its
log-likelihood is what validation would sum over its tokens. Nothing here touches weights, gradients, the optimizer or
the order of the data, so training ends in the same bits with probes and without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from llamero.corpus.dataset import Sources
from llamero.engine.batches import Batches
from llamero.engine.metrics import Metrics, Sample, Silent
from llamero.engine.stage import Learn, StageConfig
from llamero.parallel.spread import Spread
from llamero.text.messages import Role

Answers = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Ids of the question and of one possible answer, of each."""


@dataclass(frozen=True)
class Probe:
    """What is asked, and what is made of the answers."""

    every: int
    """Steps between probes; the last step has one too."""
    questions: Sequence[Answers]
    judge: Callable[[Sequence[Sequence[float]]], dict[str, float]]
    """Makes numbers, whose names begin with `probe_`, of the log-likelihoods of each question's answers."""
    speak: Callable[[Spread], list[Sample]]
    """Returns what the model says to some prompts, on the first process; all take part."""


class Prober:
    """Asks while a stage trains.

    Args:
        probe: What.
        stage: Its sequence length bounds that of the questions.
        spread: The model.
        sweep: Returns Σ −log p over the tokens of each source of batches.
        file: Where the answers go.

    Raises:
        LlameroError: A question with its answer is longer than the stage's sequence.
    """

    def __init__(
        self,
        probe: Probe,
        stage: StageConfig,
        spread: Spread,
        *,
        sweep: Callable[[Batches], Sequence[float]],
        file: Metrics | Silent,
    ) -> None:
        self._probe, self._spread, self._sweep, self._file = probe, spread, sweep, file
        self._batches = _batches(probe.questions, stage) if probe.questions else None

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether something is asked after a step."""
        return last or step % self._probe.every == 0

    def ask(self, step: int) -> dict[str, float]:
        """Ask everything, write it down, and return the numbers."""
        numbers: dict[str, float] = {}
        if self._batches is not None:
            nll = list(self._sweep(self._batches))
            ends = list(accumulate(map(len, self._probe.questions), initial=0))
            numbers = self._probe.judge([[-each for each in nll[a:b]] for a, b in pairwise(ends)])
        # compiled layers serve rows of documents; for a cache and single tokens each would be compiled anew
        with torch.compiler.set_stance("force_eager"):
            samples = self._probe.speak(self._spread)
        self._file.write({"step": step, **numbers, "samples": samples})
        self._file.sync()
        return numbers


def _batches(questions: Sequence[Answers], stage: StageConfig) -> Batches:
    """Return every possible answer as a document of which the answer counts, and as a source of its own."""
    pairs = [pair for answers in questions for pair in answers]
    tokens = [np.asarray([*context, *answer], dtype=np.int64) for context, answer in pairs]
    roles = [np.asarray([Role.USER] * len(c) + [Role.ASSISTANT] * len(a), dtype=np.int64) for c, a in pairs]
    sources = Sources(tuple(map(str, range(len(pairs)))), tuple(range(1, len(pairs) + 1)))
    changes: dict[str, Any] = {"objective": "sft", "learn": Learn(), "overlong": "error", "batch_samples": None}
    plain = stage.model_copy(update=changes | {"steps": 1, "epochs": None})
    return Batches(tokens, roles, plain, seed=0, where=f"probe of stage {stage.name}", sources=sources)
