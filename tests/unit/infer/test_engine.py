"""The engine interface, and the library's `score` and `generate`, which are the same thing without the object."""

import pytest
import torch

import llamero
from llamero.core.errors import LlameroError
from llamero.infer.engine import Engine, OwnEngine
from llamero.infer.generate import generate
from llamero.infer.likelihood import log_likelihoods
from llamero.infer.sampler import Sampling


def test_the_own_engine_scores_and_generates_as_the_functions_do(model, draw):
    engine: Engine = OwnEngine(model)
    requests = [(draw(9), draw(3, 1)), (draw(9), draw(2, 2))]
    assert engine.score(requests) == log_likelihoods(model, requests) == llamero.score(model, requests)
    prompts, sampling = [draw(4), draw(7)], Sampling(temperature=0, max_new_tokens=5)
    expected = generate(model, prompts, sampling)
    assert engine.generate(prompts, sampling) == expected
    assert llamero.generate(model, prompts, {"temperature": 0, "max_new_tokens": 5}) == expected
    with pytest.raises(LlameroError, match="top_p"):
        llamero.generate(model, prompts, {"top_p": 2})


def test_an_engine_says_what_moves_scores(model):
    said = OwnEngine(model).describe()
    assert said["dtype"] == "float32"
    assert said["context"] == OwnEngine(model).context == 64
    assert said["torch"] == torch.__version__


@torch.no_grad()
def test_softmax_in_the_dtype_of_the_model_rounds_each_token_and_the_sum(model, draw):
    half = type(model)(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    context, continuation = draw(9), draw(4, 1)
    logits = half(torch.tensor([[*context, *continuation[:-1]]]))[0, -4:]
    each = logits.log_softmax(-1)[range(4), continuation]
    assert each.dtype == torch.bfloat16
    (scored,) = log_likelihoods(half, [(context, continuation)], softmax="model")
    assert scored.log_likelihood == pytest.approx(float(each.sum()), abs=0.07)  # a unit in the last place
    assert scored.log_likelihood == float(torch.tensor(scored.log_likelihood).bfloat16())
    (fine,) = log_likelihoods(half, [(context, continuation)])
    assert fine.log_likelihood != scored.log_likelihood
