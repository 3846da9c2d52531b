"""What a model thinks of text that is there: log-probabilities, perplexity, agreement of two models.

Logits exist for a chunk of positions at a time, and only for positions that are asked about.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, chain
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.infer.context import check_ids, context_length, device_of, rotation_of
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama

BATCH_TOKENS = 4096
"""Tokens of a forward pass."""

LOGITS = 2**22
"""Logits that exist at a time."""

KL_PROTOCOL = "KL(original ‖ this) in nats per token"
"""How reports say what `Agreement.kl` is."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, and of what may follow it; neither may be empty."""

Softmax = Literal["float32", "model"]
"""Dtype of log-probabilities and of their sum; older harnesses used that of the model, in which ties are possible."""


@dataclass(frozen=True)
class Scored:
    """How likely a continuation is."""

    log_likelihood: float
    """Natural logarithm of its probability, given the context."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""
    tokens: int
    """Its length."""
    truncated: int = 0
    """Tokens that the context lost on its left because all would not fit."""


def token_log_probs(
    model: Llama,
    hidden: Float[Tensor, "tokens dim"],
    nodes: Int[Tensor, " asked"],
    targets: Int[Tensor, " asked"],
) -> tuple[Float[Tensor, " asked"], Bool[Tensor, " asked"]]:
    """Return the log-probability of tokens after positions, and whether they are the likeliest, on the CPU.

    Args:
        model: The model.
        hidden: Its normalized last hidden states.
        nodes: Positions; one that is asked about often is computed once.
        targets: The token whose probability is asked.
    """
    needed, inverse = nodes.unique(return_inverse=True)
    order = inverse.argsort(stable=True)
    rows = max(1, LOGITS // model.config.vocab_size)
    found = torch.empty(len(nodes), dtype=torch.float64)
    likeliest = torch.empty(len(nodes), dtype=torch.bool)
    for start in range(0, len(needed), rows):
        chunk = needed[start : start + rows]
        mine = order[(inverse[order] >= start) & (inverse[order] < start + len(chunk))]
        logits = model.lm_head(hidden[chunk.to(hidden.device)]).float()
        row, target = (inverse[mine] - start).to(logits.device), targets[mine].to(logits.device)
        chosen, (top, favourite) = logits[row, target], logits.max(-1)
        lse = logits.sub_(top[:, None]).exp_().sum(-1).log_() + top  # in place: there is no second such tensor
        found[mine] = (chosen - lse[row]).double().cpu()
        likeliest[mine] = (favourite[row] == target).cpu()
    return found, likeliest


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text."""

    nll_sum: float
    """Sum of negative log-likelihoods, in nats."""
    tokens: int
    """Tokens that were scored."""

    @property
    def value(self) -> float:
        """The perplexity: e to the mean negative log-likelihood per token; infinite where no float holds it."""
        try:
            return math.exp(self.nll_sum / self.tokens)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Window:
    """A stretch of a text that the model sees by itself."""

    start: int
    stop: int
    scored: int
    """First token that is scored; those before it are context."""

    def __len__(self) -> int:
        return self.stop - self.start


def sliding(tokens: int, *, window: int, stride: int) -> list[Window]:
    """Return windows whose tokens are scored once each, with what is left of them in the window as context.

    Each window scores its last `stride` tokens, the first one all but the first token. With a stride as long
    as the window the first token of every window goes unscored: nothing predicts it.

    Args:
        tokens: Of the text.
        window: Tokens the model sees at a time.
        stride: How far the window moves on.
    """
    if not 1 <= stride <= window:
        raise LlameroError(f"the stride must be 1 to {window} (the window), not {stride}")
    windows: list[Window] = []
    scored = 0
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        windows.append(Window(start, stop, max(scored, start + 1)))
        scored = stop
        if stop == tokens:
            break
    return [w for w in windows if w.scored < w.stop]


