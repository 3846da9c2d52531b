"""Log-likelihoods by the walk through a tree of requests, against one forward pass per request."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer import likelihood, prefix_tree, score
from llamero.infer.context import rope_length
from llamero.infer.likelihood import log_likelihoods, prepare
from llamero.model.linear import pack


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


@pytest.mark.parametrize("pass_tokens", [3, 40, 4096])
def test_scores_are_those_of_one_pass_per_request_whatever_the_batch(model, draw, pass_tokens):
    requests = quiz(draw)
    assert_right(model, requests, log_likelihoods(model, requests, pass_tokens=pass_tokens))


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
    monkeypatch.setattr(model, "hidden", lambda ids, *rest, **how: tokens.append(len(ids)) or hidden(ids, *rest, **how))
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
    log_likelihoods(model, [(context, draw(5, seed)) for seed in range(10)], pass_tokens=32)
    assert max(tokens) <= 32
    assert sum(tokens) == 59  # some of them begin alike
    assert len(tokens) == 2


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


def forest_of_requests(seed, requests=40):
    """Random requests that share beginnings at random depths, at times wholly, and differ in where they are cut."""
    rng = torch.Generator().manual_seed(seed)

    def below(number):
        return int(torch.randint(number, (), generator=rng))

    known = [[below(50)] for _ in range(2)]
    made = []
    for _ in range(requests):
        stem = known[below(len(known))]
        ids = [*stem[: 1 + below(len(stem))], *(below(50) for _ in range(1 + below(12)))][:60]
        known.append(ids)
        cut = 1 + below(len(ids) - 1)
        made.append((ids[:cut], ids[cut:]))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_random_trees_are_scored_as_one_request_at_a_time(model, seed, monkeypatch):
    requests, tokens = forest_of_requests(seed), counted(model, monkeypatch)
    for pass_tokens in (7, 64, 1000):
        tokens.clear()
        scored = log_likelihoods(model, requests, pass_tokens=pass_tokens)
        computed = sum(tokens)
        assert_right(model, requests, scored)
        prefixes = {
            (rope_length(model.config, len(c) + len(a) - 1), *(*c, *a)[: end + 1])
            for c, a in requests
            for end in range(len(c) + len(a) - 1)
        }
        assert computed == len(prefixes)


def test_passes_need_only_the_passes_of_their_path(model, draw):
    stem = draw(20)
    requests = [(stem + draw(12, seed), draw(3, seed + 50)) for seed in range(12)]
    work = prepare(model.config, requests, pass_tokens=20)
    needed = prefix_tree.needed(work.tree, work.passes, {len(work.passes) - 1})
    assert needed[0] == 0  # the stem
    assert len(needed) < len(work.passes)


def test_shares_are_about_equal_and_all_there(model, draw):
    requests = [(draw(3) + draw(5 + seed % 7, seed), draw(4, seed + 50)) for seed in range(80)]
    work = prepare(model.config, requests, pass_tokens=16)
    wanted = list(range(1, len(work.passes)))
    for count in (1, 2, 3, 5, len(work.passes) + 3):
        parts = prefix_tree.shares(work.tree, work.passes, wanted, count)
        assert len(parts) == count
        assert [number for part in parts for number in part] == wanted
        sizes = [sum(work.passes[number][1] - work.passes[number][0] for number in part) for part in parts]
        assert max(sizes) <= 1.2 * sum(sizes) / count + 16


def test_the_memory_of_keys_and_values_is_known_before(model, draw):
    stem = draw(40)
    work = prepare(model.config, [(stem, draw(4, seed)) for seed in range(30)], pass_tokens=16)
    assert work.longest <= 43 + 16
    assert work.bytes_needed(model.config, torch.float32) == 2 * 2 * work.longest * 2 * 8 * 4


def kill_after(passes, monkeypatch):
    """Let the walk end after so many passes, as a kill would."""
    walk = likelihood._walk

    def ended(*how):
        yield from islice(walk(*how), passes)
        raise KeyboardInterrupt

    monkeypatch.setattr(likelihood, "_walk", ended)


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(model, tmp_path, monkeypatch, after):
    requests = forest_of_requests(3, requests=60)
    whole = log_likelihoods(model, requests, pass_tokens=16)
    with monkeypatch.context() as patch:
        kill_after(after, patch)
        with pytest.raises(KeyboardInterrupt):
            log_likelihoods(model, requests, pass_tokens=16, kept=tmp_path)
    (file,) = tmp_path.glob("*/0.jsonl")
    assert len(file.read_text().splitlines()) == after
    with file.open("a") as broken:
        broken.write('{"pass": 9, "places": [1, 2')  # half a line
    tokens = counted(model, monkeypatch)
    assert log_likelihoods(model, requests, pass_tokens=16, kept=tmp_path) == whole
    passes = len(prepare(model.config, requests, pass_tokens=16).passes)
    assert len(tokens) >= passes - after
    assert len(file.read_text().splitlines()) == passes
    tokens.clear()
    assert log_likelihoods(model, requests, pass_tokens=16, kept=tmp_path) == whole
    assert tokens == []


def test_what_another_model_found_is_not_taken(model, tmp_path):
    requests = forest_of_requests(1)
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 1.5
    first = log_likelihoods(model, requests, kept=tmp_path)
    assert log_likelihoods(other, requests, kept=tmp_path) == log_likelihoods(other, requests) != first


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_share_the_work_find_the_bits_of_one(model, tmp_path, size):
    requests = forest_of_requests(5, requests=80)
    whole = log_likelihoods(model, requests, pass_tokens=16)
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda rank: shared(model, requests, meeting, rank), range(size)))
    assert found == [whole] * size


class Meeting:
    """Where threads that play processes wait for each other."""

    def __init__(self, size):
        self.size, self.barrier, self.said = size, threading.Barrier(size), {}

    def gather(self, rank, value):
        self.said[rank] = value
        self.barrier.wait()
        said = [self.said[rank] for rank in range(self.size)]
        self.barrier.wait()
        return said


def shared(model, requests, meeting, rank):
    others: Any = SimpleNamespace(
        rank=rank, size=meeting.size, gather=lambda value: meeting.gather(rank, value), together=nullcontext
    )
    return log_likelihoods(model, requests, pass_tokens=16, others=others)


def test_nan_is_named(model, tmp_path):
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[7] = float("nan")
    requests = [([1, 2], [3]), ([1, 2], [4]), ([1, 7], [3]), ([1, 7], [5])]
    with pytest.raises(LlameroError, match="NaN") as error:
        log_likelihoods(broken, requests, pass_tokens=2, kept=tmp_path)
    assert error.value.where == "request 2"


def test_logits_exist_where_something_is_asked_and_a_few_rows_at_a_time(model, monkeypatch):
    requests, rows = forest_of_requests(2), []
    monkeypatch.setattr(score, "LOGITS", 50 * 7)
    with monkeypatch.context() as patch:
        head = model.lm_head.forward
        patch.setattr(model.lm_head, "forward", lambda hidden: rows.append(len(hidden)) or head(hidden))
        log_likelihoods(model, requests, pass_tokens=64)
    tree = prepare(model.config, requests, pass_tokens=64).tree
    assert max(rows) <= 7
    assert sum(rows) == len(set(tree.asked_nodes.tolist())) < len(tree)


def test_quantized_models_walk_as_they_run_one_request(model, draw):
    quantized = copy.deepcopy(model)
    pack(quantized.model.layers, "nf4")
    requests = quiz(draw)
    scores = log_likelihoods(quantized, requests, pass_tokens=40)
    assert_right(quantized, requests, scores)
    assert scores != log_likelihoods(model, requests, pass_tokens=40)


def test_what_does_not_fit_on_the_device_is_said_with_the_way_out(model, draw, monkeypatch):
    def full(*_args, **_how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "hidden", full)
    with pytest.raises(LlameroError, match=r"0\.00 GiB\) and a pass of 40 tokens") as refused:
        log_likelihoods(model, quiz(draw), pass_tokens=40)
    assert "bfloat16" in str(refused.value.fix)
