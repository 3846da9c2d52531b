"""Model directories as others write and break them: each break is refused, with the file and the tensor."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamero.checkpoint import hf
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

CONFIG = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope=Default(10000.0, 8),
    max_position_embeddings=32,
)
IDS = torch.arange(12)[None]


@pytest.fixture
def model() -> Llama:
    model = Llama(CONFIG).eval()
    initialize(model, seed=0, std=0.3)
    return model


@pytest.fixture
def directory(model, tmp_path) -> Path:
    save_model(model, tmp_path)
    return tmp_path


def rewrite(directory, change):
    """Change the tensors of a directory's one file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def as_bins(directory, shards=1):
    """Turn the safetensors of a directory into pickles."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for i, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[i::shards]}, directory / file)
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    if shards > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [directory / file for file in files]


def as_shards(model, directory):
    """Write a model as several safetensors files."""
    for path in directory.glob("*.safetensors"):
        path.unlink()
    named = dict(model.named_parameters())
    specs = {name: hf.Spec(tuple(p.shape), p.dtype) for name, p in named.items()}
    return hf.write_tensors(directory, specs, ((n, p.detach()) for n, p in named.items()), shard_bytes=3000)


@torch.no_grad()
def assert_same(model, directory):
    torch.testing.assert_close(load_model(directory)(IDS), model(IDS), rtol=0, atol=0)


def refusal(directory) -> LlameroError:
    with pytest.raises(LlameroError) as caught:
        load_model(directory)
    return caught.value


def test_safetensors_reads_what_we_write(model, directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, parameter in model.named_parameters():
            assert torch.equal(file.get_tensor(name), parameter)


def test_shards_with_an_index(model, directory):
    shards = as_shards(model, directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name, file in index["weight_map"].items():
        assert name in load_file(directory / file)
    assert_same(model, directory)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_read(model, directory, shards):
    as_bins(directory, shards)
    assert_same(model, directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bins", [False, True])
def test_half_precision_stays_half_unless_asked(model, tmp_path, dtype, bins):
    save_model(model, tmp_path, dtype=dtype)
    if bins:
        as_bins(tmp_path)
    assert load_model(tmp_path).get_parameter("model.layers.0.mlp.up_proj.weight").dtype == dtype
    wide = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.to(dtype).float())


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["archive", "bare pickle"])
def test_code_in_a_pickle_is_not_run(directory, how):
    trace = directory / "it-was-run"
    (path,) = as_bins(directory)
    content = {"model.norm.weight": Malicious(trace)}
    if how == "archive":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    error = refusal(directory)
    assert not trace.exists()
    assert error.where == str(path)
    assert how != "archive" or "was not read" in error.problem


def test_a_pickle_of_other_things_is_refused(directory):
    (path,) = as_bins(directory)
    torch.save({"model.norm.weight": torch.ones(16), "step": 7}, path)
    assert "more than named tensors" in refusal(directory).problem


@pytest.mark.parametrize("bins", [False, True])
def test_a_missing_shard_is_named(model, directory, bins):
    path = (as_bins(directory, 3) if bins else as_shards(model, directory))[1]
    path.unlink()
    error = refusal(directory)
    assert path.name in error.problem
    assert error.where is not None
    assert error.where.endswith(".index.json")


@pytest.mark.parametrize("bins", [False, True])
def test_a_tensor_that_is_not_in_its_shard_is_named(model, directory, bins):
    if bins:
        as_bins(directory, 3)
    else:
        as_shards(model, directory)
    (index,) = directory.glob("*.index.json")
    stated = json.loads(index.read_text())
    files = sorted(set(stated["weight_map"].values()))
    old = stated["weight_map"]["model.norm.weight"]
    stated["weight_map"]["model.norm.weight"] = next(file for file in files if file != old)
    index.write_text(json.dumps(stated))
    assert "tensor `model.norm.weight` is not in the file that the index names" in refusal(directory).problem


@pytest.mark.parametrize("keep", [0.5, 0.999, 4, 100])
def test_a_truncated_safetensors_file_is_refused(directory, keep):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    error = refusal(directory)
    assert error.where == str(path)
    assert error.fix == "download it again"


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_pickle_is_refused(directory, keep):
    (path,) = as_bins(directory)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert refusal(directory).where == str(path)


def test_an_unexpected_tensor_is_refused(directory):
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(1)}))
    error = refusal(directory)
    assert "tensor `model.layers.0.extra` has no place" in error.problem
    assert error.where == str(directory / "model.safetensors")


def test_the_frequencies_of_old_files_are_passed_over(model, directory):
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda tensors: tensors.update({key: torch.ones(4)}))
    assert_same(model, directory)


def test_a_missing_tensor_is_refused(directory):
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor `model.layers.1.mlp.up_proj.weight` is missing" in refusal(directory).problem


def test_a_wrong_shape_is_refused_with_both(directory):
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}))
    problem = refusal(directory).problem
    assert "tensor `model.norm.weight` is (17,)" in problem
    assert "the config says (16,)" in problem


def test_a_directory_without_a_model_is_refused(tmp_path):
    assert "it has no config.json" in refusal(tmp_path).problem


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert "no weights" in refusal(directory).problem


def test_a_config_that_is_no_json_is_refused_with_its_line(directory):
    (directory / "config.json").write_text('{\n  "hidden_size": 16,\n}')
    error = refusal(directory)
    assert error.where == f"{directory / 'config.json'}:3"


def test_tensors_must_come_as_announced(tmp_path):
    specs = {"a": hf.Spec((2,), torch.float32)}
    with pytest.raises(ValueError, match="announced a"):
        hf.write_tensors(tmp_path, specs, [("a", torch.ones(3))])
    with pytest.raises(ValueError, match="b was not announced"):
        hf.write_tensors(tmp_path, specs, [("a", torch.ones(2)), ("b", torch.ones(2))])
