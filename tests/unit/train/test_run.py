import json

import pytest
import torch
from pydantic import ValidationError

from llamero.core.errors import LlameroError
from llamero.engine.metrics import read_lines
from llamero.engine.stage import StageConfig
from llamero.model.load import load_model
from llamero.parallel.config import ParallelConfig
from llamero.text.tokenizer import load_tokenizer
from llamero.train.config import ShapeConfig
from llamero.train.run import device, fresh_config, grow_vocabulary, run

SHAPE = {"hidden": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 24, "context": 64}


def shape(**keys):
    return ShapeConfig.model_validate(SHAPE | keys)


@pytest.fixture
def train(tmp_path, data, tokenizer_files):
    """Train a stage and return what is said of it and where the model is."""

    def make(name="first", start=None, **keys):
        stage = {"name": name, "mixture": "chat", "sequence": 64, "batch": 4, "lr": 1e-2}
        stage |= {} if "epochs" in keys else {"steps": 3}
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        said = run(
            StageConfig.model_validate(stage | keys),
            start=start or shape(),
            data=data,
            tokenizer=tokenizer_files,
            parallel=ParallelConfig(device="cpu"),
            seed=5,
            out=out,
        )
        return said, out

    return make


def test_a_stage_makes_a_model_that_can_be_loaded(train, tokenizer):
    said, out = train(epochs=2)
    model = load_model(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert said["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.vocab_size == len(tokenizer)
    assert load_tokenizer(out).digest == tokenizer.digest
    assert {"chat_template.jinja", "generation_config.json", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("checkpoints*"))
    lines = read_lines(out / "metrics.jsonl")
    assert said["steps"] == len(lines)
    assert said["tokens"] == sum(line["tokens"] for line in lines) == 2 * said["packing"]["tokens"]
    assert said["loss"] == lines[-1]["loss"] < lines[0]["loss"]
    assert said["validation_loss"] == lines[-1]["validation_loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_are_exported_in_the_precision_asked_for(train, dtype):
    _, out = train(export=dtype)
    assert {p.dtype for p in load_model(out).parameters()} == {getattr(torch, dtype)}
    assert dtype in (json.loads((out / "config.json").read_text()).values())


def test_the_next_stage_begins_where_the_last_ended(train):
    said, first = train(steps=8)
    _, second = train(name="second", start=first, steps=1, lr=1e-9)
    begin, end = load_model(first), load_model(second)
    torch.testing.assert_close(dict(end.named_parameters()), dict(begin.named_parameters()), rtol=0, atol=1e-7)
    assert said["packing"]["rows"] > 0


def test_a_sequence_longer_than_the_context_is_refused(train):
    with pytest.raises(LlameroError, match=r"stage first: `sequence: 65` .* context of 64 tokens"):
        train(sequence=65)


def test_a_stage_whose_samples_are_too_long_names_the_data(train):
    with pytest.raises(LlameroError, match=r"mixture, train: sample \d+ has \d+ tokens, `sequence` is 8"):
        train(sequence=8)


@pytest.mark.parametrize(
    "keys",
    [{"hidden": 18}, {"heads": 3}, {"kv_heads": 3}, {"hidden": 12, "heads": 4}, {"kv_heads": 8}],
    ids=lambda keys: str(keys),
)
def test_heads_that_do_not_divide_are_refused(tokenizer, keys):
    with pytest.raises(LlameroError, match="the width must be a multiple"):
        fresh_config(shape(**keys), tokenizer)


@pytest.mark.parametrize("keys", [{"layers": 0}, {"context": -1}, {"width": 3}], ids=lambda keys: str(keys))
def test_a_shape_that_is_none_is_refused(keys):
    with pytest.raises(ValidationError):
        shape(**keys)


def test_a_fresh_model_has_the_shape_asked_for(tokenizer):
    config = fresh_config(shape(tied=False, theta=5e5), tokenizer)
    assert (config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads) == (16, 4, 4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 64)
    assert not config.tie_word_embeddings
    assert config.rope.frequencies(1)[1].item() == pytest.approx(5e5**-0.5)
    assert fresh_config(shape(kv_heads=None), tokenizer).num_kv_heads == 4
    assert config.carried == {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_begin_at_the_mean_and_old_ones_stay(train, tokenizer, tied):
    _, out = train(start=shape(tied=tied))
    model, old = load_model(out), len(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grown = grow_vocabulary(model, old + 3)
    after = dict(grown.named_parameters())
    assert grown.config.vocab_size == old + 3
    assert after.keys() == before.keys()
    resized = {name for name in before if after[name].shape != before[name].shape}
    assert resized == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name
        for row in after[name][len(value) :]:
            torch.testing.assert_close(row, value.mean(0))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) is tied
    ids = torch.arange(9)[None]
    torch.testing.assert_close(grown(ids)[..., :old], model(ids))


def test_a_vocabulary_never_shrinks(train, tokenizer):
    model = load_model(train()[1])
    assert grow_vocabulary(model, len(tokenizer)) is model
    assert grow_vocabulary(model, 3) is model


def test_the_device_is_the_one_asked_for():
    if torch.cuda.is_available():
        assert device(ParallelConfig(device="cuda:0")) == torch.device("cuda", 0)
    else:
        with pytest.raises(LlameroError, match="no CUDA device"):
            device(ParallelConfig(device="cuda:1"))
    assert device(ParallelConfig(device="cpu")).type == "cpu"
    assert device(ParallelConfig()).type == ("cuda" if torch.cuda.is_available() else "cpu")