def documents(lengths: Sequence[int]) -> list[Window]:
    """Return a window for each of the documents that lie one after the other; all but its first token is scored."""
    ends = list(accumulate(lengths))
    return [Window(end - n, end, end - n + 1) for end, n in zip(ends, lengths, strict=True) if n > 1]


@torch.inference_mode()
def perplexity(
    model: Llama, ids: Sequence[int], windows: Sequence[Window], *, batch_tokens: int = BATCH_TOKENS
) -> Perplexity:
    """Return the perplexity of a text.

    Args:
        model: The model.
        ids: The text.
        windows: What the model sees at a time, and what of it is scored: `sliding`, or `documents`.
        batch_tokens: Tokens of a forward pass; at least one window goes into each.
    """
    check_windows(model, ids, windows)
    total, count = 0.0, 0
    with progress.Line("perplexity", total=len(windows), unit="windows") as line:
        for batch in passes(windows, batch_tokens):
            hidden = _windows_hidden(model, ids, batch)
            nodes, targets = predictions(ids, batch)
            found, _ = token_log_probs(model, hidden, nodes, targets)
            if found.isnan().any():
                bad = _owner(batch, int(found.isnan().int().argmax()))
                raise LlameroError("NaN among the logits", where=f"window {windows.index(bad)} of the text")
            total -= float(found.sum())
            count += len(found)
            line.advance(len(batch))
    return Perplexity(total, count)


