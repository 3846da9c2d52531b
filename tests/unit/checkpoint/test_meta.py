"""Meta's shards against cutting by hand; a shard that is missing or does not fit is named."""

import json

import pytest
import torch

from llamero.checkpoint.hf import Spec
from llamero.checkpoint.meta import halves_from_pairs, open_meta, pairs_from_halves, write_meta
from llamero.core.errors import LlameroError

SHAPES = {
    "tok_embeddings.weight": (12, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wo.weight": (8, 8),
    "layers.0.feed_forward.w1.weight": (4, 8),
    "layers.0.feed_forward.w2.weight": (8, 4),
    "norm.weight": (8,),
    "output.weight": (12, 8),
}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(directory, tensors, *, shards=2, axis=1):
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps({"dim": 8}))
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_meta(directory, specs, iter(tensors.items()), shards=shards, embedding_axis=axis)
    return directory


def read_all(directory):
    tensors = open_meta(directory).tensors
    for name in tensors:
        tensors[name]


def refusal(directory):
    with pytest.raises(LlameroError) as error:
        read_all(directory)
    return error.value


def change(path, how):
    content = torch.load(path)
    how(content)
    torch.save(content, path)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_shard_holds_its_share_and_together_they_are_whole(tmp_path, tensors, shards, axis):
    write(tmp_path, tensors, shards=shards, axis=axis)
    by_columns = {"layers.0.attention.wo.weight", "layers.0.feed_forward.w2.weight"}
    by_columns |= {"tok_embeddings.weight"} if axis else set()
    for number in range(shards):
        shard = torch.load(tmp_path / f"consolidated.{number:02}.pth")
        assert list(shard) == list(tensors)
        for name, tensor in tensors.items():
            dim = int(name in by_columns)
            step = tensor.shape[dim] // shards
            expected = tensor if name == "norm.weight" else tensor.narrow(dim, number * step, step)
            assert torch.equal(shard[name], expected)
    opened = open_meta(tmp_path)
    assert opened.shards == shards
    assert all(torch.equal(opened.tensors[name], tensor) for name, tensor in tensors.items())
    assert {name: spec.shape for name, spec in opened.tensors.specs.items()} == SHAPES


@pytest.mark.parametrize("head_dim", [2, 4, 6])
def test_rows_of_heads_are_ordered_as_a_loop_orders_them(head_dim):
    rows = torch.arange(3.0 * head_dim)
    expected = [rows[head * head_dim + half * head_dim // 2 + pair].item()
                for head in range(3) for pair in range(head_dim // 2) for half in range(2)]  # fmt: skip
    assert pairs_from_halves(rows, head_dim).tolist() == expected
    assert torch.equal(halves_from_pairs(pairs_from_halves(rows, head_dim), head_dim), rows)


def test_a_missing_shard_is_named(tmp_path, tensors):
    write(tmp_path, tensors, shards=4)
    (tmp_path / "consolidated.01.pth").unlink()
    assert refusal(tmp_path).problem == "shards are missing: consolidated.01.pth"


def test_a_missing_last_shard_is_noticed(tmp_path, tensors):
    write(tmp_path, tensors, shards=4)
    (tmp_path / "consolidated.03.pth").unlink()
    assert refusal(tmp_path).problem == "3 shards have 6 columns of wo together, `dim` is 8"


def test_no_params_json_is_refused(tmp_path, tensors):
    write(tmp_path, tensors)
    (tmp_path / "params.json").unlink()
    assert refusal(tmp_path).where == str(tmp_path / "params.json")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda c: c.update({"output.weight": torch.ones(5, 8)}), "`output.weight` is (5, 8) float32 here"),
        (lambda c: c.update({"output.weight": c["output.weight"].half()}), "`output.weight` is (6, 8) float16 here"),
        (lambda c: c.pop("output.weight"), "`output.weight` is not there here"),
        (lambda c: c.update({"extra": torch.ones(1)}), "in consolidated.00.pth not there"),
        (lambda c: c.update({"norm.weight": torch.ones(8)}), "`norm.weight` differs from that in consolidated.00.pth"),
        (lambda c: c.update({"step": 7}), "holds more than named tensors: step"),
    ],
)
def test_shards_that_do_not_fit_each_other_are_refused(tmp_path, tensors, how, problem):
    write(tmp_path, tensors)
    change(tmp_path / "consolidated.01.pth", how)
    error = refusal(tmp_path)
    assert problem in error.problem
    assert error.where == str(tmp_path / "consolidated.01.pth")


def test_a_tensor_that_is_not_a_llamas_is_named(tmp_path, tensors):
    write(tmp_path, tensors, shards=1)
    change(tmp_path / "consolidated.00.pth", lambda content: content.update({"layers.0.gate.weight": torch.ones(1)}))
    assert refusal(tmp_path).problem == "tensor `layers.0.gate.weight` is not a Llama's"


def test_computed_frequencies_are_passed_over_and_told(tmp_path, tensors):
    write(tmp_path, tensors, shards=1)
    change(tmp_path / "consolidated.00.pth", lambda content: content.update({"rope.freqs": torch.ones(1)}))
    opened = open_meta(tmp_path)
    assert opened.passed_over == ("rope.freqs",)
    assert "rope.freqs" not in opened.tensors
