"""PyTorch files are written as torch writes them, and nothing in one is ever run."""

import argparse
import enum
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llamero.checkpoint.hf import Spec
from llamero.checkpoint.pickles import Choice, PickleFile, PickleWriter
from llamero.core.errors import LlameroError

TENSORS = {
    "a": torch.arange(15.0).reshape(3, 5),
    "b": torch.tensor([1.5, -0.0, torch.nan], dtype=torch.bfloat16),
    "c": torch.zeros(2, 0, dtype=torch.float16),
    "d": torch.tensor(7.0, dtype=torch.float64),
}


def written(path):
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    content = {"model": {"deep": specs}, "args": argparse.Namespace(dtype=torch.bfloat16, n=3), "version": 3.0}
    with PickleWriter(path, content) as writer:
        for name, tensor in TENSORS.items():
            writer.add(("model", "deep", name), tensor)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name].nan_to_num(5), other[name].nan_to_num(5))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written_tensor_by_tensor(tmp_path, mmap):
    written(tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=False, mmap=mmap)
    same(loaded["model"]["deep"], TENSORS)
    assert vars(loaded["args"]) == {"dtype": torch.bfloat16, "n": 3}
    assert loaded["version"] == 3.0
    if mmap:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded["model"]["deep"].values())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None  # all checksums are right


def test_tensors_of_equal_shape_do_not_share_their_numbers(tmp_path):
    spec = Spec((2,), torch.float32)
    with PickleWriter(tmp_path / "a.pt", {"a": spec, "b": spec}) as writer:
        writer.add(("a",), torch.tensor([1.0, 2.0]))
        writer.add(("b",), torch.tensor([3.0, 4.0]))
    loaded = torch.load(tmp_path / "a.pt")
    assert loaded["a"].tolist() + loaded["b"].tolist() == [1, 2, 3, 4]


def test_views_and_shared_storages_are_read_as_they_are(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"whole": whole, "part": whole[1:, 1:3], "turned": whole.T}, tmp_path / "a.pt")
    file = PickleFile(tmp_path / "a.pt")
    for _ in range(2):  # pages that were let go of come back
        assert torch.equal(file.read(("part",)), whole[1:, 1:3])
        assert torch.equal(file.read(("turned",)), whole.T)
        assert torch.equal(file.read(("whole",)), whole)


def test_tensors_must_come_as_announced(tmp_path):
    spec = Spec((2,), torch.float32)
    with pytest.raises(ValueError, match="announced"), PickleWriter(tmp_path / "a.pt", {"a": spec}) as writer:
        writer.add(("a",), torch.ones(3))
    with pytest.raises(ValueError, match="never came"), PickleWriter(tmp_path / "a.pt", {"a": spec}):
        pass
    with pytest.raises(ValueError, match="was not announced"), PickleWriter(tmp_path / "a.pt", {}) as writer:
        writer.add(("a",), torch.ones(2))


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"a": Malicious(tmp_path / "it-was-run")}, tmp_path / "a.pt")
    with pytest.raises(LlameroError, match="wants to do more than hold tensors") as error:
        PickleFile(tmp_path / "a.pt")
    assert "builtins.getattr, pathlib.Path" in error.value.problem
    assert not (tmp_path / "it-was-run").exists()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(tmp_path, keep):
    written(tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(LlameroError, match="not a whole PyTorch file") as error:
        PickleFile(tmp_path / "a.pt")
    assert error.value.where == str(tmp_path / "a.pt")


def test_a_file_of_the_old_format_is_refused_with_a_way_out(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(LlameroError, match="before PyTorch") as error:
        PickleFile(tmp_path / "a.pt")
    assert "saved again" in str(error.value.fix)


def test_a_broken_pickle_in_a_whole_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1})[:-3])
        archive.writestr("archive/version", "3\n")
    with pytest.raises(LlameroError, match="PyTorch file"):
        PickleFile(tmp_path / "a.pt")


def test_what_megatron_saves_beside_weights_is_read_without_megatron(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.model.enums")

    class PositionEmbeddingType(enum.Enum):
        rotary = 1

    PositionEmbeddingType.__module__, PositionEmbeddingType.__qualname__ = module.__name__, "PositionEmbeddingType"
    module.PositionEmbeddingType = PositionEmbeddingType  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("megatron", "megatron.model", "megatron.model.enums"):
        monkeypatch.setitem(sys.modules, name, module)
    args = argparse.Namespace(position_embedding_type=PositionEmbeddingType.rotary, params_dtype=torch.bfloat16)
    random = {"np_rng_state": np.random.RandomState(0).get_state(), "random_rng_state": (3, (1, 2), None)}
    torch.save({"args": args, "rng_state": [random], "model": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    monkeypatch.undo()
    content = PickleFile(tmp_path / "a.pt").content
    assert isinstance(content["args"].position_embedding_type, Choice)
    assert content["args"].position_embedding_type.value == 1
    assert np.array_equal(content["rng_state"][0]["np_rng_state"][1], random["np_rng_state"][1])
