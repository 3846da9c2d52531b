"""Tokens after tokens: every step is one forward pass for all requests that run.

A step takes the tokens that are not cached yet: one of each request that is being answered, and as much of the
waiting prompts as the step has room for.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.infer.context import check_ids, context_length, device_of, rotation_of
from llamero.infer.detokenize import Decodes, Text
from llamero.infer.kv import PagedCache
from llamero.infer.sampler import Sampler, Sampling, choose
from llamero.model.llama import Llama

Finish = Literal["stop", "length"]

ROWS = 32
"""Requests that run at a time."""

STEP_TOKENS = 4096
"""Tokens of a forward pass: what bounds its memory while prompts come in."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Event:
    """One more token of a request."""

    request: int
    """Which one, in the order they were given."""
    id: int | None
    """The token; `None` where it is one that stops."""
    text: str
    """Text that became certain with it; empty without a tokenizer."""
    finish: Finish | None
    """Why the request ends here, if it does."""
    stop_id: int | None = None
    """The token that stops, if one did."""


@dataclass(frozen=True)
class Completion:
    """The whole answer to a prompt."""

    ids: tuple[int, ...]
    """Its tokens, without the one that stops."""
    text: str
    finish: Finish


class _Row:
    """A request that runs."""

    def __init__(self, number: int, request: Request, model: Llama, tokenizer: Decodes | None) -> None:
        self.number = number
        self.sampling = request.sampling
        self.length = total_length(model, request, where=f"prompt {number}")
        self.said = 0
        self.most = self.length - len(request.prompt)
        self.pending: Sequence[int] = request.prompt  # tokens whose keys and values are not cached yet
        self.sampler = Sampler(request.sampling, request.prompt, model.config.vocab_size)
        self.text = None if tokenizer is None else Text(tokenizer, request.prompt, request.sampling.stop_strings)
        self.cached = -1  # its row in the cache, once it has one

    def take(self, token: int) -> Event:
        """Note the next token."""
        self.said += 1
        last = self.said == self.most
        if token in self.sampling.stop_ids:
            return Event(self.number, None, "" if self.text is None else self.text.end(), "stop", token)
        self.pending = (token,)
        part = "" if self.text is None else self.text.add(token)
        if self.text is not None and not self.text.stopped and last:
            part += self.text.end()
        stopped = self.text is not None and self.text.stopped
        return Event(self.number, token, part, "stop" if stopped else "length" if last else None)


def total_length(model: Llama, request: Request, *, where: str) -> int:
    """Return how long prompt and answer may become; a prompt without room for an answer is refused.

    Dynamic RoPE takes its frequencies from this length, so it is fixed before the first token.
    """
    check_ids(model, request.prompt, where=where)
    context = context_length(model.config)
    if not request.prompt:
        raise LlameroError("the prompt is empty", where=where, fix="begin with the beginning-of-text token")
    if len(request.prompt) >= context:
        raise LlameroError(
            f"the prompt has {len(request.prompt)} tokens, the model's context is {context}",
            where=where,
            fix="shorten the prompt: it and the answer share the context",
        )
    return min(len(request.prompt) + request.sampling.max_new_tokens, context)


def events(
    model: Llama,
    requests: Sequence[Request],
    tokenizer: Decodes | None = None,
    *,
    rows: int = ROWS,
    step_tokens: int = STEP_TOKENS,
) -> Generator[Event, None, None]:
    """Yield the tokens of all requests as they come.

    Args:
        model: The model.
        requests: What to answer; all are checked before the first is begun.
        tokenizer: Turns tokens to text; needed for stop strings.
        rows: Requests that run at a time.
        step_tokens: Tokens of a forward pass.
    """
    if tokenizer is None and any(request.sampling.stop_strings for request in requests):
        raise ValueError("stop strings need a tokenizer")
    if rows < 1 or step_tokens < rows:
        raise ValueError(f"a step of {step_tokens} tokens is too small for {rows} rows")
    waiting = deque(_Row(number, request, model, tokenizer) for number, request in enumerate(requests))
    return _run(model, waiting, rows, step_tokens)


