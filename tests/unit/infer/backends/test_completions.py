"""Scores and answers through a server that runs our own model, beside those of the model itself."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chat_server import serving
from llamero.core.errors import LlameroError
from llamero.infer.backends.completions import CompletionsEngine
from llamero.infer.backends.openai import Client, Endpoint
from llamero.infer.engine import Engine
from llamero.infer.likelihood import log_likelihoods
from llamero.infer.sampler import Sampling
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default

VOCABULARY, CONTEXT = 60, 64


def name(id):
    return chr(ord("0") + id)


TOKENIZER = SimpleNamespace(
    decode=lambda ids: "".join(map(name, ids)),
    encode=lambda text: [ord(c) - ord("0") for c in text],
)


class Names(SimpleNamespace):
    """A tokenizer of one character a token."""

    def __len__(self):
        return VOCABULARY


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=Default(10000.0, 8),
        max_position_embeddings=CONTEXT,
    )
    model = Llama(config).eval()
    initialize(model, seed=1, std=0.4)
    return model


@torch.no_grad()
def completed(model, body):
    """Answer as vLLM does: the prompt's log-probabilities, then greedy tokens."""
    ids = list(body["prompt"])
    for _ in range(body["max_tokens"]):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    logs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    said = ids if body.get("echo") else ids[len(body["prompt"]) :]
    choice: dict[str, Any] = {"text": "".join(map(name, said)), "finish_reason": "length"}
    if body.get("logprobs"):
        choice["logprobs"] = {
            "tokens": [name(id) for id in ids],
            "token_logprobs": [None, *(float(row[id]) for row, id in zip(logs, ids[1:], strict=True))],
            "top_logprobs": [None, *({name(int(row.argmax())): float(row.max())} for row in logs)],
        }
    return {"choices": [choice]}


@pytest.fixture
def server(model):
    with serving() as served:
        change(served, model, lambda answer: answer)
        yield served


def change(served, model, how):
    """Let the server answer something else."""
    served.answer = lambda body: (200, {}, json.dumps(how(completed(model, body))).encode())


@pytest.fixture
def engine(server) -> Engine:
    client = Client(Endpoint(server.url, "tiny", tries=2, pause=lambda seconds: None))
    tokenizer: Any = Names(**vars(TOKENIZER))
    return CompletionsEngine(client, tokenizer, context=CONTEXT, threads=4)


def requests():
    stem = [3, 9, 27, 21, 4]
    return [(stem, [7]), (stem, [8, 2, 5]), ([*stem, 1, 1], [4, 4]), (stem, [7]), ([2] * 90, [1, 2])]


def test_scores_are_those_of_the_model_itself(engine, server, model):
    asked, longest = requests(), CONTEXT - 2
    expected = log_likelihoods(model, asked, max_length=longest)
    for ours, theirs in zip(engine.score(asked), expected, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert (ours.greedy, ours.tokens, ours.truncated) == (theirs.greedy, theirs.tokens, theirs.truncated)
    assert len(server.requests) == 4  # equal ones go out once
    assert all(isinstance(id, int) for body in server.requests for id in body["prompt"])


def test_answers_are_those_of_the_server(engine):
    (answer,) = engine.generate([[3, 9, 27]], Sampling(temperature=0, max_new_tokens=4))
    assert answer.finish == "length"
    assert len(answer.ids) == 4
    assert answer.text == "".join(map(name, answer.ids))


def test_a_server_that_does_not_echo_is_refused(engine, server, model):
    change(server, model, lambda answer: {"choices": [{"text": "yes", "logprobs": None}]})
    with pytest.raises(LlameroError, match="does not echo"):
        engine.score(requests()[:1])


def test_another_models_tokens_are_refused(engine, server, model):
    def other(answer):
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        answer["choices"][0]["logprobs"]["tokens"] = [token + "x" for token in tokens]
        return answer

    change(server, model, other)
    with pytest.raises(LlameroError, match="tokenizer"):
        engine.score(requests()[:1])


def test_nan_and_refusals_name_the_request(engine, server, model):
    def broken(answer):
        answer["choices"][0]["logprobs"]["token_logprobs"][-2] = math.nan
        return answer

    change(server, model, broken)
    with pytest.raises(LlameroError, match="NaN") as error:
        engine.score(requests()[:1])
    assert error.value.where == "request 0"
    server.answer = lambda body: (400, {}, b'{"error": {"message": "echo is not allowed"}}')
    with pytest.raises(LlameroError, match="echo is not allowed") as error:
        engine.score(requests()[:1])
    assert error.value.where == "request 0"
    with pytest.raises(LlameroError, match="its own softmax"):
        engine.score(requests(), softmax="model")


def test_what_is_served_is_said(engine, server):
    assert engine.describe()["served"] == f"tiny at {server.url}"
    assert engine.context == CONTEXT


def test_another_engine_is_a_key_of_h4_and_changes_what_decides():
    from llamero.evaluate.config import H4Task

    own = H4Task(tasks="h4", data="x")
    assert "engine" not in own.decides()
    assert H4Task(tasks="h4", data="x", engine="http://localhost:8000/v1").decides()["engine"]
    with pytest.raises(ValueError, match="engine"):
        H4Task(tasks="h4", data="x", engine="sglang")
