"""Log-likelihoods, perplexity and agreement against one forward pass per question."""

import copy
import math

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer import score
from llamero.infer.score import compare, documents, log_likelihoods, perplexity, sliding


@torch.no_grad()
def brute_force(model, context, continuation):
    """One request in one forward pass; return its log-likelihood and whether greedy decoding says it."""
    ids = [*context, *continuation]
    predicted = model(torch.tensor([ids[:-1]]))[0, len(context) - 1 :].double().log_softmax(-1)
    chosen = predicted[range(len(continuation)), list(continuation)]
    return float(chosen.sum()), predicted.argmax(-1).tolist() == list(continuation)


def assert_right(model, requests, scores):
    for (context, continuation), scored in zip(requests, scores, strict=True):
        expected, greedy = brute_force(model, context, continuation)
        assert scored.log_likelihood == pytest.approx(expected, abs=2e-5)
        assert (scored.greedy, scored.tokens) == (greedy, len(continuation))


def quiz(draw):
    """Shared contexts, equal requests, equal tokens cut elsewhere, continuations of one token and of many."""
    contexts = [draw(length, length) for length in (1, 12, 30, 38)]
    requests = [(c, draw(1 + n * 3 % 11, 100 + n)) for c in contexts for n in range(5)]
    whole = draw(20, 7)
    return [*requests, (whole[:9], whole[9:]), (whole[:12], whole[12:]), requests[3], (draw(12, 12), draw(1, 9))]


@pytest.mark.parametrize("batch_tokens", [1, 40, 90, 4096])
def test_scores_are_those_of_one_pass_per_request_whatever_the_batch(model, draw, batch_tokens):
    requests = quiz(draw)
    assert_right(model, requests, log_likelihoods(model, requests, batch_tokens=batch_tokens))


def test_scores_come_in_the_order_of_the_requests(model, draw):
    requests = quiz(draw)
    straight, back = log_likelihoods(model, requests), log_likelihoods(model, requests[::-1])
    for a, b in zip(straight, back[::-1], strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)


@torch.no_grad()
def test_a_continuation_the_model_would_say_is_greedy(model, draw):
    said = list(draw(6))
    for _ in range(3):
        said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
    other = [*said[6:8], (said[8] + 1) % 50]
    scores = log_likelihoods(model, [(said[:6], said[6:]), (said[:6], other)])
    assert [scored.greedy for scored in scores] == [True, False]


def counted(model, monkeypatch):
    tokens = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: tokens.append(len(ids)) or hidden(ids, *rest))
    return tokens


def test_a_shared_context_is_computed_once(model, draw, monkeypatch):
    tokens, context = counted(model, monkeypatch), draw(20)
    requests = [(context, draw(4, seed)) for seed in range(4)]
    log_likelihoods(model, [*requests, requests[2]])
    assert tokens == [20 + 4 * 3]


def test_letters_after_a_question_cost_nothing_but_the_question(model, draw, monkeypatch):
    tokens, context = counted(model, monkeypatch), draw(20)
    log_likelihoods(model, [(context, [letter]) for letter in range(4)])
    assert tokens == [20]


def test_a_crowd_of_continuations_is_split_over_passes(model, draw, monkeypatch):
    tokens, context = counted(model, monkeypatch), draw(20)
    log_likelihoods(model, [(context, draw(5, seed)) for seed in range(10)], batch_tokens=32)
    assert max(tokens) <= 32
    assert len(tokens) == 4


def test_contexts_lose_their_left_and_it_is_counted(model, draw):
    context, continuation = draw(40), draw(5, 1)
    (scored,) = log_likelihoods(model, [(context, continuation)], max_length=16)
    assert scored.truncated == 40 + 5 - 17
    assert scored.log_likelihood == pytest.approx(brute_force(model, context[28:], continuation)[0], abs=2e-5)
    (whole,) = log_likelihoods(model, [(context, continuation)], max_length=44)
    assert whole.truncated == 0
    (own,) = log_likelihoods(model, [(draw(90), continuation)])  # the model's own context
    assert own.truncated == 90 + 5 - 65


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([1], []), "continuation is empty"),
        (([], [1]), "context is empty"),
        (([1], [2] * 9), "9 tokens, the model sees 8"),
        (([1], [77]), "token 77 is outside"),
        (([-1], [7]), "token -1 is outside"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused_by_number(model, request_, message):
    with pytest.raises(LlameroError, match=message) as error:
        log_likelihoods(model, [([1], [2]), request_], max_length=8)
    assert error.value.where == "request 1"


def test_no_requests_no_scores(model):
    assert log_likelihoods(model, []) == []


def broken_at(model, token):
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[token] = float("nan")
    return broken


def test_nan_is_named(model):
    broken = broken_at(model, 7)
    with pytest.raises(LlameroError, match="NaN") as error:
        log_likelihoods(broken, [([1, 2], [3]), ([1, 2], [4]), ([1, 7], [3])], batch_tokens=2)
    assert error.value.where == "request 2"
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
