"""Megatron's ranks against cutting by hand; a rank that is missing or does not fit is named."""

import itertools

import pytest
import torch

from llamero.checkpoint.hf import Spec
from llamero.checkpoint.megatron import (
    SPLITS,
    Layout,
    group_heads,
    join,
    open_megatron,
    share,
    split_of,
    ungroup_heads,
    write_megatron,
)
from llamero.core.errors import LlameroError

LAYER = {
    "input_layernorm.weight": (8,),
    "self_attention.query_key_value.weight": (32, 8),
    "self_attention.query_key_value.bias": (32,),
    "self_attention.dense.weight": (8, 16),
    "self_attention.dense.bias": (8,),
    "post_attention_layernorm.weight": (8,),
    "mlp.dense_h_to_4h.weight": (24, 8),
    "mlp.dense_h_to_4h.bias": (24,),
    "mlp.dense_4h_to_h.weight": (8, 12),
    "mlp.dense_4h_to_h.bias": (8,),
}
ARGS = {"hidden_size": 8}


def whole(layers=4, rows=10):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding.word_embeddings.weight": (rows, 8),
        **{f"encoder.layers.{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()},
        "encoder.final_layernorm.weight": (8,),
        "lm_head": (rows, 8),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(directory, tensors, tensor=2, pipeline=2, *, rows=12):
    directory.mkdir(exist_ok=True)
    layout = Layout(tensor, pipeline)
    words = ("embedding.word_embeddings.weight", "lm_head")
    specs = {n: Spec((rows, 8) if n in words else tuple(t.shape), t.dtype) for n, t in tensors.items()}
    args = {**ARGS, "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    write_megatron(directory, args, specs, iter(tensors.items()), layout=layout)
    return directory


def read_all(directory):
    tensors = open_megatron(directory).tensors
    for name in tensors:
        tensors[name]


def refusal(directory):
    with pytest.raises(LlameroError) as error:
        read_all(directory)
    return error.value


def change(path, how):
    content = torch.load(path / "model_optim_rng.pt", weights_only=False)
    how(content)
    torch.save(content, path / "model_optim_rng.pt")


def by_hand(name, tensor, rank, ranks):
    """What Megatron's layers keep on a rank, row by row."""
    if name.endswith(("layernorm.weight", "dense.bias", "4h_to_h.bias")):
        return tensor
    if name.endswith(("dense.weight", "4h_to_h.weight")):
        step = tensor.shape[1] // ranks
        return torch.stack([row[rank * step : (rank + 1) * step] for row in tensor])
    if "h_to_4h" in name:
        half = len(tensor) // 2
        step = half // ranks
        kept = [*range(rank * step, (rank + 1) * step)]
        return tensor[[*kept, *(half + row for row in kept)]]
    step = -(-len(tensor) // (4 * ranks)) * 4
    return torch.stack([tensor[min(row, len(tensor) - 1)] for row in range(rank * step, (rank + 1) * step)])


@pytest.mark.parametrize(("tensor", "pipeline"), list(itertools.product((1, 2, 4), (1, 2, 4))))
def test_every_rank_holds_its_share_and_together_they_are_whole(tmp_path, tensor, pipeline):
    tensors = whole()
    rows = -(-10 // (4 * tensor)) * 4 * tensor
    write(tmp_path, tensors, tensor, pipeline, rows=rows)
    per_stage = 4 // pipeline
    for rank, stage in itertools.product(range(tensor), range(pipeline)):
        name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if pipeline > 1 else "")
        content = torch.load(tmp_path / "release" / name / "model_optim_rng.pt", weights_only=False)
        model = content["model"]["language_model"]
        assert ("embedding" in model) == (stage == 0)
        assert ("lm_head" in model) == (stage == pipeline - 1)
        for layer, part in itertools.product(range(per_stage), LAYER):
            expected = by_hand(part, tensors[f"encoder.layers.{stage * per_stage + layer}.{part}"], rank, tensor)
            assert torch.equal(model["encoder"][f"layers.{layer}.{part}"], expected)
        if stage == pipeline - 1:
            assert torch.equal(model["lm_head"], by_hand("lm_head", tensors["lm_head"], rank, tensor))
    opened = open_megatron(tmp_path)
    assert opened.layout == (tensor, pipeline)
    assert set(opened.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert torch.equal(opened.tensors[name][: len(expected)], expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SPLITS)
def test_joining_undoes_sharing(name, ranks):
    split = split_of(name)
    tensor = torch.randn(30, 60)
    size = 0 if split.axis is None else tensor.shape[split.axis]
    pieces = [share(tensor, split, rank=rank, ranks=ranks, size=size) for rank in range(ranks)]
    assert torch.equal(pieces[0] if split.axis is None else join(pieces, split), tensor)


@pytest.mark.parametrize("rows", range(1, 13))
def test_rows_that_are_lacking_are_copies_of_the_last(rows):
    tensor = torch.randn(rows, 3)
    pieces = [share(tensor, split_of("lm_head"), rank=rank, ranks=3, size=12) for rank in range(3)]
    assert torch.equal(torch.cat(pieces), torch.cat([tensor, tensor[-1:].expand(12 - rows, -1)]))


@pytest.mark.parametrize(("kv", "per_group"), [(1, 1), (1, 4), (2, 3), (4, 1)])
def test_heads_are_grouped_as_a_loop_groups_them(kv, per_group):
    d = 2
    q, k, v = torch.randn(kv * per_group * d, 5), torch.randn(kv * d, 5), torch.randn(kv * d, 5)
    rows = []
    for group in range(kv):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(q[head * d : (head + 1) * d])
        rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    qkv = group_heads(q, k, v, kv_heads=kv)
    assert torch.equal(qkv, torch.cat(rows))
    back = ungroup_heads(qkv, kv_heads=kv, head_dim=d)
    assert all(torch.equal(one, other) for one, other in zip(back, (q, k, v), strict=True))


def test_a_missing_rank_is_named(tmp_path):
    write(tmp_path, whole())
    (tmp_path / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
    (tmp_path / "release/mp_rank_01_000").rmdir()
    assert refusal(tmp_path).problem == "ranks are missing: mp_rank_01_000"


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, whole())
    path = tmp_path / "release/mp_rank_01_000/model_optim_rng.pt"
    path.unlink()
    error = refusal(tmp_path)
    assert (error.problem, error.where) == ("file is missing", str(path))


def test_a_whole_missing_row_of_ranks_is_noticed(tmp_path):
    write(tmp_path, whole())
    for stage in range(2):
        path = tmp_path / f"release/mp_rank_01_{stage:03}"
        (path / "model_optim_rng.pt").unlink()
        path.rmdir()
    assert refusal(tmp_path).problem == "`tensor_model_parallel_size` is 2, but there are files for 1"


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (
            lambda m: m["encoder"].update({"layers.0.mlp.dense_4h_to_h.weight": torch.ones(8, 5)}),
            "is (8, 5) float32 here",
        ),
        (lambda m: m["encoder"].pop("layers.0.mlp.dense_4h_to_h.weight"), "is not there here"),
        (lambda m: m["encoder"].update({"layers.0.input_layernorm.weight": torch.ones(8)}), "differs from that in"),
        (lambda m: m["encoder"].update({"layers.0.router.weight": torch.ones(8)}), "is not a Llama's"),
        (lambda m: m["encoder"].update({"layers.0._extra_state": None}), "_extra_state` is not a Llama's"),
    ],
)
def test_ranks_that_do_not_fit_each_other_are_refused(tmp_path, how, problem):
    write(tmp_path, whole())
    path = tmp_path / "release/mp_rank_01_000"
    change(path, lambda content: how(content["model"]["language_model"]))
    error = refusal(tmp_path)
    assert problem in error.problem
    assert error.where == str(path / "model_optim_rng.pt")


@pytest.mark.parametrize(
    ("said", "problem"), [("soon", "neither `release` nor a number"), ("7", "names `iter_0000007`")]
)
def test_a_tracker_that_names_nothing_is_refused(tmp_path, said, problem):
    write(tmp_path, whole())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(said)
    assert problem in refusal(tmp_path).problem


def test_an_iteration_may_be_given_without_its_tracker(tmp_path):
    tensors = whole()
    write(tmp_path, tensors, rows=12)
    opened = open_megatron(tmp_path / "release")
    assert torch.equal(opened.tensors["lm_head"][:10], tensors["lm_head"])
