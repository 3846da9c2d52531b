from typing import Any

import pytest
from pydantic import ValidationError

from llamero.core.errors import LlameroError
from llamero.core.world import refuse_other_size
from llamero.model.config import LlamaConfig
from llamero.model.rope import Default
from llamero.parallel.config import ParallelConfig
from llamero.parallel.layout import layers_of, refuse_impossible


def model(**keys):
    about: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_layers": 6,
        "num_heads": 12,
    }
    about |= {"num_kv_heads": 6, "head_dim": 4, "rope": Default(10000.0, 4), "max_position_embeddings": 64}
    return LlamaConfig(**(about | keys))


def parallel(**keys):
    return ParallelConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"gpus": 6, "tensor": 4}, "does not divide `gpus: 6`; a multiple of 4 would do"),
        ({"gpus": 8, "tensor": 2, "shard": 2}, "is not `gpus: 8`; `shard: 4` would do"),
        ({"gpus": 2, "pipeline": 2, "zero": 2}, "a pipeline after the last: say 1 or 3"),
        ({"ring": 2}, "`ring` above 1 comes with long context"),
        ({"ulysses": 2}, "`ulysses` above 1 comes with long context"),
        ({"gpus": 2, "tensor": 2, "offload": True}, "`offload` works on what `shard` or `replicate` spreads"),
    ],
)
def test_axes_that_do_not_fill_the_devices_are_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        parallel(**keys)


def test_a_pipeline_keeps_what_it_fetched_unless_asked():
    asked = {"gpus": 4, "pipeline": 2}
    assert [parallel(gpus=2).zero_stage, parallel(**asked).zero_stage, parallel(**asked, zero=3).zero_stage] == [
        3,
        1,
        3,
    ]


def test_the_shard_axis_takes_what_the_others_leave():
    config = parallel(gpus=32, tensor=4, pipeline=2)
    assert (config.sharded, config.data) == (4, 4)
    assert parallel(gpus=32, replicate=2, tensor=4).data == 8


@pytest.mark.parametrize(
    ("keys", "changes", "says"),
    [
        (
            {"gpus": 4, "tensor": 4},
            {},
            r"`tensor: 4` does not divide the 6 key/value heads\n  fix: `tensor:` one of 1, 2",
        ),
        ({"gpus": 5, "tensor": 5}, {}, "the 12 attention heads"),
        ({"gpus": 14, "tensor": 2}, {}, "`shard: 7` does not divide the width of 48"),
        ({"gpus": 8, "pipeline": 8}, {}, r"8 pieces of 6 layers(?s:.*)one of 1, 2, 3, 4, 5, 6"),
        ({"gpus": 4, "pipeline": 4, "schedule": "interleaved"}, {}, r"8 pieces of 6 layers(?s:.*)one of 1, 2, 3$"),
        ({"gpus": 2, "pipeline": 2, "micro_batch": 8}, {}, "is 1 micro-batches of 8 .* 2 pieces to keep busy"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused_with_those_it_can(keys, changes, says):
    with pytest.raises(LlameroError) as told:
        refuse_impossible(parallel(**keys), model(**changes), batch=8)
    assert told.match(says)


def test_a_layout_that_fits_passes():
    refuse_impossible(parallel(gpus=24, tensor=3, pipeline=2), model(), batch=8)


@pytest.mark.parametrize(("pieces", "layers"), [(1, 4), (2, 4), (3, 7), (4, 7), (5, 5), (4, 80)])
def test_every_layer_is_in_one_piece_and_no_piece_is_much_larger(pieces, layers):
    cut = [layers_of(piece, pieces=pieces, layers=layers) for piece in range(pieces)]
    assert [number for piece in cut for number in piece] == list(range(layers))
    sizes = [len(piece) for piece in cut]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)  # it also has the head


@pytest.mark.parametrize(
    ("keys", "batch", "expected"),
    [
        ({}, 8, (1, 8)),
        ({"micro_batch": 3}, 8, (3, 3)),
        ({"gpus": 4}, 8, (1, 2)),
        ({"gpus": 4}, 9, (1, 3)),
        ({"gpus": 2, "pipeline": 2}, 8, (8, 1)),
        ({"gpus": 2, "pipeline": 2, "schedule": "interleaved"}, 5, (6, 1)),
    ],
)
def test_a_share_of_a_batch_is_cut_into_micro_batches(keys, batch, expected):
    assert parallel(**keys).share(batch) == expected


def test_a_recipe_for_several_devices_says_how_to_start_them(monkeypatch):
    with pytest.raises(LlameroError, match=r"torchrun --standalone --nproc-per-node 8 -m llamero.cli run RECIPE"):
        refuse_other_size(8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LlameroError, match=r"4 processes were started(?s:.*)--set parallel.gpus=4"):
        refuse_other_size(8)
    refuse_other_size(4)


def test_a_batch_that_leaves_devices_without_a_row_is_refused():
    with pytest.raises(LlameroError, match=r"a batch of 3 rows leaves 1 of the 4 devices(?s:.*)at least 4 rows"):
        refuse_impossible(ParallelConfig(gpus=8, replicate=2, shard=2, tensor=2), model(num_heads=12), batch=3)
    refuse_impossible(ParallelConfig(gpus=8, replicate=2, shard=2, tensor=2), model(num_heads=12), batch=4)
