import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.core.errors import LlameroError
from llamero.infer.score import compare, perplexity, sliding
from llamero.infer.texts import Text, first_documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.gate import judge
from llamero.quantize.measure import measure, refuse_what_was_calibrated_on, results_of
from llamero.quantize.run import run

VARIANTS = ("gptq-8bit-32g-actorder_True", "rtn-2bit--1g")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    shape = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
    )
    model = Llama(shape)
    initialize(model, seed=1, std=0.3)
    (root / "plain").mkdir()
    save_model(model, root / "plain")
    config = QuantizeConfig(variants=VARIANTS, calibration=Calibration(mixture="chat"))
    run(config, model=root / "plain", out=lambda v: root / v.name, tokens=[torch.arange(60)])
    return root


@pytest.fixture(scope="module")
def texts():
    ids = torch.randint(96, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    windows = sliding(300, window=32, stride=16)
    return [Text("one", ids, windows, "window 32"), Text("two", ids[::-1], windows, "window 32")]


def measured(models, texts, *names):
    found = measure(texts, original=("plain", models / "plain"), variants={name: models / name for name in names})
    return {each.name: each for each in found}


def test_numbers_are_those_of_whole_models(models, texts):
    found = measured(models, texts, *VARIANTS)
    assert list(found) == ["plain", *VARIANTS]
    original = load_model(models / "plain", dtype=torch.float32)
    for name, each in found.items():
        model = load_model(models / name, dtype=torch.float32)
        assert each.problem is None
        assert each.seconds > 0
        for text, reading in zip(texts, each.readings, strict=True):
            told = perplexity(model, text.ids, text.windows)
            assert reading.perplexity == pytest.approx(told.value, rel=1e-6)
            assert (reading.text, reading.tokens, reading.broken) == (text.name, told.tokens, 0)
            if name == "plain":
                assert (reading.kl, reading.top1) == (None, None)
                continue
            beside = compare(original, model, text.ids, text.windows)
            assert reading.kl == pytest.approx(beside.kl, rel=1e-4, abs=1e-7)
            assert reading.top1 == beside.top1
    near, far = (found[name].kl or 0.0 for name in VARIANTS)
    assert 0 < near < 0.1 * far


def test_results_say_how_they_were_got(models, texts):
    each = measured(models, texts, VARIANTS[0])[VARIANTS[0]]
    found = results_of(each, tokenizer="t")
    assert [(r.task, r.inputs["text"]) for r in found] == [
        ("perplexity", "one"), ("agreement", "one"), ("perplexity", "two"), ("agreement", "two"),
    ]  # fmt: skip
    assert found[0].protocol == "window 32, 299 tokens"
    assert found[1].protocol == "KL(original ‖ this) in nats per token, window 32, 299 tokens"
    assert {r.model for r in found} == {VARIANTS[0]}
    assert found[1].metrics["kl"] == each.readings[0].kl


def damaged(models, tmp_path, leaf, change):
    """A copy of a variant of which some tensors were changed."""
    target = tmp_path / "damaged"
    shutil.copytree(models / VARIANTS[0], target)
    tensors = load_file(target / "model.safetensors")
    save_file({n: change(t) if n.endswith(leaf) else t for n, t in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("leaf", "change", "says"),
    [
        ("qweight", lambda t: t.flip(0), "KL"),
        ("0.mlp.up_proj.scales", lambda t: t * float("nan"), "NaN or infinity"),
        ("norm.weight", lambda t: t * float("inf"), "NaN or infinity"),
        ("g_idx", lambda t: t + 10_000, "could not be measured"),
    ],
)
def test_a_broken_variant_is_caught(models, texts, tmp_path, leaf, change, says):
    path = damaged(models, tmp_path, leaf, change)
    fine, broken = list(
        measure(texts, original=("plain", models / "plain"), variants={VARIANTS[0]: models / VARIANTS[0], "b": path})
    )[1:]
    assert judge(fine, max_kl=0.5).published
    verdict = judge(broken, max_kl=0.5)
    assert not verdict.published
    assert says in str(verdict.reason)
    json.dumps(broken.to_json(), allow_nan=False)


def test_a_half_written_variant_is_caught(models, texts, tmp_path):
    target = tmp_path / "half"
    shutil.copytree(models / VARIANTS[0], target)
    whole = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(whole[:-100])
    (_, found) = measure(texts, original=("plain", models / "plain"), variants={"half": target})
    assert "the header promises" in str(found.problem)
    assert not judge(found, max_kl=1e9).published


def test_the_original_must_work_itself(models, texts, tmp_path):
    broken = load_model(models / "plain")
    broken.model.norm.weight.data[3] = float("nan")
    (tmp_path / "m").mkdir()
    save_model(broken, tmp_path / "m")
    with pytest.raises(LlameroError, match="NaN among the logits of the reference"):
        list(measure(texts, original=("plain", tmp_path / "m"), variants={}))


def test_a_text_that_was_calibrated_on_is_refused_under_any_name(texts):
    elsewhere = [torch.arange(500) % 90]
    refuse_what_was_calibrated_on(texts, elsewhere)
    with pytest.raises(LlameroError, match="% of it was calibrated on") as caught:
        refuse_what_was_calibrated_on(texts, [*elsewhere, torch.tensor([5, 6, *texts[1].ids])])
    assert caught.value.where == "two"
    refuse_what_was_calibrated_on(texts, [torch.tensor(texts[1].ids[:31])])  # too short to be more than chance


def test_documents_are_taken_from_the_first_and_long_ones_are_seen_in_windows(models):
    ids = list(range(90))
    text = first_documents("d", [ids[:50], ids[50:51], ids[60:70], ids[:9]], window=32, stride=16, tokens=56)
    assert text.ids == [*ids[:50], 50, *ids[60:65]]
    assert [(w.start, w.stop, w.scored) for w in text.windows] == [(0, 32, 1), (16, 48, 32), (32, 50, 48), (51, 56, 52)]
    assert "window 32, stride 16" in text.protocol
