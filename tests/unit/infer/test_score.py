"""Perplexity and agreement against one forward pass per question."""

import copy
import math

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer import score
from llamero.infer.score import compare, documents, perplexity, sliding


def broken_at(model, token):
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[token] = float("nan")
    return broken


def test_nan_is_named(model):
    broken = broken_at(model, 7)
    with pytest.raises(LlameroError, match="NaN") as error:
        perplexity(broken, [1] * 40 + [7, 1, 1], sliding(43, window=8, stride=8), batch_tokens=24)
    assert error.value.where == "window 5 of the text"
    with pytest.raises(LlameroError, match="NaN"):
        compare(model, broken, [1, 2, 7, 3], sliding(4, window=4, stride=4))


@torch.no_grad()
def brute_perplexity(model, ids, window, stride):
    """Every token from a forward pass of its own window."""
    total, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        predicted = model(torch.tensor([ids[start:stop]]))[0].double().log_softmax(-1)
        for at in range(max(done, start + 1), stop):
            total -= float(predicted[at - 1 - start, ids[at]])
            count += 1
        done = stop
        if stop == len(ids):
            break
    return total, count


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(150, 32, 16), (150, 32, 32), (20, 32, 8), (33, 32, 32), (97, 40, 7)]
)
def test_perplexity_is_that_of_one_window_at_a_time(model, draw, length, window, stride, monkeypatch):
    monkeypatch.setattr(score, "LOGITS", 50 * 7)  # seven positions at a time
    ids = draw(length)
    total, count = brute_perplexity(model, ids, window, stride)
    found = perplexity(model, ids, sliding(length, window=window, stride=stride), batch_tokens=100)
    assert found.tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-6)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-6)


def test_every_token_but_the_first_is_scored_once(model, draw):
    assert perplexity(model, draw(101), sliding(101, window=30, stride=10)).tokens == 100
    assert perplexity(model, draw(101), sliding(101, window=30, stride=30)).tokens == 101 - 4


@torch.no_grad()
def test_documents_are_measured_each_by_itself(model, draw):
    lengths, ids = [7, 1, 20, 2], draw(30)
    total = count = start = 0
    for length in lengths:
        part = ids[start : start + length]
        start += length
        if length > 1:
            total += brute_perplexity(model, part, 64, 64)[0]
            count += length - 1
    found = perplexity(model, ids, documents(lengths), batch_tokens=9)
    assert found.tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "window", "stride", "message"),
    [
        (90, 65, 8, "context of 64"),
        (9, 1, 1, "nothing to predict"),
        (9, 8, 9, "1 to 8"),
        (9, 8, 0, "1 to 8"),
        (1, 8, 8, "1 tokens"),
    ],
)
def test_windows_that_make_no_sense_are_refused(model, draw, length, window, stride, message):
    with pytest.raises(LlameroError, match=message):
        perplexity(model, draw(length), sliding(length, window=window, stride=stride))


@torch.no_grad()
def test_agreement_is_the_formula(model, draw, monkeypatch):
    monkeypatch.setattr(score, "LOGITS", 50 * 7)
    other, ids = copy.deepcopy(model), draw(75)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    p, q = (
        torch.cat([m(torch.tensor([ids[at : at + 20]]))[0][:-1] for at in range(0, 75, 20)]).double().softmax(-1)
        for m in (model, other)
    )
    found = compare(model, other, ids, sliding(75, window=20, stride=20), batch_tokens=40)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.tokens == 75 - 4  # the last position of a window predicts nothing that is scored
    assert 0 < found.top1 < 1


def test_a_model_agrees_with_itself(model, draw):
    found = compare(model, model, draw(64), sliding(64, window=16, stride=16))
    assert (found.kl, found.top1) == (0.0, 1.0)
