"""The chunked cross-entropy against all logits at once: values, both gradients, weights, scales, chunks, dtypes."""

import math

import pytest
import torch

from llamero.kernels import cross_entropy
from llamero.kernels.cross_entropy import Seen, linear_cross_entropy, plain, sharded_linear_cross_entropy

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

VOCAB, DIM = 37, 8


def drawn(tokens, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    return hidden, weight, targets, torch.rand(tokens, generator=generator) * 3


def gradients(function, hidden, weight, targets, weights, *, scale=1.0, z_loss=0.0):
    loss = function(hidden, weight, targets, weights, z_loss)
    return (loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight)))


@pytest.fixture
def chunks_of(monkeypatch):
    """Return a setter of the number of tokens in a chunk."""
    return lambda tokens: monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", tokens * VOCAB)


def test_the_oracle_is_what_the_words_say():
    hidden, weight, targets, weights = drawn(5)
    expected = 0.0
    for x, target, share in zip(hidden, targets, weights, strict=True):
        odds = torch.tensor([sum(a * b for a, b in zip(x.tolist(), row, strict=True)) for row in weight.tolist()]).exp()
        expected -= share.item() * (odds[target] / odds.sum()).log().item()
    assert plain(hidden, weight, targets, weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens, chunk, chunks_of):
    chunks_of(chunk)
    given = drawn(tokens)
    for ours, theirs in zip(gradients(linear_cross_entropy, *given), gradients(plain, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, -2.0, 0.0])
def test_what_comes_after_the_loss_scales_its_gradients(scale):
    given = drawn(11)
    ours, theirs = (gradients(function, *given, scale=scale) for function in (linear_cross_entropy, plain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_token_of_weight_zero_teaches_nothing():
    hidden, weight, targets, weights = drawn(6)
    weights[2] = 0
    _, grad_hidden, grad_weight = gradients(linear_cross_entropy, hidden, weight, targets, weights)
    assert not grad_hidden[2].any()
    keep = torch.tensor([0, 1, 3, 4, 5])
    _, _, without = gradients(linear_cross_entropy, hidden[keep], weight, targets[keep], weights[keep])
    torch.testing.assert_close(grad_weight, without)


def test_only_the_gradients_that_are_asked_for_are_computed():
    hidden, weight, targets, weights = drawn(6)
    both = gradients(linear_cross_entropy, hidden, weight, targets, weights)
    for number, wanted in enumerate((hidden, weight), start=1):
        h, w = (x if x is wanted else x.detach() for x in (hidden, weight))
        (alone,) = torch.autograd.grad(linear_cross_entropy(h, w, targets, weights), wanted)
        torch.testing.assert_close(alone, both[number])
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, weights), both[0])


@pytest.mark.parametrize("chunk", [4, 100])
def test_in_bfloat16_errors_are_those_of_bfloat16(chunk, chunks_of):
    chunks_of(chunk)
    hidden, weight, targets, weights = drawn(13, dtype=torch.bfloat16)
    rounded = weight.detach().bfloat16().float().requires_grad_()
    exact = gradients(plain, hidden.detach().float().requires_grad_(), rounded, targets, weights)
    ours = gradients(linear_cross_entropy, hidden, weight, targets, weights)
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=2e-2, atol=2e-2)


def test_in_float64_nothing_is_rounded_to_float32():
    hidden, weight, targets, weights = (x.double() if x.is_floating_point() else x for x in drawn(13))
    given = hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets, weights
    for ours, theirs in zip(gradients(linear_cross_entropy, *given), gradients(plain, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight, targets, weights = drawn(9)
    given = (hidden.detach() * 200).requires_grad_(), weight, targets, weights
    for ours, theirs in zip(gradients(linear_cross_entropy, *given), gradients(plain, *given), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_z_loss_is_the_square_of_the_log_of_what_all_odds_sum_to():
    hidden, weight, targets, weights = drawn(5)
    expected = sum(
        share.item()
        * math.log(sum(math.exp(sum(a * b for a, b in zip(x, row, strict=True))) for row in weight.tolist())) ** 2
        for x, share in zip(hidden.tolist(), weights, strict=True)
    )
    added = plain(hidden, weight, targets, weights, 0.5) - plain(hidden, weight, targets, weights)
    assert added.item() == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("z_loss", [1e-4, 0.3, 10.0])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_z_loss_and_its_gradients_are_those_of_all_logits_at_once(z_loss, chunk, chunks_of):
    chunks_of(chunk)
    hidden, weight, targets, weights = (x.double() if x.is_floating_point() else x for x in drawn(13))
    given = hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets, weights
    ours, theirs = (gradients(function, *given, z_loss=z_loss) for function in (linear_cross_entropy, plain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_z_loss_makes_large_logits_smaller():
    hidden, weight, targets, weights = drawn(9)
    given = hidden, (weight.detach() * 3).requires_grad_(), targets, weights
    for _ in range(50):
        _, _, gradient = gradients(linear_cross_entropy, *given, z_loss=0.1)
        given[1].data -= 0.05 * gradient
    before = (hidden @ weight.T * 3).logsumexp(-1).square().mean()
    assert (hidden @ given[1].T).logsumexp(-1).square().mean() < 0.5 * before


def test_no_token_is_no_loss():
    given = drawn(0)
    loss, grad_hidden, grad_weight = gradients(linear_cross_entropy, *given)
    assert loss == 0
    assert grad_hidden.shape == (0, DIM)
    assert not grad_weight.any()


def test_a_second_backward_is_refused():
    loss = linear_cross_entropy(*drawn(3))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_of_a_head_that_could_be_shared_is_that_of_the_whole(z_loss):
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 37, (11,)), torch.rand(11, dtype=torch.float64)
    expected = plain(hidden, weight, targets, weights, z_loss)
    gradients = torch.autograd.grad(expected * 3, (hidden, weight))
    loss = sharded_linear_cross_entropy(hidden, weight, targets, weights, None, z_loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (hidden, weight)), gradients)


def sharded(hidden, weight, targets, weights, z_loss=0.0, seen=None):
    return sharded_linear_cross_entropy(hidden, weight, targets, weights, None, z_loss, seen)


@pytest.mark.parametrize("function", [linear_cross_entropy, sharded])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_seen_of_each_position_is_what_all_logits_show(function, chunk, grad, chunks_of):
    chunks_of(chunk)
    hidden, weight, targets, weights = drawn(23, seed=3)
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(23) % 3 == 0, likeliest, targets)  # some are right
    ours, theirs = (Seen.blank(hidden, right=True) for _ in range(2))
    expected = plain(hidden, weight, targets, weights, 0.1, theirs)
    with torch.set_grad_enabled(grad):
        loss = function(hidden, weight, targets, weights, 0.1, ours)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.nll, theirs.nll)
    assert ours.right is not None
    assert theirs.right is not None
    assert ours.right.tolist() == theirs.right.tolist() == (likeliest == targets).tolist()
    assert 8 <= ours.right.sum() < 23
    torch.testing.assert_close((ours.nll * weights).sum(), function(hidden, weight, targets, weights))


@pytest.mark.parametrize("function", [plain, linear_cross_entropy, sharded])
def test_of_equal_logits_the_first_token_is_the_likeliest(function):
    hidden, weight = torch.ones(3, DIM), torch.ones(VOCAB, DIM)
    seen = Seen.blank(hidden, right=True)
    function(hidden, weight, torch.tensor([0, 1, VOCAB - 1]), torch.ones(3), 0.0, seen)
    assert seen.right is not None
    assert seen.right.tolist() == [True, False, False]
