"""Generation, sampling, scoring and perplexity against `transformers`, on models that were really trained."""

import copy
import math
import os
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llamero.infer.beams import beam_search
from llamero.infer.generate import Request, events, generate, stream
from llamero.infer.likelihood import log_likelihoods
from llamero.infer.sampler import Sampling, processed
from llamero.infer.score import compare, perplexity, sliding
from llamero.model.load import load_model
from llamero.text.tokenizer import load_tokenizer

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She",
    "The capital of France is",
    "Tom and his dog went to the park to play with a red ball. They ran and jumped, and then",
    "One",
]


class Pair:
    """A model of ours and of theirs, with its tokenizer."""

    def __init__(self, directory):
        self.theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.ours = load_model(directory, dtype=torch.float32)
        self.tokenizer = load_tokenizer(directory)
        self.prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in TEXTS]


@pytest.fixture(scope="module", params=["tinystories-656k-hf", "ref-7m-hf"])
def pair(request):
    directory = SHARED / "data/weights" / request.param
    if not directory.exists():
        pytest.skip(f"{directory} is not there")
    return Pair(directory)


def their_answer(model, prompt, **how):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0, **how
    )
    return tuple(out[0, len(prompt) :].tolist())


def without_end(ids, stop):
    return ids[: ids.index(stop)] if stop in ids else ids


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_transformers_alone_and_together(pair, penalty):
    stop = pair.tokenizer.eos_id
    expected = [
        without_end(their_answer(pair.theirs, prompt, repetition_penalty=penalty), stop) for prompt in pair.prompts
    ]
    way = Sampling(temperature=0, max_new_tokens=40, stop_ids=frozenset({stop}), repetition_penalty=penalty)
    assert [answer.ids for answer in generate(pair.ours, pair.prompts, way)] == expected
    assert [generate(pair.ours, [prompt], way)[0].ids for prompt in pair.prompts] == expected


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_beams_are_those_of_transformers(pair, penalty):
    stop = pair.tokenizer.eos_id
    way = Sampling(temperature=0, max_new_tokens=24, stop_ids=frozenset({stop}), repetition_penalty=penalty)
    for prompt in pair.prompts[:3]:
        ids = torch.tensor([prompt])
        out = pair.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            num_beams=4,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        theirs = [id for id in out[0, len(prompt) :].tolist() if id != 0]
        assert beam_search(pair.ours, Request(tuple(prompt), way), beams=4) == theirs


def test_sampled_answers_do_not_depend_on_the_batch(pair):
    way = Sampling(seed=11, temperature=0.9, top_p=0.95, top_k=50, max_new_tokens=30)
    together = generate(pair.ours, pair.prompts, way, pair.tokenizer)
    for prompt, answer in zip(pair.prompts, together, strict=True):
        assert generate(pair.ours, [prompt], way, pair.tokenizer) == [answer]
        assert "".join(stream(pair.ours, prompt, way, pair.tokenizer)) == answer.text
        whole = pair.tokenizer.decode([*prompt, *answer.ids])
        assert whole == pair.tokenizer.decode(prompt) + answer.text


def test_a_stop_string_cuts_a_real_answer(pair):
    way = Sampling(temperature=0, max_new_tokens=40)
    (free,) = generate(pair.ours, pair.prompts[:1], way, pair.tokenizer)
    stop = free.text[20:26]
    cut = Sampling(temperature=0, max_new_tokens=40, stop_strings=(stop,))
    found = list(events(pair.ours, [Request(tuple(pair.prompts[0]), cut)], pair.tokenizer))
    assert "".join(event.text for event in found) == free.text[: free.text.index(stop)]
    assert found[-1].finish == "stop"


