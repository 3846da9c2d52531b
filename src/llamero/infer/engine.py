"""What computes scores and answers: this project's own model, or another engine behind the same three questions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llamero.infer import generate as generating
from llamero.infer import likelihood
from llamero.infer.context import context_length, device_of
from llamero.infer.finished import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llamero.infer.finished import Others
    from llamero.infer.generate import Completion
    from llamero.infer.sampler import Sampling
    from llamero.infer.score import Pair, Scored, Softmax
    from llamero.model.llama import Llama
    from llamero.text.tokenizer import Tokenizer


class Engine(Protocol):
    """A model that somebody runs."""

    @property
    def context(self) -> int:
        """Return the tokens that the model is meant to see at a time."""
        ...

    def score(
        self, requests: Sequence[Pair], *, max_length: int | None = None, softmax: Softmax = "float32"
    ) -> list[Scored]:
        """Return the log-likelihood (nats) of each continuation after its context, in the order of the requests.

        Args:
            requests: (context, continuation) ids, as the model sees them: nothing is added, a BOS least of all.
            max_length: Tokens the model may see at a time; contexts lose what is too much on their left, and
                `Scored.truncated` counts it. `None` is `context`.
            softmax: Dtype of the log-probabilities and of their sum, `model` being that of the weights.

        Raises:
            LlameroError: A request cannot be scored, or an answer is not a number; `where` names the request.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return the answers to prompts (ids), in their order; each draws as if it were alone.

        Args:
            prompts: Ids, as the model sees them.
            sampling: How to choose tokens and when to stop, for all of them.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what moves scores, as JSON: which engine in which version, dtype, device, context, weights."""
        ...


class OwnEngine:
    """This project's own model.

    Args:
        model: The model.
        tokenizer: Of the model; without it answers are ids alone, and there are no stop strings.
        kept: Directory where scores are kept as they come, so that a run that was killed goes on.
        others: Processes that share the scoring: each is asked the same and returns all of it, the same bits as one.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        kept: Path | None = None,
        others: Others | None = None,
    ) -> None:
        self.model, self.tokenizer, self._kept, self._others = model, tokenizer, kept, others

    @property
    def context(self) -> int:
        """Return the tokens that the model is meant to see at a time."""
        return context_length(self.model.config)

    def score(
        self, requests: Sequence[Pair], *, max_length: int | None = None, softmax: Softmax = "float32"
    ) -> list[Scored]:
        """Return log-likelihoods, see `Engine.score`."""
        how = {"kept": self._kept, "others": self._others}
        return likelihood.log_likelihoods(self.model, requests, max_length=max_length, softmax=softmax, **how)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return answers, see `Engine.generate`."""
        return generating.generate(self.model, prompts, sampling, self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Return what moves scores."""
        return {
            "engine": "llamero",
            "torch": torch.__version__,
            "dtype": str(self.model.model.norm.weight.dtype).removeprefix("torch."),
            "device": device_of(self.model).type,
            "context": self.context,
            "weights": self._weights,
        }

    @cached_property
    def _weights(self) -> str:
        """Return what tells these weights from others in the same place."""
        return fingerprint(self.model)[:16]
