import json

import pytest
import torch
from pydantic import ValidationError

from llamero.checkpoint.hf import open_tensors
from llamero.core.errors import LlameroError
from llamero.engine.metrics import read_lines
from llamero.engine.stage import StageConfig
from llamero.model.load import load_model, save_model
from llamero.model.weights import NewRows, Stored
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import device
from llamero.text.tokenizer import load_tokenizer, train_bpe
from llamero.train.config import ShapeConfig
from llamero.train.run import fresh_config, grow_vocabulary, run

SHAPE = {"hidden": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 24, "context": 64}


def shape(**keys):
    return ShapeConfig.model_validate(SHAPE | keys)


@pytest.fixture
def train(tmp_path, data, tokenizer_files):
    """Train a stage and return what is said of it and where the model is."""

    def make(name="first", start=None, tokenizer=None, new_rows: NewRows = "mean", **keys):
        stage = {"name": name, "mixture": "chat", "sequence": 64, "batch": 4, "lr": 1e-2}
        stage |= {} if "epochs" in keys else {"steps": 3}
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        said = run(
            StageConfig.model_validate(stage | keys),
            start=start or shape(),
            data=data,
            tokenizer=tokenizer or tokenizer_files,
            parallel=ParallelConfig(device="cpu"),
            seed=5,
            out=out,
            new_rows=new_rows,
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


def start_of(rows, known, new_rows):
    """Return where a new row starts, by hand."""
    if new_rows == "copy_last":
        return rows[known - 1].tolist()
    return [sum(column) / known for column in zip(*rows[:known].double().tolist(), strict=True)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("new_rows", ["mean", "copy_last"])
@pytest.mark.parametrize(("padding", "size"), [(0, 3), (5, 3), (2, 3)], ids=["unpadded", "within", "beyond"])
def test_new_tokens_start_as_asked_and_every_other_row_stays(train, tokenizer, tied, new_rows, padding, size):
    """The last rows of a padded base are of no token: they count for no mean, and new tokens take them over."""
    _, out = train(start=shape(tied=tied))
    model = load_model(out)
    rows, size = len(tokenizer), len(tokenizer) - padding + size
    known = rows - padding
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(9)[None]
    said_before = model(ids)
    assert grow_vocabulary(model, size, known=known, new_rows=new_rows) == size - known
    after = dict(model.named_parameters())
    resized = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert after.keys() == before.keys()
    assert model.config.vocab_size == max(rows, size)
    for name, value in before.items():
        if name not in resized:
            assert torch.equal(after[name], value), name
            continue
        assert len(after[name]) == max(rows, size)
        assert torch.equal(after[name][:known], value[:known]), name
        assert torch.equal(after[name][size:], value[size:]), name
        for row in after[name][known:size]:
            assert row.tolist() == pytest.approx(start_of(value, known, new_rows), abs=1e-7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(model(ids)[..., :known], said_before[..., :known])


def test_a_base_whose_tokenizer_has_tokens_without_a_row_is_given_them(train, tokenizer):
    model = load_model(train()[1])
    last = model.model.embed_tokens.weight[-1].tolist()
    rows = len(tokenizer)
    assert grow_vocabulary(model, rows + 2, known=rows + 1, new_rows="copy_last") == 2
    assert model.model.embed_tokens.weight[rows:].tolist() == [last, last]


def test_a_vocabulary_never_shrinks(train, tokenizer):
    model = load_model(train()[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for size in (len(tokenizer), 3):
        assert grow_vocabulary(model, size, known=len(tokenizer)) == 0
    assert model.config.vocab_size == len(tokenizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_data_with_tokens_that_the_model_does_not_know_is_refused(train, tmp_path, tokenizer):
    train_bpe(iter(["abc"]), vocab_size=259).save(tmp_path / "smaller")
    size = len(load_tokenizer(tmp_path / "smaller"))
    with pytest.raises(LlameroError, match=rf"token \d+ stands in the data, and the model knows {size}: they are not"):
        train(tokenizer=tmp_path / "smaller")
    assert not (tmp_path / "first" / "metrics.jsonl").exists()


def test_data_shorter_than_one_batch_is_refused(train, tmp_path):
    with pytest.raises(LlameroError, match=r"mixture, train: a step takes 4000 packed rows, and there are \d+"):
        train(batch=4000)
    assert not (tmp_path / "first" / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_damaged_moments_are_named(train, what):
    _, first = train(export_optimizer=True)
    file = first / "optimizer" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    if what == "missing":
        file.unlink()
    with pytest.raises(LlameroError, match=r"model.safetensors: the moments are not what was written, or missing"):
        train(name="second", start=first, optimizer="keep")


@pytest.fixture
def more_tokens(tmp_path, tokenizer):
    """Directory of the tokenizer with three more tokens."""
    tokenizer.with_tokens(["<a>", "<b>", "<c>"]).save(tmp_path / "more", chat_template="")
    return tmp_path / "more"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_with_new_tokens_is_exported_with_the_true_size(train, tokenizer, more_tokens, tied):
    _, base = train(start=shape(tied=tied), steps=1)
    said, out = train(name="second", start=base, tokenizer=more_tokens, steps=1)
    size = len(tokenizer) + 3
    assert json.loads((out / "config.json").read_text())["vocab_size"] == size
    tensors = open_tensors(out)
    assert len(tensors["model.embed_tokens.weight"]) == size
    assert "lm_head.weight" not in tensors if tied else len(tensors["lm_head.weight"]) == size
    assert said["vocabulary"] == {"tokens": size, "rows": size, "new": 3, "new_rows": "mean"}


@pytest.mark.parametrize("new_rows", ["mean", "copy_last"])
def test_rows_are_new_once_and_a_later_stage_goes_on_with_them(train, tokenizer, more_tokens, new_rows):
    _, base = train(start=shape(tied=False), steps=1)
    _, first = train(name="first-more", start=base, tokenizer=more_tokens, new_rows=new_rows, steps=3)
    said, second = train(name="second", start=first, tokenizer=more_tokens, new_rows=new_rows, steps=1, lr=1e-9)
    assert said["vocabulary"]["new"] == 0
    head, later = (load_model(out).lm_head.weight.detach() for out in (first, second))
    torch.testing.assert_close(later, head, rtol=0, atol=1e-7)
    old = load_model(base).lm_head.weight.detach()
    assert not torch.allclose(head[-1], torch.tensor(start_of(old, len(old), new_rows)), rtol=0, atol=1e-4)


def test_a_model_of_another_tokenizer_is_refused(train):
    _, base = train(steps=1)
    said = json.loads((base / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    one, other = (next(token for token, number in vocabulary.items() if number == n) for n in (70, 71))
    vocabulary[one], vocabulary[other] = 71, 70
    (base / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(LlameroError, match=r"token 70 is `.*` to the model and `.*` to the release"):
        train(name="second", start=base, steps=1)


def test_values_that_are_not_finite_are_found_before_the_first_step(train):
    _, base = train(steps=1)
    model = load_model(base)
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[3, 2] = float("nan")
        weight[4, :2] = float("inf")
    save_model(model, base)
    found = r"model.safetensors: tensor `model.layers.1.mlp.up_proj.weight` has 1 NaN and 2 infinite"
    with pytest.raises(LlameroError, match=found):
        train(name="second", start=base, steps=1)
    assert not (base.parent / "second" / "metrics.jsonl").exists()


def test_weights_that_a_checkpoint_overrides_are_not_read(train, monkeypatch):
    _, base = train(steps=1)
    read, part = [], Stored.part
    monkeypatch.setattr(Stored, "part", lambda self, name, region: read.append(name) or part(self, name, region))
    monkeypatch.setattr("llamero.train.run.resume.remove", lambda directory: None)
    _, out = train(name="second", start=base, steps=1)
    assert sorted(read) == sorted(open_tensors(base))
    before = {name: open_tensors(out)[name].clone() for name in open_tensors(out)}
    (out / "training.json").unlink()  # as if it had been cut off before
    train(name="second", start=base, steps=1)
    assert len(read) == len(before)
    assert all(torch.equal(open_tensors(out)[name], value) for name, value in before.items())


def test_a_padded_base_keeps_its_rows_and_says_so(train, tokenizer, more_tokens, tmp_path):
    """A base of 8 more rows than tokens: new tokens take three of them, the other five are exported as they were."""
    _, base = train(start=shape(tied=False), steps=1)
    padded = load_model(base)
    size = len(tokenizer)
    grow_vocabulary(padded, size + 8, known=size)
    with torch.no_grad():
        padded.model.embed_tokens.weight[size:] = 7.0
        padded.lm_head.weight[size:] = -7.0
    save_model(padded, base)
    said, out = train(name="second", start=base, tokenizer=more_tokens, steps=1, lr=1e-9)
    assert said["vocabulary"] == {"tokens": size + 3, "rows": size + 8, "new": 3, "new_rows": "mean"}
    model = load_model(out)
    assert model.config.vocab_size == size + 8
    embedding = model.model.embed_tokens.weight
    mean = padded.model.embed_tokens.weight[:size].mean(0)
    torch.testing.assert_close(embedding[size : size + 3], mean.expand(3, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding[size + 3 :], torch.full_like(embedding[size + 3 :], 7.0))


def test_the_device_is_the_one_asked_for():
    if torch.cuda.is_available():
        assert device(ParallelConfig(device="cuda:0")) == torch.device("cuda", 0)
    else:
        with pytest.raises(LlameroError, match="no CUDA device"):
            device(ParallelConfig(device="cuda:1"))
    assert device(ParallelConfig(device="cpu")).type == "cpu"
    assert device(ParallelConfig()).type == ("cuda" if torch.cuda.is_available() else "cpu")
