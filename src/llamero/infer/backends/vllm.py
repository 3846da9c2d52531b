"""Scores and answers by vLLM, where it is installed.

Choices of one token (the letters of MMLU) are one request for all of them: what the next token's log-probabilities are,
asked for by `logprob_token_ids`, and the prefix cache gives what requests begin with alike. Longer continuations need
`prompt_logprobs`, with which vLLM does not read its prefix cache: every one of them is computed whole.
"""

from collections.abc import Sequence
from importlib import import_module
from math import isnan
from pathlib import Path
from typing import Any

from llamero.core.errors import LlameroError
from llamero.infer.context import context_length
from llamero.infer.generate import Completion, Finish
from llamero.infer.likelihood import whole
from llamero.infer.sampler import Sampling
from llamero.infer.score import Pair, Scored, Softmax
from llamero.model.config import LlamaConfig
from llamero.model.rope import Dynamic
from llamero.text.tokenizer import Tokenizer

Ids = tuple[int, ...]


class VllmEngine:
    """A model that vLLM runs in this process.

    Args:
        directory: Of the model.
        config: Of the model.
        tokenizer: Of the model.
        dtype: Dtype of the weights.
        more: What else `vllm.LLM` takes, for example `tensor_parallel_size`.

    Raises:
        LlameroError: vLLM is not installed, or computes something else for this model.
    """

    def __init__(
        self, directory: Path, config: LlamaConfig, tokenizer: Tokenizer, *, dtype: str = "auto", **more: Any
    ) -> None:
        if isinstance(config.rope, Dynamic):
            raise LlameroError(
                "vLLM gives NaN for dynamic RoPE beyond the original context",
                where=directory,
                fix="use our own engine, which fixes the frequencies per sequence",
            )
        try:
            vllm: Any = import_module("vllm")
        except ImportError as error:
            raise LlameroError("vLLM is not installed", fix="pip install vllm, or use our own engine") from error
        self._vllm, self._config, self._tokenizer, self._dtype = vllm, config, tokenizer, dtype
        self._llm = vllm.LLM(model=str(directory), dtype=dtype, enable_prefix_caching=True, **more)

    @property
    def context(self) -> int:
        """Return the tokens that the model is meant to see at a time."""
        return context_length(self._config)

    def describe(self) -> dict[str, Any]:
        """Return what moves scores."""
        return {"engine": "vllm", "version": self._vllm.__version__, "dtype": self._dtype, "context": self.context}

    def score(
        self, requests: Sequence[Pair], *, max_length: int | None = None, softmax: Softmax = "float32"
    ) -> list[Scored]:
        """Return log-likelihoods, see `Engine.score`.

        Raises:
            LlameroError: A request cannot be scored, or an answer is not a number; `softmax` is not to be chosen.
        """
        if softmax != "float32":
            raise LlameroError("vLLM has its own softmax", fix="leave `softmax_dtype` at float32")
        limit = min(max_length or self.context, self.context - 1)  # it says one token more than it is fed
        vocabulary = self._config.vocab_size
        asked: list[tuple[Ids, int, int]] = []
        for number, (context, continuation) in enumerate(requests):
            ids, cut = whole(context, continuation, limit=limit, vocabulary=vocabulary, where=f"request {number}")
            asked.append((tuple(ids.tolist()), len(continuation), cut))
        found = self._letters({ids for ids, count, _ in asked if count == 1})
        found |= self._texts({(ids, count) for ids, count, _ in asked if count > 1})
        for number, (ids, count, _) in enumerate(asked):
            if isnan(found[ids, count][0]):
                raise LlameroError("NaN among the log-probabilities", where=f"request {number}")
        return [Scored(*found[ids, count], count, cut) for ids, count, cut in asked]

    def _letters(self, wanted: set[Ids]) -> dict[tuple[Ids, int], tuple[float, bool]]:
        """Return log-probabilities of single tokens, all that may follow a text in one request."""
        together: dict[Ids, list[int]] = {}
        for ids in sorted(wanted):
            together.setdefault(ids[:-1], []).append(ids[-1])
        how = [self._sampling(max_tokens=1, logprob_token_ids=tokens) for tokens in together.values()]
        found = {}
        for (context, tokens), answer in zip(together.items(), self._run(list(together), how), strict=True):
            said = answer.outputs[0].logprobs[0]
            likeliest = answer.outputs[0].token_ids[0]
            for token in tokens:
                found[(*context, token), 1] = (said[token].logprob, token == likeliest)
        return found

    def _texts(self, wanted: set[tuple[Ids, int]]) -> dict[tuple[Ids, int], tuple[float, bool]]:
        """Return log-likelihoods of longer continuations."""
        order = sorted(wanted)
        how = [self._sampling(max_tokens=1, prompt_logprobs=1)] * len(order)
        found = {}
        for (ids, count), answer in zip(order, self._run([ids for ids, _ in order], how), strict=True):
            places = range(len(ids) - count, len(ids))
            said = [answer.prompt_logprobs[at][ids[at]] for at in places]
            found[ids, count] = (sum(each.logprob for each in said), all(each.rank == 1 for each in said))
        return found

    def _sampling(self, **how: Any) -> Any:
        return self._vllm.SamplingParams(temperature=0.0, detokenize=False, **how)

    def _run(self, prompts: Sequence[Ids], how: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        return self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], list(how))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return answers, see `Engine.generate`."""
        how = self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sorted(sampling.stop_ids),
            stop=list(sampling.stop_strings),
        )
        answers = []
        for answer in self._run([tuple(prompt) for prompt in prompts], [how] * len(prompts)):
            said = answer.outputs[0]
            ids = tuple(said.token_ids)
            ids = ids[:-1] if ids and ids[-1] in sampling.stop_ids else ids
            finish: Finish = "length" if said.finish_reason == "length" else "stop"
            answers.append(Completion(ids, said.text, finish))
        return answers
