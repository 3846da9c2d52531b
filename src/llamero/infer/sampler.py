"""From logits to the next token, in the order of Hugging Face.

Repetition penalty, ends that come too early, temperature, top-k, top-p, typical.

Each request draws from its own generator, so its text does not depend on who else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llamero.core.errors import LlameroError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens, and when to stop."""

    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability; 1 keeps all."""
    top_k: int = 0
    """Keep so many of the likeliest tokens; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens that surprise most nearly as much as the next one is expected to, and that together have this
    probability (Meister et al. 2022, 2202.00666); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that were there (Keskar et al. 2019, 1909.05858)."""
    seed: int = 0
    min_new_tokens: int = 0
    """Tokens before any of `stop_ids` may come."""
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text and are not part of it."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the text and are not part of it."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k, self.top_k >= 0, "0 (all) or more"),
            "typical_p": (self.typical_p, 0 < self.typical_p <= 1, "above 0 and at most 1"),
            "min_new_tokens": (self.min_new_tokens, self.min_new_tokens >= 0, "0 or more"),
            "repetition_penalty": (self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (self.seed, 0 <= self.seed < 2**63, "0 or more, below 2^63"),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            "stop_strings": (self.stop_strings, "" not in self.stop_strings, "texts that are not empty"),
        }
        for name, (value, holds, needed) in rules.items():
            if not holds:
                raise LlameroError(f"`{name}` must be {needed}, is {value!r}")


def processed(
    logits: Float[Tensor, "rows vocab"], seen: Bool[Tensor, "rows vocab"] | None, sampling: Sampling
) -> Float[Tensor, "rows vocab"]:
    """Return the float32 logits whose softmax is drawn from; what was taken out is -inf.

    Args:
        logits: As the model gives them.
        seen: Tokens that prompt or answer hold already; needed for a repetition penalty only.
        sampling: What to do.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)  # whoever ties with the last stays
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits if sampling.typical_p == 1 else _typical(logits, sampling.typical_p)


def _typical(logits: Float[Tensor, "rows vocab"], mass: float) -> Float[Tensor, "rows vocab"]:
    """Return the logits with all but the most typical tokens at -inf (Meister et al. 2022, section 3)."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)  # 0 · -inf is 0
    unusual, order = (-log_p - entropy).abs().sort(stable=True)
    last = (logits.gather(1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    out = unusual > unusual.gather(1, last)  # whoever ties with the last stays
    return logits.masked_fill(out.scatter(1, order, out), -torch.inf)


class Sampler:
    """Chooses the tokens of one request.

    Args:
        sampling: How.
        prompt: Ids of the prompt, which the repetition penalty counts too.
        vocabulary: Number of logits.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocabulary: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._said = 0
        self._ends = sorted(id for id in sampling.stop_ids if id < vocabulary) if sampling.min_new_tokens else []
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(1, vocabulary, dtype=torch.bool)
            self._seen[0, list(prompt)] = True

    @property
    def plain(self) -> bool:
        """Whether the next token is just the likeliest one."""
        return self.sampling.temperature == 0 and self._seen is None and not self._ends

    def choose(self, logits: Float[Tensor, " vocab"]) -> int:
        """Return the next token."""
        if self._seen is not None:
            self._seen = self._seen.to(logits.device)
        if self._ends and self._said < self.sampling.min_new_tokens:
            logits = logits.index_fill(0, torch.tensor(self._ends, device=logits.device), -torch.inf)
        self._said += 1
        scores = processed(logits[None], self._seen, self.sampling)[0]
        token = int(scores.argmax()) if self.sampling.temperature == 0 else self._draw(scores)
        if self._seen is not None:
            self._seen[0, token] = True
        return token

    def _draw(self, scores: Float[Tensor, " vocab"]) -> int:
        # the random number is drawn on the CPU, so that every device draws the same one
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64).to(scores.device)
        cumulative = scores.softmax(-1).double().cumsum(0)
        return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))


def choose(samplers: Sequence[Sampler], logits: Float[Tensor, "rows vocab"]) -> list[int]:
    """Return the next token of each row; plain rows are looked up together."""
    likeliest = logits.argmax(-1).tolist()
    return [likeliest[row] if sampler.plain else sampler.choose(logits[row]) for row, sampler in enumerate(samplers)]
