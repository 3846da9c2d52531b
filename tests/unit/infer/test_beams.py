"""Beam search finds what transformers finds, and with enough beams the best answer there is."""

import math
from itertools import product

import pytest
import torch

from llamero.infer.beams import beam_search
from llamero.infer.generate import Request, generate
from llamero.infer.sampler import Sampling

STOP = frozenset([7])


def mean(model, prompt, ids):
    """Mean log-probability of an answer, one forward pass over all of it."""
    logits = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + at, id]) for at, id in enumerate(ids)) / len(ids)


def test_one_beam_is_greedy(model, draw):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    (alone,) = generate(model, [draw(5)], sampling)
    assert beam_search(model, Request(tuple(draw(5)), sampling), beams=1) == list(alone.ids)


@torch.inference_mode()
def test_all_beams_find_the_best_of_all_answers(model, draw):
    prompt = draw(5)
    sampling = Sampling(temperature=0, max_new_tokens=2, stop_ids=STOP)
    found = beam_search(model, Request(tuple(prompt), sampling), beams=50)
    answers = [(7,), *((a, b) for a, b in product(range(50), repeat=2) if a != 7)]
    assert math.isclose(mean(model, prompt, found), max(mean(model, prompt, a) for a in answers), abs_tol=1e-5)


def test_drawn_beams_follow_their_seed(model, draw):
    asked = [Request(tuple(draw(5)), Sampling(max_new_tokens=6, seed=seed)) for seed in (1, 1, 2, 3)]
    first, again, *others = [beam_search(model, request, beams=3) for request in asked]
    assert first == again
    assert any(first != other for other in others)


def test_no_end_comes_too_early(model, draw):
    for seed in range(3):
        sampling = Sampling(temperature=0, max_new_tokens=6, min_new_tokens=4, stop_ids=frozenset(range(25)))
        found = beam_search(model, Request(tuple(draw(5, seed)), sampling), beams=3)
        assert len(found) >= 5
        assert all(id >= 25 for id in found[:4])


def test_stop_strings_are_a_programmers_error(model, draw):
    with pytest.raises(ValueError, match="stop strings"):
        beam_search(model, Request(tuple(draw(3)), Sampling(stop_strings=("a",))), beams=2)
