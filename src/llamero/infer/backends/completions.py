"""Scores and answers of a model behind an OpenAI-compatible server: `/completions` with `echo` and `logprobs`.

vLLM has it; llama.cpp's server, `transformers serve` and OpenAI itself (for its newer models) do not echo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.infer.backends.openai import Client, Unanswered, at_once
from llamero.infer.generate import Completion, Finish
from llamero.infer.likelihood import whole
from llamero.infer.sampler import Sampling
from llamero.infer.score import Pair, Scored, Softmax
from llamero.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Asked:
    """A request as the server gets it."""

    number: int
    ids: tuple[int, ...]
    """Context and continuation."""
    tokens: int
    """Of the continuation."""
    truncated: int


class CompletionsEngine:
    """A model behind a server, asked with ids, so that its own tokenizer and its BOS rule do not matter.

    Args:
        client: Of the server.
        tokenizer: Of the model: a server whose tokens have other names serves another model.
        context: Tokens that the served model sees at a time.
        threads: Requests under way at a time.
    """

    def __init__(self, client: Client, tokenizer: Tokenizer, *, context: int, threads: int = 16) -> None:
        self.client, self.tokenizer, self._context, self._threads = client, tokenizer, context, threads

    @property
    def context(self) -> int:
        """Return the tokens that the model is meant to see at a time."""
        return self._context

    def describe(self) -> dict[str, Any]:
        """Return what moves scores, as far as anybody knows it."""
        return {"engine": "OpenAI-compatible server", "served": self.client.endpoint.describe(), "dtype": "as served"}

    def score(
        self, requests: Sequence[Pair], *, max_length: int | None = None, softmax: Softmax = "float32"
    ) -> list[Scored]:
        """Return log-likelihoods, see `Engine.score`.

        Requests go out in the order of their tokens, so that a prefix cache of the server finds what it has; equal ones
        go out once.

        Raises:
            LlameroError: A request cannot be scored, or the server does not echo; `softmax` is not to be chosen.
        """
        if softmax != "float32":
            raise LlameroError("a server has its own softmax", fix="leave `softmax_dtype` at float32")
        asked = [self._asked(number, request, max_length) for number, request in enumerate(requests)]
        first: dict[tuple[tuple[int, ...], int], _Asked] = {}
        for one in asked:
            first.setdefault((one.ids, one.tokens), one)
        order = sorted(first.values(), key=lambda one: one.ids)
        found: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = {}
        with progress.Line("score", total=len(order), unit="requests") as line:
            for number, answer in at_once(self._score, order, threads=self._threads):
                found[order[number].ids, order[number].tokens] = answer
                line.advance()
        return [Scored(*found[one.ids, one.tokens], one.tokens, one.truncated) for one in asked]

    def _asked(self, number: int, request: Pair, max_length: int | None) -> _Asked:
        context, continuation = request
        # a server that echoes must be able to say one token more than the model is fed
        limit = min(self.context - 2, max_length or self.context)
        where = f"request {number}"
        ids, cut = whole(context, continuation, limit=limit, vocabulary=len(self.tokenizer), where=where)
        return _Asked(number, tuple(ids.tolist()), len(continuation), cut)

    def _score(self, one: _Asked) -> tuple[float, bool]:
        where = f"request {one.number}"
        body = {"prompt": list(one.ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        try:
            said = self._post(body, _Echo.read)
        except Unanswered as error:
            raise LlameroError(error.problem, where=where, fix=error.fix) from error
        if len(said.values) < len(one.ids):
            raise LlameroError(
                f"the server does not echo the prompt with log-probabilities: {len(said.values)} of {len(one.ids)}",
                where=self.client.endpoint.url,
                fix="use a server that does (vLLM), or our own engine",
            )
        self._same_tokens(one, said.names)
        here = slice(len(one.ids) - one.tokens, len(one.ids))
        values = said.values[here]
        if any(value is None or isnan(value) for value in values):
            raise LlameroError("NaN among the log-probabilities", where=where, fix="look at the server's model")
        best = said.best[here]
        greedy = all(top is None or value >= top for value, top in zip(values, best, strict=True))
        return sum(values), greedy

    def _same_tokens(self, one: _Asked, names: Sequence[str]) -> None:
        """Refuse a server that calls the tokens something else."""
        if not names:
            return
        text = self.tokenizer.decode(list(one.ids))
        said = "".join(names[: len(one.ids)])
        if not _same_text(text, said):
            raise LlameroError(
                f"the server reads the ids of request {one.number} as {said[:60]!r}, the tokenizer as {text[:60]!r}",
                where=self.client.endpoint.describe(),
                fix="give the tokenizer of the model that is served",
            )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return answers, see `Engine.generate`; their ids are those that the tokenizer makes of the text."""
        answers: list[Completion | None] = [None] * len(prompts)
        with progress.Line("answer", total=len(prompts), unit="prompts") as line:
            for number, answer in at_once(
                lambda prompt: self._generate(prompt, sampling), prompts, threads=self._threads
            ):
                answers[number] = answer
                line.advance()
        return [answer for answer in answers if answer is not None]

    def _generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "max_tokens": min(sampling.max_new_tokens, self.context - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        extra = {
            "stop": list(sampling.stop_strings),
            "stop_token_ids": sorted(sampling.stop_ids),
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        }
        text, finish = self._post({**body, **{key: value for key, value in extra.items() if value}}, _text)
        return Completion(tuple(self.tokenizer.encode(text)), text, finish)

    def _post(self, body: dict[str, Any], read: Any) -> Any:
        return self.client.post("/completions", {"model": self.client.endpoint.model, **body}, read)


@dataclass(frozen=True)
class _Echo:
    """What a server says of each token, the prompt's first."""

    values: list[Any]
    best: list[float | None]
    """Log-probability of the likeliest token at each place, as far as the server says it."""
    names: list[str]

    @classmethod
    def read(cls, answer: Any) -> "_Echo":
        """Return what an answer holds; nothing where the server does not say it."""
        said = answer["choices"][0].get("logprobs")
        if said is None:
            return cls([], [], [])
        values = list(said["token_logprobs"])
        tops = said.get("top_logprobs") or [None] * len(values)
        best = [max(top.values()) if top else None for top in tops]
        return cls(values, best, list(said.get("tokens") or []))


def _text(answer: Any) -> tuple[str, Finish]:
    choice = answer["choices"][0]
    finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return str(choice["text"]), finish


def _same_text(ours: str, theirs: str) -> bool:
    """Return whether two texts are one, but for spaces, and for characters that tokens cut in pieces."""
    if "\ufffd" in ours + theirs or "token_id:" in theirs:
        return True
    return "".join(ours.split()) == "".join(theirs.replace("▁", " ").replace("Ġ", " ").split())
