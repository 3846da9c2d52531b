import pytest
import torch

from llamero.core import artifact
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.quantize import calibrate, kept
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run

SHAPE = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Default(10000.0, 16),
    max_position_embeddings=64,
)
VARIANTS = ("gptq-4bit-32g-actorder_True", "awq-4bit-32g", "rtn-3bit-32g")


def make(directory, seed=1):
    model = Llama(SHAPE)
    initialize(model, seed=seed, std=0.3)
    directory.mkdir(exist_ok=True)
    save_model(model, directory)
    return directory


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (length,), generator=generator) for length in (48, 60, 17)]


def quantize(model, tokens, out, root, *, names=VARIANTS, **calibration):
    calibration = Calibration(mixture="chat", keep=True, **calibration)
    config = QuantizeConfig(variants=names, calibration=calibration, measure=None)
    there = root.exists() and any(path.name.startswith("calibration") for path in root.iterdir())
    reports = run(config, model=model, out=lambda v: out / v.name, tokens=tokens, keep_in=root)
    assert there or not any(report.reused for report in reports)
    return {name: (out / name / "model.safetensors").read_bytes() for name in names}


@pytest.fixture
def passes(monkeypatch):
    """Layers that text was sent through."""
    seen = []
    observe = calibrate.Walk._observe
    monkeypatch.setattr(
        calibrate.Walk, "_observe", lambda self, number, *a, **k: seen.append(number) or observe(self, number, *a, **k)
    )
    return seen


def only(root):
    (path,) = [path for path in root.iterdir() if not path.name.startswith((".", "sensitivity-"))]
    return path


def test_later_variants_need_no_pass_and_get_the_same_bytes(model, tokens, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(kept, "ROWS", 48)
    root = tmp_path / "kept"
    whole = quantize(model, tokens, tmp_path / "a", tmp_path / "other")
    first = quantize(model, tokens, tmp_path / "b", root, names=VARIANTS[:1])
    assert passes == [0, 1, 0, 1]
    later = quantize(model, tokens, tmp_path / "c", root, names=VARIANTS[1:])
    assert passes == [0, 1, 0, 1]
    assert {**first, **later} == whole
    assert sum(path.stat().st_size for path in only(root).glob("*.safetensors")) < 1.4 * kept.bytes_of(SHAPE)


def test_what_flows_into_the_head_is_kept_too(model, tokens, tmp_path):
    who = kept.identity(model, tokens, dtype=torch.float32, root=tmp_path)
    walks = [calibrate.Walk(model, SHAPE, tokens) for _ in range(2)]
    for walk in walks:
        assert len(list(kept.layers(walk, model, SHAPE, who, root=tmp_path))) == 2
    first, again = (walk.heads[calibrate.UNQUANTIZED] for walk in walks)
    assert first.tokens == again.tokens == sum(map(len, tokens))
    for name in ("energy", "mean_abs", "absmax"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_another_model_text_or_arithmetic_is_another_pass(model, tokens, tmp_path, passes):
    root = tmp_path / "kept"
    names = VARIANTS[2:]
    quantize(model, tokens, tmp_path / "a", root, names=names, compute="float32")
    quantize(model, tokens, tmp_path / "b", root, names=names, compute="bfloat16")
    quantize(model, [*tokens[:2], tokens[2].flip(0)], tmp_path / "c", root, names=names, compute="float32")
    quantize(make(tmp_path / "model", seed=2), tokens, tmp_path / "d", root, names=names, compute="float32")
    assert passes == [0, 1] * 4


def test_damage_is_told_with_the_way_out(model, tokens, tmp_path):
    root = tmp_path / "kept"
    quantize(model, tokens, tmp_path / "a", root)
    path = only(root) / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(LlameroError, match="are damaged") as caught:
        quantize(model, tokens, tmp_path / "b", root)
    assert caught.value.where == str(path)
    assert str(path.parent) in str(caught.value.fix)


def test_a_pass_that_was_cut_off_is_not_taken_for_whole(model, tokens, tmp_path, passes, monkeypatch):
    root = tmp_path / "kept"
    write = kept._write

    def cut(directory, layer):
        if layer.number == 1:
            raise KeyboardInterrupt
        return write(directory, layer)

    monkeypatch.setattr(kept, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tokens, tmp_path / "a", root)
    assert only(root).name.endswith(".partial")
    monkeypatch.setattr(kept, "_write", write)
    quantize(model, tokens, tmp_path / "b", root)
    assert passes == [0, 1, 0, 1]
    assert artifact.read(only(root)).kind == "calibration"


def test_statistics_of_quantized_streams_are_not_kept():
    with pytest.raises(ValueError, match="needs `propagation: shared`"):
        Calibration(keep=True, propagation="exact")


def test_variants_are_the_same_bytes_whatever_the_number_of_threads(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "GROUP_TOKENS", 50)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(quantize(model, tokens, tmp_path / f"{threads}", tmp_path / f"kept{threads}"))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
