import json

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

import llamero
from llamero.core.errors import LlameroError
from llamero.engine import loop
from llamero.engine.metrics import read_lines
from llamero.engine.stage import StageConfig
from llamero.model.linear import PackedLinear, pack
from llamero.model.load import load_model, save_model
from llamero.parallel.config import ParallelConfig
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run as quantize
from llamero.train.config import ShapeConfig
from llamero.train.run import run

SHAPE = ShapeConfig.model_validate({"hidden": 32, "layers": 2, "heads": 4, "mlp": 64, "context": 64, "tied": False})
STAGE = {"name": "tune", "mixture": "chat", "sequence": 64, "batch": 4, "steps": 6, "lr": 1e-2, "save_every": 2}
IDS = torch.arange(30)[None]


@pytest.fixture
def train(tmp_path, data, tokenizer_files):
    def make(out="tuned", start=SHAPE, tokenizer=tokenizer_files, micro_batch=0, **keys):
        (tmp_path / out).mkdir(exist_ok=True)
        said = run(
            StageConfig.model_validate(STAGE | keys),
            start=start,
            data=data,
            tokenizer=tokenizer,
            parallel=ParallelConfig(device="cpu", micro_batch=micro_batch),
            seed=5,
            out=tmp_path / out,
        )
        return said, tmp_path / out

    return make


@pytest.fixture
def base(train):
    return train("base", steps=2)[1]


@pytest.mark.parametrize("keys", [{}, {"base": "nf4"}, {"base": "rtn-4bit-32g"}], ids=str)
def test_a_stage_leaves_the_merged_model_and_the_adapter(train, base, keys):
    said, out = train(start=base, adapter={"lora": 4, **keys})
    merged = load_model(out)
    assert said["trained_parameters"] == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert said["parameters"] == sum(p.numel() for p in merged.parameters())
    with_codes = load_model(base, pack=keys.get("base"))
    assert not torch.allclose(merged(IDS), with_codes(IDS), atol=1e-3)
    adapted = load_model(out / "adapter", pack=keys.get("base"))
    torch.testing.assert_close(adapted(IDS), merged(IDS), rtol=1e-4, atol=1e-4)
    assert len(llamero.load_tokenizer(out / "adapter")) == len(llamero.load_tokenizer(out))
    with pytest.raises(ValueError, match="with an adapter"):
        save_model(adapted, out)


def test_an_adapter_directory_without_a_tokenizer_takes_that_of_its_base(train, base):
    _, out = train(start=base, adapter={"lora": 4})
    for path in (out / "adapter").glob("tokenizer*"):
        path.unlink()
    assert llamero.load_tokenizer(out / "adapter").digest == llamero.load_tokenizer(base).digest


def test_dropout_of_an_adapter_does_not_depend_on_micro_batches(train, base):
    losses = []
    for out, micro_batch, p in [("whole", 0, 0.5), ("parts", 1, 0.5), ("none", 0, 0)]:
        _, made = train(out, start=base, micro_batch=micro_batch, adapter={"lora": 4, "dropout": p})
        losses.append(torch.tensor([line["loss"] for line in read_lines(made / "metrics.jsonl")]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert not torch.allclose(losses[0], losses[2], rtol=1e-4)


def test_an_adapter_stage_that_is_cut_off_ends_in_the_same_bytes(train, base, monkeypatch):
    _, whole = train("whole", start=base, adapter={"lora": 4})
    step = loop._Run.step

    def cut(self, number, *more):
        if number == 5:
            raise MemoryError
        return step(self, number, *more)

    monkeypatch.setattr(loop._Run, "step", cut)
    with pytest.raises(MemoryError):
        train("cut", start=base, adapter={"lora": 4})
    monkeypatch.undo()
    out = whole.with_name("cut")
    kept = FileSystemReader(out / "checkpoints/step-00000004").read_metadata().state_dict_metadata
    weights = [name for name in kept if not name.startswith("optimizer.")]
    assert {name.rpartition(".lora_")[2] for name in weights} == {"A.weight", "B.weight"}
    train("cut", start=base, adapter={"lora": 4})
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_new_tokens_in_a_base_of_bfloat16(train, base, tokenizer_files, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for path in tokenizer_files.iterdir():
        (more / path.name).write_bytes(path.read_bytes())
    stated = json.loads((more / "tokenizer.json").read_text())
    new = {"id": len(llamero.load_tokenizer(more)), "content": "<new>", "special": True}
    new |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    stated["added_tokens"].append(new)
    (more / "tokenizer.json").write_text(json.dumps(stated))
    said, out = train(start=base, tokenizer=more, precision="bfloat16", adapter={"lora": 4})
    assert said["vocabulary"]["new"] == 1
    adapted = load_model(out / "adapter", dtype=torch.float32)
    assert adapted.config.vocab_size == said["vocabulary"]["rows"]
    torch.testing.assert_close(adapted(IDS), load_model(out)(IDS), rtol=0.05, atol=0.05)


def test_a_packed_directory_is_trained_through_an_adapter_only(train, base, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    text = [torch.arange(64) % 40]
    config = QuantizeConfig.model_validate({"variants": ["rtn-4bit-32g"], "calibration": {"text": "none.txt"}})
    quantize(config, model=base, out=lambda _: packed, tokens=text)
    with pytest.raises(LlameroError, match="a packed model cannot be trained itself"):
        train(start=packed)
    _, out = train(start=packed, adapter={"lora": 4})
    assert any(isinstance(module, PackedLinear) for module in load_model(out / "adapter").modules())
    torch.testing.assert_close(
        load_model(out / "adapter", dtype=torch.float32)(IDS), load_model(out)(IDS), rtol=1e-4, atol=1e-4
    )


def test_a_fresh_model_has_nothing_to_adapt(train):
    with pytest.raises(LlameroError, match="needs a trained model"):
        train(adapter={"lora": 4})


def test_a_base_is_packed_as_it_comes(base):
    packed, plain = load_model(base, pack="nf4"), load_model(base)
    pack(plain.model.layers, "nf4")
    assert {name: value.dtype for name, value in packed.state_dict().items()} == {
        name: value.dtype for name, value in plain.state_dict().items()
    }
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in packed.state_dict().items())
