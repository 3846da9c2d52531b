"""Generation: one request or many, in one pass or in pieces, the text is the same; and why it ends."""

import copy

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer.generate import Completion, Request, events, generate, stream
from llamero.infer.sampler import Sampling
from llamero.model.attention import Documents

GREEDY = Sampling(temperature=0, max_new_tokens=12)


class Letters:
    """Token 1 is `A`, 2 is `B`, and so on; 0 is special."""

    def decode(self, ids, *, skip_special=True):
        return "".join(chr(64 + id) for id in ids if id)


@torch.no_grad()
def brute_force(model, prompt, count, total):
    """Greedy answer by whole forward passes, without any cache; `total` decides dynamic frequencies."""
    ids = list(prompt)
    for _ in range(count):
        positions = torch.arange(len(ids))
        hidden = model.hidden(torch.tensor(ids), model.rotation(positions, [total]), Documents((len(ids),)))
        ids.append(int(model.lm_head(hidden[-1]).argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("length", [1, 5, 30, 45])
def test_a_greedy_answer_is_that_of_whole_forward_passes(model, draw, length):
    (answer,) = generate(model, [draw(length)], GREEDY)
    assert answer.ids == brute_force(model, draw(length), 12, length + 12)
    assert answer.finish == "length"


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_together_is_as_alone(model, draw, rows):
    prompts = [draw(length, seed) for seed, length in enumerate((3, 20, 1, 40, 7, 20))]
    for sampling in (GREEDY, Sampling(seed=5, max_new_tokens=12, top_p=0.9, repetition_penalty=1.2)):
        alone = [generate(model, [prompt], sampling)[0] for prompt in prompts]
        assert generate(model, prompts, sampling, rows=rows) == alone


def test_prompts_may_come_in_pieces(model, draw):
    requests = [Request(tuple(draw(length, length)), GREEDY) for length in (40, 33, 2)]
    whole = list(events(model, requests))
    for step_tokens in (3, 7, 50):
        pieces = list(events(model, requests, rows=3, step_tokens=step_tokens))
        for number in range(3):
            assert [e for e in pieces if e.request == number] == [e for e in whole if e.request == number]


def test_each_request_has_its_own_sampling(model, draw):
    ways = [GREEDY, Sampling(seed=1, max_new_tokens=5), Sampling(seed=2, max_new_tokens=9, temperature=2.0)]
    together = list(events(model, [Request(tuple(draw(6)), way) for way in ways]))
    for number, way in enumerate(ways):
        (alone,) = generate(model, [draw(6)], way)
        assert tuple(e.id for e in together if e.request == number) == alone.ids


def test_the_seed_decides(model, draw):
    def answer(seed):
        return generate(model, [draw(6)], Sampling(seed=seed, max_new_tokens=20))[0].ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(model, draw):
    (free,) = generate(model, [draw(6)], GREEDY)
    stop = free.ids[4]
    cut = free.ids[: free.ids.index(stop)]
    way = Sampling(temperature=0, max_new_tokens=12, stop_ids=frozenset({stop}))
    assert generate(model, [draw(6)], way, Letters()) == [Completion(cut, Letters().decode(cut), "stop")]


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(model, draw):
    (free,) = generate(model, [draw(6)], GREEDY, Letters())
    stop = free.text[4:6]
    way = Sampling(temperature=0, max_new_tokens=12, stop_strings=(stop,))
    (answer,) = generate(model, [draw(6)], way, Letters())
    assert (answer.text, answer.finish) == (free.text[: free.text.index(stop)], "stop")
    assert "".join(stream(model, draw(6), way, Letters())) == answer.text


def test_the_stream_is_the_answer(model, draw):
    way = Sampling(seed=3, max_new_tokens=20)
    (answer,) = generate(model, [draw(6)], way, Letters())
    assert "".join(stream(model, draw(6), way, Letters())) == answer.text == Letters().decode(answer.ids)


def test_the_context_is_the_end(model, draw):
    (answer,) = generate(model, [draw(60)], GREEDY)
    assert (len(answer.ids), answer.finish) == (4, "length")
    with pytest.raises(LlameroError, match="64 tokens, the model's context is 64") as error:
        generate(model, [draw(3), draw(64)], GREEDY)
    assert error.value.where == "prompt 1"


def test_a_prompt_that_cannot_be_answered_is_refused(model, draw):
    with pytest.raises(LlameroError, match="empty"):
        generate(model, [[]], GREEDY)
    with pytest.raises(LlameroError, match="token 50 is outside the model's vocabulary of 50"):
        generate(model, [[1, 50]], GREEDY)
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(model, [draw(3)], Sampling(stop_strings=("x",)))
    assert generate(model, [], GREEDY) == []


def test_nan_is_named(model, draw):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(LlameroError, match="NaN among the logits of token 1") as error:
        generate(broken, [draw(3)], GREEDY)
    assert error.value.where == "prompt 0"


def test_a_stream_that_is_left_computes_no_further(model, draw, monkeypatch):
    passes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *arguments: passes.append(1) or hidden(*arguments))
    parts = stream(model, draw(3), Sampling(max_new_tokens=50), Letters())
    next(parts)
    parts.close()
    assert len(passes) < 5
