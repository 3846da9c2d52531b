"""Bytes of a plan against counting them on paper, and against running every layer of the model."""

import pytest
import torch.distributed as dist

from llamero.engine.stage import StageConfig
from llamero.model.config import LlamaConfig
from llamero.model.rope import Default
from llamero.parallel.config import ParallelConfig
from llamero.parallel.imagined import first_of, imagined
from llamero.plan import memory as plan
from llamero.plan.memory import RUNTIME, Pieces, memory, parameters

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

LAYOUTS = {
    "alone": {"gpus": 1, "recompute": "selective"},
    "fsdp": {"gpus": 4},
    "fsdp-full": {"gpus": 4, "recompute": "full"},
    "zero-1": {"gpus": 4, "zero": 1, "micro_batch": 1},
    "hsdp-tensor": {"gpus": 8, "replicate": 2, "tensor": 2, "shard": 2},
    "pipeline": {"gpus": 4, "pipeline": 2, "tensor": 2},
    "zero-bubble": {"gpus": 4, "pipeline": 2, "schedule": "zero-bubble"},
    "zero-bubble-tensor": {"gpus": 8, "pipeline": 2, "schedule": "zero-bubble", "tensor": 2, "zero": 3},
}


def shape(layers=6, **keys):
    head_dim = 16
    return LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": layers,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": head_dim,
            "rope": Default(10000.0, head_dim),
            "max_position_embeddings": 128,
        }
        | keys
    )


def stage(**keys):
    return StageConfig.model_validate({"name": "s", "mixture": "m", "sequence": 64, "batch": 16, "steps": 3} | keys)


def numbers(config):
    width, inner = config.hidden_size, config.intermediate_size
    kv = config.num_kv_heads * config.head_dim
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    return 2 * config.vocab_size * width + config.num_layers * layer + width


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_few_layers_tell_what_all_of_them_need(name, monkeypatch):
    parallel = ParallelConfig.model_validate(LAYOUTS[name])
    noisy = stage(dropout={"hidden": 0.2, "lima": True}, neftune=5, z_loss=1e-4)
    few = memory(shape(), noisy, parallel)
    monkeypatch.setattr(plan, "FEW", (99, 99))
    monkeypatch.setattr(plan, "FEW_SHARDED", (99, 99))
    assert few == memory(shape(), noisy, parallel)


def test_what_rests_on_one_device_is_what_paper_says():
    config = shape(tie_word_embeddings=False)
    (found,) = memory(config, stage(), ParallelConfig())
    tensors = 6 * 9 + 3
    assert found.weights == found.gradients == 4 * numbers(config)
    assert found.optimizer == 8 * numbers(config) + 4 * tensors
    assert found.gathered == found.host == found.kv == 0
    assert found.total == sum(value for name, value in vars(found).items() if name != "host")
    assert found.runtime == RUNTIME
    assert memory(config, stage(), ParallelConfig(), device="cpu")[0].runtime == 0


def test_numbers_are_counted_with_those_of_an_adapter():
    adapter = {"lora": 8, "targets": ["q_proj", "down_proj"]}
    factors = 6 * 8 * ((64 + 64) + (96 + 64))
    pieces = Pieces()
    memory(shape(), stage(adapter=adapter), ParallelConfig(), pieces=pieces)
    before = len(pieces.known)
    found = parameters(shape(), stage(adapter=adapter), ParallelConfig(), pieces=pieces)
    assert found == (numbers(shape()) + factors, factors, numbers(shape()) + factors)
    assert len(pieces.known) == before
    packed = parameters(shape(), stage(adapter=adapter | {"base": "nf4"}), ParallelConfig())
    assert packed == found


