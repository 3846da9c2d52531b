"""A walk through layers that come and go, against the whole model in memory."""

import math
from dataclasses import replace

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer import score
from llamero.infer.score import documents, perplexity, sliding
from llamero.infer.texts import Text
from llamero.infer.walk import compare, walk
from llamero.model.config import LlamaConfig
from llamero.model.layered import Layered
from llamero.model.linear import PackedLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default, Dynamic
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run

SHAPE = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    rope=Default(10000.0, 8),
    max_position_embeddings=64,
)
VARIANTS = (
    "rtn-4bit-16g",
    "rtn-2bit--1g",
    "gptq-3bit-32g-actorder_True",
    "awq-4bit-32g",
    "gptq-5bit-32g-actorder_static-ct",
)


def made(directory, **changes):
    model = Llama(replace(SHAPE, **changes)).eval()
    initialize(model, seed=0, std=0.3)
    directory.mkdir()
    save_model(model, directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model and variants of it, by name."""
    root = tmp_path_factory.mktemp("models")
    original = made(root / "original")
    config = QuantizeConfig(variants=VARIANTS, calibration=Calibration(mixture="any"), dtype="bfloat16")
    run(config, model=original, out=lambda v: root / v.name, tokens=[torch.arange(50)])
    return {name: root / name for name in ("original", *VARIANTS)}


@pytest.fixture
def texts(draw):
    """One in windows, one in documents."""
    lengths = [7, 1, 20, 2]
    return [
        Text("windows", draw(150), sliding(150, window=32, stride=16), ""),
        Text("documents", draw(30, 1), documents(lengths), ""),
    ]


def measured(original, variant, texts, **how):
    reference, model = Layered(original), Layered(variant)
    seen = {m: walk(m, texts, name="m", **how) for m in (reference, model)}
    return compare(model, seen[model], texts, reference=reference, seen_by_reference=seen[reference], **how)


@torch.no_grad()
def brute_force(original, variant, text):
    """Every window by itself, whole models, all of the vocabulary at once, float64."""
    models = [load_model(path, dtype=torch.float32) for path in (original, variant)]
    kl, nll, same = [], [], []
    for w in text.windows:
        ids = torch.tensor([text.ids[w.start : w.stop]])
        asked = slice(w.scored - 1 - w.start, w.stop - 1 - w.start)
        p, q = (m(ids)[0, asked].double().softmax(-1) for m in models)
        kl.append((p * (p.log() - q.log())).sum(-1))
        nll.append(-q.log()[range(w.stop - w.scored), list(text.ids[w.scored : w.stop])])
        same.append(p.argmax(-1) == q.argmax(-1))
    return [float(torch.cat(part).double().mean()) for part in (kl, nll, same)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_those_of_brute_force(models, texts, variant, monkeypatch):
    monkeypatch.setattr(score, "LOGITS", 50 * 7)  # token_of_both positions at a time
    for text, found in zip(texts, measured(models["original"], models[variant], texts, batch_tokens=100), strict=True):
        kl, nll, same = brute_force(models["original"], models[variant], text)
        assert found.agreement.kl == pytest.approx(kl, rel=2e-5, abs=1e-8)
        assert found.agreement.kl > 1e-4
        assert math.log(found.perplexity.value) == pytest.approx(nll, rel=1e-6)
        assert found.agreement.top1 == pytest.approx(same)
        assert (found.tokens, found.broken) == (sum(w.stop - w.scored for w in text.windows), 0)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"rope": Dynamic(10000.0, 8, 2.0, 32)}, {"attention_bias": True}]
)
def test_a_walk_sees_what_the_whole_model_sees_bit_for_bit(tmp_path, texts, changes):
    directory = made(tmp_path / "m", **changes)
    whole = load_model(directory)
    for text, states in zip(texts, walk(Layered(directory), texts, name="m", batch_tokens=90), strict=True):
        batches = list(score.passes(text.windows, 90))
        for batch, state in zip(batches, states, strict=True):
            nodes, _ = score.predictions(text.ids, batch)
            hidden = score._windows_hidden(whole, text.ids, batch)[nodes]
            assert torch.equal(whole.model.norm(state), hidden)


@pytest.mark.parametrize(("kind", "tied"), [("Q8_0", False), ("Q4_0", True), ("F16", True)])
def test_a_gguf_file_is_walked_through_like_a_directory(tmp_path, texts, gguf_of, kind, tied):
    original = made(tmp_path / "m", tie_word_embeddings=tied)
    path = gguf_of(load_model(original), tmp_path / "m.gguf", kind=kind)  # which leaves the model as it rounds it
    for text, found in zip(texts, measured(original, path, texts), strict=True):
        kl, nll, _ = brute_force(original, path, text)
        assert found.agreement.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)  # float32
        assert math.log(found.perplexity.value) == pytest.approx(nll, rel=1e-6)


def test_perplexity_is_the_one_that_evaluate_reports(models, texts):
    found = measured(models["original"], models["rtn-2bit--1g"], texts)
    model = load_model(models["rtn-2bit--1g"], dtype=torch.float32)
    for text, tally in zip(texts, found, strict=True):
        told = perplexity(model, text.ids, text.windows)
        assert tally.perplexity.tokens == told.tokens
        assert tally.perplexity.value == pytest.approx(told.value, rel=1e-6)


def test_a_model_is_no_way_from_itself(models, texts):
    reference = Layered(models["original"])
    seen = walk(reference, texts, name="m")
    for found in compare(reference, seen, texts, reference=reference, seen_by_reference=seen):
        assert (found.agreement.kl, found.agreement.top1) == (0.0, 1.0)


def test_nothing_is_kept_of_a_layer_that_was_lent(models):
    model = Layered(models["rtn-4bit-16g"])
    with model.layer(1) as block:
        assert not any(isinstance(module, PackedLinear) for module in block.modules())
        assert not any(parameter.is_meta for parameter in block.parameters())
    with model.end():
        pass
    with model.embedding() as lookup:
        lookup.model.embed_tokens(torch.tensor([1]))
    assert all(tensor.is_meta for tensor in (*model._model.parameters(), *model._model.buffers()))


def test_positions_without_an_answer_are_counted_and_left_out(tmp_path, models, texts):
    broken = load_model(models["original"])
    token_of_both = next(one for one in texts[1].ids[12:20] if one in texts[0].ids)
    broken.model.embed_tokens.weight.data[token_of_both] = float("nan")
    (tmp_path / "broken").mkdir()
    save_model(broken, tmp_path / "broken")
    for text, found in zip(texts, measured(models["original"], tmp_path / "broken", texts), strict=True):
        asked = sum(w.stop - w.scored for w in text.windows)
        # where it stands, and before it as well: NaN times 0 is NaN
        with_it = [w for w in text.windows if token_of_both in text.ids[w.start : w.stop]]
        after = sum(token_of_both in text.ids[w.start : at] for w in with_it for at in range(w.scored, w.stop))
        assert 0 < after <= found.broken <= sum(w.stop - w.scored for w in with_it)
        assert found.tokens == asked - found.broken
        assert found.agreement.kl == pytest.approx(0, abs=1e-6)
    with pytest.raises(LlameroError, match="NaN among the logits of the reference"):
        measured(tmp_path / "broken", models["original"], texts)


def test_models_of_different_vocabularies_are_refused(tmp_path, models, texts):
    other = made(tmp_path / "other", vocab_size=51)
    with pytest.raises(LlameroError, match="vocabularies of 50 and 51"):
        measured(models["original"], other, texts)