def test_processed_logits_are_those_of_transformers_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        logits = 4 * torch.randn(3, 200, generator=generator)
        if case % 3 == 0:
            logits = logits.round()  # ties
        ids = cast("torch.LongTensor", torch.randint(200, (3, 30), generator=generator))
        way = Sampling(
            temperature=(0.3, 1.0, 1.7)[case % 3],
            top_k=(0, 1, 40, 500)[case % 4],
            top_p=(1.0, 0.9, 0.2, 0.999, 1e-4)[case % 5],
            typical_p=(1.0, 0.95, 0.2)[case % 9 % 3],
            repetition_penalty=(1.0, 1.3, 0.8)[case % 7 % 3],
        )
        expected: torch.Tensor = RepetitionPenaltyLogitsProcessor(way.repetition_penalty)(
            ids, cast("torch.FloatTensor", logits)
        )
        expected = TemperatureLogitsWarper(way.temperature)(ids, expected)
        if way.top_k:
            expected = TopKLogitsWarper(way.top_k)(ids, expected)
        expected = TopPLogitsWarper(way.top_p)(ids, expected)
        if way.typical_p < 1:
            expected = TypicalLogitsWarper(way.typical_p)(ids, cast("torch.FloatTensor", expected))
        seen = torch.zeros(3, 200, dtype=torch.bool).scatter(1, ids, True)
        assert torch.equal(processed(logits, seen, way), expected), way


@torch.no_grad()
def test_dynamic_frequencies_are_fixed_by_the_whole_request(tmp_path):
    """Greedy answers equal whole forward passes padded to the final length, which is what fixes their frequencies."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    prompts = [torch.randint(60, (length,)).tolist() for length in (5, 30, 70)]
    answers = generate(ours, prompts, Sampling(temperature=0, max_new_tokens=20))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            padded = torch.tensor([ids + [0] * (len(prompt) + 20 - len(ids))])
            assert int(theirs(padded).logits[0, len(ids) - 1].argmax()) == token
            ids.append(token)


@torch.no_grad()
def test_scores_are_those_of_transformers(pair):
    endings = [" was happy.", " went home", " the", " the end of the story", " 12"]
    requests = [(prompt, pair.tokenizer.encode(end)) for prompt in pair.prompts for end in endings]
    for (context, continuation), scored in zip(requests, log_likelihoods(pair.ours, requests), strict=True):
        logits = pair.theirs(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(len(continuation)), continuation]
        assert scored.log_likelihood == pytest.approx(float(expected.sum()), abs=2e-4)
        assert scored.greedy == (logits.argmax(-1).tolist() == continuation)


def wikitext(pair, tokens):
    path = next(iter(sorted((SHARED / "data/longtext/wikitext2").rglob("*test*"))), None)
    if path is None or not path.is_file():
        pytest.skip("WikiText-2 is not there")
    text = path.read_text(encoding="utf-8")[: 8 * tokens]
    return [pair.tokenizer.bos_id, *pair.tokenizer.encode(text)][:tokens]


@torch.no_grad()
@pytest.mark.parametrize("stride", [128, 256])
def test_perplexity_is_that_of_the_strided_loop(pair, stride):
    ids, window = wikitext(pair, 900), 256
    total, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        part = torch.tensor([ids[start:stop]])
        labels = part.clone()
        labels[:, : -(stop - done)] = -100
        asked = int((labels[:, 1:] != -100).sum())  # the loss shifts: a window's first token has no prediction
        total += float(pair.theirs(part, labels=labels).loss) * asked
        count += asked
        done = stop
        if stop == len(ids):
            break
    found = perplexity(pair.ours, ids, sliding(len(ids), window=window, stride=stride))
    assert found.tokens == count
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-5)


@torch.no_grad()
def test_half_precision_stays_close_and_the_figures_say_how_close(pair):
    ids = wikitext(pair, 300)
    half = copy.deepcopy(pair.ours).to(torch.bfloat16)
    found = compare(pair.ours, half, ids, sliding(300, window=150, stride=150))
    parts = [torch.tensor([ids[at : at + 150]]) for at in (0, 150)]
    p = torch.cat([pair.theirs(part).logits[0][:-1] for part in parts]).double().log_softmax(-1)
    q = torch.cat([half(part)[0][:-1] for part in parts]).double().log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-2)
    assert 0 < found.kl < 1e-2
    assert found.top1 > 0.95