def passes(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yield windows by forward pass."""
    batch: list[Window] = []
    for window in windows:
        if batch and sum(map(len, batch)) + len(window) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    yield batch


def predictions(ids: Sequence[int], batch: Sequence[Window]) -> tuple[Int[Tensor, " asked"], Int[Tensor, " asked"]]:
    """Return which positions of the packed windows predict the scored tokens, and these tokens."""
    nodes, targets, offset = [], [], 0
    for w in batch:
        nodes += [offset + at - 1 - w.start for at in range(w.scored, w.stop)]
        targets += ids[w.scored : w.stop]
        offset += w.stop - w.start
    return torch.tensor(nodes), torch.tensor(targets)


def _owner(batch: Sequence[Window], asked: int) -> Window:
    """Return the window that scores the token number `asked` of a batch."""
    for window in batch:
        asked -= window.stop - window.scored
        if asked < 0:
            return window
    raise ValueError(f"the batch scores {-asked} tokens fewer")


def _windows_hidden(model: Llama, ids: Sequence[int], batch: Sequence[Window]) -> Float[Tensor, "tokens dim"]:
    lengths = [w.stop - w.start for w in batch]
    flat = list(chain.from_iterable(ids[w.start : w.stop] for w in batch))
    rotation = rotation_of(model, [0] * len(batch), lengths, lengths)
    return model.hidden(torch.tensor(flat, device=device_of(model)), rotation, Documents(tuple(lengths)))


def check_windows(model: Llama, ids: Sequence[int], windows: Sequence[Window]) -> None:
    """Refuse windows that are longer than the context, ids that the model does not know, and texts without any."""
    if not windows:
        raise LlameroError(f"a text of {len(ids)} tokens has nothing to predict")
    context, longest = context_length(model.config), max(map(len, windows))
    if longest > context:
        raise LlameroError(f"a window of {longest} tokens is longer than the model's context of {context}")
    check_ids(model, ids, where="the text")


@dataclass(frozen=True)
class Agreement:
    """How close a model stays to a reference."""

    kl: float
    """Mean of KL(reference ‖ other) per token, in nats."""
    top1: float
    """Share of tokens at which both have the same favourite."""
    tokens: int
    """Positions that were compared."""


@dataclass(frozen=True)
class Tally:
    """Sums over positions, beside a reference; of several stretches they are added."""

    nll: float = 0.0
    """Of negative log-likelihoods of the tokens that come next, in nats."""
    kl: float = 0.0
    """Of KL(reference ‖ model), in nats."""
    same: int = 0
    """Positions at which both have the same favourite."""
    tokens: int = 0
    """Positions."""
    broken: int = 0
    """Positions of which there is no telling, because of NaN or infinity among the logits; in no other sum."""

    def __add__(self, other: "Tally") -> "Tally":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Tally(*(a + b for a, b in pairs))

    @property
    def perplexity(self) -> Perplexity:
        """Return the perplexity of the positions that are not broken."""
        return Perplexity(self.nll, self.tokens)

    @property
    def agreement(self) -> Agreement:
        """Return the agreement over the positions that are not broken."""
        return Agreement(self.kl / self.tokens, self.same / self.tokens, self.tokens)


Head = Callable[[Tensor], Tensor]
"""From normalized last hidden states (positions, dim) to logits (positions, vocab)."""


@torch.inference_mode()
def tally(
    head: Head,
    hidden: Float[Tensor, "asked dim"],
    targets: Int[Tensor, " asked"],
    *,
    reference: tuple[Head, Float[Tensor, "asked other"]],
    vocabulary: int,
) -> Tally:
    """Return what a model makes of the tokens that come next, beside a reference.

    Logits exist for a block of positions at a time; their logarithms of softmax are float32, sums float64.

    Args:
        head: Of the model.
        hidden: Its normalized last hidden states at the positions that predict.
        targets: The tokens that are predicted.
        reference: Head and hidden states of the model to stay close to.
        vocabulary: Entries of a row of logits.

    Raises:
        LlameroError: The reference itself is broken.
    """
    of_reference, states = reference
    rows, total = max(1, LOGITS // vocabulary), Tally()
    itself = head is of_reference and hidden is states
    for theirs, ours, next_ids in zip(states.split(rows), hidden.split(rows), targets.split(rows), strict=True):
        p = of_reference(theirs).float().log_softmax(-1)
        q = p if itself else head(ours).float().log_softmax(-1).to(p.device)
        said = -q.gather(1, next_ids.to(q.device)[:, None])[:, 0]
        apart = (p.exp() * (p - q)).sum(-1)
        fine = said.isfinite() & apart.isfinite()
        if not bool(fine.all()) and not bool(p.isfinite().all()):
            raise LlameroError("NaN among the logits of the reference", fix="see whether the model itself works")
        same = (p.argmax(-1) == q.argmax(-1)) & fine
        whole = int(fine.sum())
        total += Tally(
            float(said[fine].double().sum()),
            float(apart[fine].double().sum()),
            int(same.sum()),
            whole,
            len(fine) - whole,
        )
    return total


@torch.inference_mode()
def compare(
    reference: Llama,
    other: Llama,
    ids: Sequence[int],
    windows: Sequence[Window],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Agreement:
    """Return how far another model's predictions are from a reference's, at every position that scores a token.

    Args:
        reference: The model to stay close to.
        other: The model that is measured; it has the same vocabulary.
        ids: The text.
        windows: What the models see at a time, and what of it is scored: `sliding`, or `documents`.
        batch_tokens: Tokens of a forward pass.
    """
    vocabulary = same_vocabulary(reference.config, other.config)
    for model in (reference, other):
        check_windows(model, ids, windows)
    total = Tally()
    with progress.Line("compare", total=len(windows), unit="windows") as line:
        for batch in passes(windows, batch_tokens):
            nodes, targets = predictions(ids, batch)
            theirs, ours = (_windows_hidden(model, ids, batch)[nodes] for model in (reference, other))
            found = tally(other.lm_head, ours, targets, reference=(reference.lm_head, theirs), vocabulary=vocabulary)
            if found.broken:
                first = windows.index(batch[0])
                raise LlameroError("NaN among the logits", where=f"windows {first} to {first + len(batch) - 1}")
            total += found
            line.advance(len(batch))
    return total.agreement


def same_vocabulary(reference: LlamaConfig, other: LlamaConfig) -> int:
    """Return the size of the vocabulary that two models share.

    Raises:
        LlameroError: They have vocabularies of different sizes.
    """
    ours, theirs = reference.vocab_size, other.vocab_size
    if ours != theirs:
        raise LlameroError(f"vocabularies of {ours} and {theirs} cannot be compared")
    return ours
