from pathlib import Path

import pytest

from llamero.model.config import LlamaConfig
from llamero.model.rope import Default
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.needs import needs

LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope=Default(10000.0, 128),
    max_position_embeddings=4096,
)

TEXT = [4096] * 64


def asked(**keys):
    calibration = Calibration(text=Path("-"), compute="bfloat16", **keys.pop("calibration", {}))
    return QuantizeConfig(calibration=calibration, **keys)


def test_activations_of_70b_wait_in_a_file():
    found = needs(LLAMA_70B, [4096] * 64)
    assert found.file == 2 * 262_144 * 8192 * 2


def test_every_stream_has_activations_of_its_own():
    names = ("gptq-4bit-128g-actorder_True", "gptq-3bit-128g-actorder_True")
    exact = needs(LLAMA_70B, TEXT, asked(variants=names, sensitivity=0, calibration={"propagation": "exact"}))
    assert exact.file == 2 * needs(LLAMA_70B, TEXT, asked(variants=names, sensitivity=0)).file


def test_what_the_loss_feels_waits_on_disk_too():
    with_it, without = (needs(LLAMA_70B, TEXT, asked(sensitivity=tokens)) for tokens in (4096, 0))
    sets = 5 + 4 + 28 + 4  # of 2,048 outputs: qkv, o, gate and up, down
    assert with_it.file - without.file == 80 * sets * 2048 * 2048 * 4
    names = ("gguf-rtn-Q4_0",)
    assert needs(LLAMA_70B, TEXT, asked(variants=names)).file == without.file
    led = needs(LLAMA_70B, TEXT, asked(variants=names, calibration={"propagation": "reference"}))
    assert led.file == with_it.file  # by a GPTQ variant


def test_memory_does_not_grow_with_the_depth_or_with_text_that_waits_in_a_file():
    few, many = needs(LLAMA_70B, TEXT), needs(LLAMA_70B, [4096] * 128)
    assert few.memory == many.memory
    shallow = LlamaConfig(**{**vars(LLAMA_70B), "num_layers": 2})
    assert needs(shallow, TEXT).memory == few.memory
    assert needs(shallow, TEXT).kept == few.kept // 40


@pytest.mark.parametrize("keys", [{}, {"sensitivity": 0}, {"sensitivity": 0, "refine": 2}, {"sym": False}])
def test_the_default_set_of_a_70b_model_takes_less_than_16_gib(keys):
    assert needs(LLAMA_70B, TEXT, asked(**keys)).memory < 16 * 2**30


def test_methods_that_look_at_weights_alone_take_less_than_16_gib():
    assert needs(LLAMA_70B, TEXT, asked(variants=("rtn-4bit-128g", "nf4", "int8"))).memory < 16 * 2**30


def test_solving_takes_more_than_the_pass():
    assert needs(LLAMA_70B, TEXT).memory < needs(LLAMA_70B, TEXT, asked()).memory