@pytest.mark.slow
def test_numbers_on_one_device_are_its_share():
    found = parameters(shape(vocab_size=256), stage(), ParallelConfig(gpus=4))
    whole = numbers(shape(vocab_size=256))
    assert found == (whole, whole, whole // 4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_pieces_weigh_the_same_in_any_pipeline(zero):
    keys = {"zero": zero, "recompute": "selective", "shard": 2}
    several = ParallelConfig(gpus=4, pipeline=2, schedule="zero-bubble", **keys)
    pieces = Pieces()
    memory(shape(8), stage(batch=32), ParallelConfig(gpus=8, pipeline=4, **keys), pieces=pieces)
    before = dict(pieces.known)
    shared = memory(shape(8), stage(batch=32), several, pieces=pieces)
    assert pieces.known == before
    assert shared == memory(shape(8), stage(batch=32), several)


def test_a_tied_head_is_there_once():
    config = shape(tie_word_embeddings=True)
    (found,) = memory(config, stage(), ParallelConfig())
    assert found.weights == 4 * (numbers(config) - config.vocab_size * config.hidden_size)


def test_both_ends_of_a_pipeline_have_a_tied_table():
    parallel = ParallelConfig(gpus=3, pipeline=3)
    tied, apart = (memory(shape(6, tie_word_embeddings=on), stage(), parallel) for on in (True, False))
    assert [place.weights for place in tied] == [place.weights for place in apart]
    assert tied[0].weights > tied[1].weights


def test_shards_of_all_devices_are_the_model():
    config = shape(vocab_size=256)
    (found,) = memory(config, stage(), ParallelConfig(gpus=8))
    assert 8 * found.weights == 4 * numbers(config)


@pytest.mark.slow
def test_offload_moves_what_rests_to_the_host():
    (spread,) = memory(shape(), stage(), ParallelConfig(gpus=2))
    (found,) = memory(shape(), stage(), ParallelConfig(gpus=2, offload=True))
    assert found.weights == found.gradients == found.optimizer == 0
    assert found.host == spread.weights + spread.gradients + spread.optimizer
    assert found.activations == spread.activations


@pytest.mark.slow
def test_recomputing_more_keeps_less():
    kept = [
        memory(shape(), stage(), ParallelConfig(recompute=how))[0].activations for how in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3


@pytest.mark.slow
def test_earlier_places_of_a_pipeline_have_more_in_flight():
    found = memory(shape(8), stage(), ParallelConfig(gpus=4, pipeline=4))
    middle = found[1].activations / 3
    assert found[2].activations == 2 * middle
    found = memory(shape(8), stage(), ParallelConfig(gpus=4, pipeline=4, schedule="gpipe"))
    assert found[1].activations == found[2].activations == 16 * middle


def test_an_imagined_process_is_gone_afterwards():
    parallel = ParallelConfig(gpus=8, pipeline=2, tensor=2)
    for rank in (0, first_of(parallel, 1), 7):
        with imagined(parallel, rank=rank) as world:
            assert world.rank == rank
            assert world.along("pipeline") == rank // 4
            with pytest.raises(ValueError, match="one of a run already"), imagined(parallel):
                pass
        assert not dist.is_initialized()
    with pytest.raises(ValueError, match="no rank 8"), imagined(parallel, rank=8):
        pass


def test_an_adapter_has_its_base_frozen_and_its_factors_trained():
    adapter = {"lora": 8, "targets": ["q_proj", "down_proj"]}
    (found,) = memory(shape(), stage(adapter=adapter), ParallelConfig(), device="cuda")
    factors = 6 * 8 * ((64 + 64) + (96 + 64))
    assert found.gradients == 4 * factors
    assert found.optimizer == 8 * factors + 4 * 6 * 4
    assert found.weights == 2 * numbers(shape()) + 4 * factors  # what is frozen rests in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("base", "bits"), [("nf4", 4 + 32 / 64), ("rtn-4bit-32g", 4 + (16 + 4) / 32)])
def test_a_packed_base_weighs_what_its_codes_weigh(base, bits):
    adapter = {"lora": 8, "targets": ["q_proj"], "base": base}
    (found,) = memory(shape(), stage(adapter=adapter), ParallelConfig())
    (plain,) = memory(shape(), stage(adapter={"lora": 8, "targets": ["q_proj"]}), ParallelConfig())
    packed = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    groups = 6 * 4 * (6 * 64 + 96) if base.startswith("rtn") else 0  # of each input channel
    assert plain.weights - found.weights == packed * 2 - packed * bits / 8 - groups
