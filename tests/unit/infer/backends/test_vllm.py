"""The back end to vLLM, with a stand-in that answers as vLLM does by a model of our own."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer.backends.vllm import VllmEngine
from llamero.infer.likelihood import log_likelihoods
from llamero.infer.sampler import Sampling
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default, Dynamic


def config(rope):
    return LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=rope,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def model():
    made = Llama(config(Default(10000.0, 8))).eval()
    initialize(made, seed=1, std=0.4)
    return made


TOKENIZER: Any = None
"""Nothing is asked of it."""


class StandIn:
    """`vllm.LLM` as far as it is used."""

    def __init__(self, model, calls):
        self.model, self.calls = model, calls

    @torch.no_grad()
    def generate(self, prompts, sampling):
        assert len(prompts) == len(sampling)
        self.calls.append((prompts, sampling))
        return [self.one(p["prompt_token_ids"], vars(how)) for p, how in zip(prompts, sampling, strict=True)]

    def one(self, prompt, how):
        ids = list(prompt)
        first = torch.empty(0)
        for _ in range(how["max_tokens"]):
            logs = self.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            first = first if len(first) else logs
            ids.append(int(logs.argmax()))
        said = SimpleNamespace(token_ids=ids[len(prompt) :], text="…", finish_reason="length", logprobs=None)
        asked = [*(how.get("logprob_token_ids") or ()), said.token_ids[0]]
        said.logprobs = [{id: SimpleNamespace(logprob=float(first[id])) for id in asked}]
        answer = SimpleNamespace(outputs=[said], prompt_logprobs=None)
        if how.get("prompt_logprobs"):
            logs = self.model(torch.tensor([prompt]))[0].log_softmax(-1)
            answer.prompt_logprobs = [None, *(self.place(row, id) for row, id in zip(logs, prompt[1:], strict=False))]
        return answer

    def place(self, row, id):
        rank = 1 + int((row > row[id]).sum())
        return {id: SimpleNamespace(logprob=float(row[id]), rank=rank)}


@pytest.fixture
def vllm(model, monkeypatch):
    calls, made = [], []

    def started(**how):
        made.append(how)
        return StandIn(model, calls)

    module = SimpleNamespace(LLM=started, SamplingParams=SimpleNamespace, __version__="0.0", calls=calls, made=made)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_letters_are_one_request_and_texts_are_whole(vllm, model, tmp_path):
    engine = VllmEngine(tmp_path, model.config, TOKENIZER, dtype="float32")
    assert vllm.made[0]["enable_prefix_caching"]
    stem = [3, 9, 27]
    asked = [(stem, [letter]) for letter in (4, 5, 6, 7)] + [(stem, [4, 9, 1]), ([1, 1], [2]), (stem, [4])]
    expected = log_likelihoods(model, asked)
    for ours, theirs in zip(engine.score(asked), expected, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert (ours.greedy, ours.tokens, ours.truncated) == (theirs.greedy, theirs.tokens, theirs.truncated)
    letters, texts = vllm.calls
    assert [p["prompt_token_ids"] for p in letters[0]] == [[1, 1], stem]
    assert letters[1][1].logprob_token_ids == [4, 5, 6, 7]
    assert len(texts[0]) == 1
    assert engine.describe()["engine"] == "vllm"


def test_answers(vllm, model, tmp_path):
    engine = VllmEngine(tmp_path, model.config, TOKENIZER)
    (answer,) = engine.generate([[3, 9]], Sampling(temperature=0, max_new_tokens=3))
    assert (len(answer.ids), answer.finish) == (3, "length")


def test_what_vllm_gets_wrong_is_refused(vllm, tmp_path):
    with pytest.raises(LlameroError, match="dynamic RoPE"):
        VllmEngine(tmp_path, config(Dynamic(10000.0, 8, 2.0, 64)), TOKENIZER)


def test_without_vllm_there_is_a_way_out(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LlameroError, match="not installed"):
        VllmEngine(tmp_path, model.config, TOKENIZER)