def _run(model: Llama, waiting: deque[_Row], rows: int, step_tokens: int) -> Generator[Event, None, None]:
    weight = model.model.norm.weight
    cache = PagedCache(model.config, dtype=weight.dtype, device=weight.device)
    running: list[_Row] = []
    while waiting or running:
        while waiting and len(running) < rows:
            row = waiting.popleft()
            row.cached = cache.add()
            running.append(row)
        for event in _step(model, cache, running, step_tokens):
            if event.finish:
                row = next(row for row in running if row.number == event.request)
                cache.remove(row.cached)
                running.remove(row)
            yield event


@torch.inference_mode()
def _step(model: Llama, cache: PagedCache, running: Sequence[_Row], step_tokens: int) -> list[Event]:
    """Run one forward pass and return what the rows say whose tokens are all cached now."""
    part = _share(running, step_tokens)
    rows, taken = [row for row, _ in part], [count for _, count in part]
    cached = [row.cached for row in rows]
    starts = [cache.length(row) for row in cached]
    ids = [id for row, count in part for id in row.pending[:count]]
    layout = cache.reserve(cached, taken)
    rotation = rotation_of(model, starts, taken, [row.length for row in rows])
    hidden = model.hidden(torch.tensor(ids, device=device_of(model)), rotation, layout, cache)
    last = torch.tensor(taken).cumsum(0) - 1
    for row, count in part:
        row.pending = row.pending[count:]
    ready = [index for index, row in enumerate(rows) if not row.pending]
    if not ready:
        return []
    logits = model.lm_head(hidden[last[ready].to(hidden.device)])
    _refuse_nan(logits, [rows[index] for index in ready])
    tokens = choose([rows[index].sampler for index in ready], logits)
    return [rows[index].take(token) for index, token in zip(ready, tokens, strict=True)]


def _share(running: Sequence[_Row], step_tokens: int) -> list[tuple[_Row, int]]:
    """Return how many of its pending tokens each row gets into the step; answers go before prompts."""
    left, shares = step_tokens, []
    for row in sorted(running, key=lambda row: len(row.pending) > 1):
        count = min(len(row.pending), left)
        if count:
            shares.append((row, count))
            left -= count
    return shares


def _refuse_nan(logits: Float[Tensor, "rows vocab"], rows: Sequence[_Row]) -> None:
    bad = logits.isnan().any(-1)
    if bad.any():
        row = rows[int(bad.int().argmax())]
        raise LlameroError(
            f"NaN among the logits of token {row.said + 1} of the answer",
            where=f"prompt {row.number}",
            fix="load the model in float32 or bfloat16 if it is float16; else its weights are broken",
        )


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Decodes | None = None,
    *,
    rows: int = ROWS,
) -> list[Completion]:
    """Return the answers to prompts, in their order; each draws with the same seed, as if it were alone.

    Args:
        model: The model.
        prompts: Ids of each prompt.
        sampling: How to choose tokens, for all of them.
        tokenizer: Turns tokens to text; needed for stop strings.
        rows: Prompts that run at a time.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    finish: list[Finish] = ["length"] * len(prompts)
    requests = [Request(tuple(prompt), sampling) for prompt in prompts]
    for event in events(model, requests, tokenizer, rows=rows):
        if event.id is not None:
            ids[event.request].append(event.id)
        texts[event.request] += event.text
        if event.finish:
            finish[event.request] = event.finish
    return [Completion(tuple(i), text, f) for i, text, f in zip(ids, texts, finish, strict=True)]


def stream(model: Llama, prompt: Sequence[int], sampling: Sampling, tokenizer: Decodes) -> Generator[str, None, None]:
    """Yield the text of an answer in parts that are certain: whole characters, nothing of a stop string."""
    for event in events(model, [Request(tuple(prompt), sampling)], tokenizer):
        if event.text:
            yield event.text
