"""Choosing a token: what is allowed, what the seed decides, and that draws follow the probabilities."""

import math

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer.sampler import Sampler, Sampling, choose, processed

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.0])


def kept(**options):
    return [i for i, x in enumerate(processed(LOGITS[None], None, Sampling(**options))[0].tolist()) if x > -1e9]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"typical_p": 0.0},
        {"min_new_tokens": -1},
        {"seed": -1},
        {"max_new_tokens": 0},
        {"stop_strings": ("a", "")},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_its_value(options):
    ((name, value),) = options.items()
    with pytest.raises(LlameroError) as error:
        Sampling(**options)
    assert f"`{name}`" in str(error.value)
    assert repr(value) in str(error.value)


def test_top_k_keeps_ties():
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1, 4]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_at_least_the_likeliest():
    assert kept(top_p=1e-6) == [0]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]


def test_typical_keeps_what_surprises_as_expected():
    """By hand: probabilities .5, .2, .1 …: the likeliest token says less than what is expected (1.3 nats)."""
    logits = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log()
    entropy = -sum(p * math.log(p) for p in (0.5, 0.2, 0.1, 0.1, 0.1))
    nearest = min(range(5), key=lambda i: abs(-float(logits[0, i]) - entropy))
    assert nearest == 1
    found = processed(logits, None, Sampling(typical_p=0.1))[0]
    assert [i for i in range(5) if found[i] > -1e9] == [1]
    found = processed(logits, None, Sampling(typical_p=0.6))[0]
    assert [i for i in range(5) if found[i] > -1e9] == [0, 1]


def test_ends_do_not_come_too_early():
    sampler = Sampler(Sampling(temperature=0, min_new_tokens=2, stop_ids=frozenset([0, 99])), [], 5)
    assert [sampler.choose(LOGITS) for _ in range(3)] == [1, 1, 0]
    assert not sampler.plain


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals():
    assert Sampler(Sampling(temperature=0), [], 5).choose(LOGITS) == 0
    assert Sampler(Sampling(temperature=0), [], 5).choose(torch.tensor([0.0, 3.0, 3.0])) == 1


def test_a_penalty_counts_prompt_and_answer():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=4.0), [0], 5)
    assert [sampler.choose(LOGITS) for _ in range(3)] == [1, 4, 0]


def test_the_seed_decides():
    def drawn(seed):
        sampler = Sampler(Sampling(seed=seed), [], 5)
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_rows_choose_as_if_they_were_alone():
    ways = [Sampling(temperature=0), Sampling(seed=3), Sampling(seed=4, top_p=0.7), Sampling(repetition_penalty=2.0)]
    logits = torch.randn(6, 4, 30, generator=torch.Generator().manual_seed(0))
    together, alone = ([Sampler(way, [1, 2], 30) for way in ways] for _ in range(2))
    for step in logits:
        assert choose(together, step) == [s.choose(row) for s, row in zip(alone, step, strict=True)]


def test_draws_follow_the_probabilities():
    sampler, counts = Sampler(Sampling(temperature=0.8), [], 5), torch.zeros(5)
    for _ in range(8000):
        counts[sampler.choose(LOGITS)] += 1
    expected = (LOGITS / 0.8).softmax(-1)
    deviation = (expected * (1 - expected) / 8000).sqrt()
    assert ((counts / 8000 - expected).abs() < 4 * deviation).all()


def test_what_was_taken_out_is_never_drawn():
    sampler = Sampler(Sampling(top_k=2, temperature=5.0), [], 5)
    assert {sampler.choose(LOGITS) for _ in range(300)} == {0, 1, 4}
