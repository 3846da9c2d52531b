"""What a release needs to run, against what its cards say."""

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.core.hardware import accelerator
from llamero.infer.kv import PagedCache
from llamero.plan.known import config_of
from llamero.plan.memory import RUNTIME
from llamero.plan.serving import least, serving, weights

LLAMA_70B = config_of("llama-2-70b")


def test_awq_files_have_the_size_that_the_card_prints():
    assert f"{weights(LLAMA_70B, 'awq-4bit-128g') / 1e9:.2f} GB" == "36.61 GB"


@pytest.mark.parametrize(
    ("form", "printed"),
    [
        ("gptq-4bit--1g-actorder_True", 35.33),
        ("gptq-4bit-32g-actorder_True", 40.66),
        ("gptq-4bit-64g-actorder_True", 37.99),
        ("gptq-4bit-128g-actorder_True", 36.65),
        ("gptq-3bit--1g-actorder_True", 26.78),
        ("gptq-3bit-128g-actorder_True", 28.03),
    ],
)
def test_gptq_files_have_the_size_that_the_card_prints(form, printed):
    # AutoGPTQ also wrote a bias of zeros for every layer: 83,968 numbers of 16 bits in each of 80
    assert (weights(LLAMA_70B, form) + 80 * 83_968 * 2) / 1e9 == pytest.approx(printed, abs=0.006)


def test_awq_runs_on_one_device_of_48_gb_and_float16_on_two_of_80():
    kinds = [accelerator(name) for name in ("a100-80gb", "h100", "a6000", "l40s")]
    assert least(LLAMA_70B, "awq-4bit-128g", context=4096, on=kinds) == {
        "A100 SXM 80 GB": 1, "H100 SXM": 1, "RTX A6000": 1, "L40S": 1,
    }  # fmt: skip
    whole = least(LLAMA_70B, "float16", context=4096, on=kinds)
    assert whole["A100 SXM 80 GB"] == whole["H100 SXM"] == 2
    assert least(LLAMA_70B, "awq-4bit-128g", context=4096, on=[accelerator("a100-40gb")]) == {"A100 SXM 40 GB": 2}


def test_what_never_fits_has_no_number():
    assert least(LLAMA_70B, "float16", context=4096, sequences=4096, on=[accelerator("t4")]) == {"T4": None}


@pytest.mark.parametrize("devices", [1, 2])
def test_keys_and_values_take_what_the_cache_takes(devices):
    found = serving(LLAMA_70B, "float16", context=1000, sequences=3, devices=devices)
    cache = PagedCache(LLAMA_70B, dtype=torch.float16, device="meta", pages=3 * 63)
    assert found.kv * devices == sum(pool.nbytes for pools in cache._pools for pool in pools)
    assert found.weights == weights(LLAMA_70B, "float16") / devices
    assert found.runtime == RUNTIME
    assert found.gradients == found.optimizer == found.activations == 0


def test_a_tied_head_is_weighed_once():
    tied = config_of("llama-3.2-1b")
    assert weights(tied, "float16") == 2 * 1_235_814_400
    assert weights(tied, "float32") == 4 * 1_235_814_400


@pytest.mark.parametrize(
    ("form", "said"),
    [("awq-4bit-100g", "do not divide"), ("awq-9bit", "unknown variant"), ("gguf-Q4_K_N", "did you mean")],
)
def test_forms_that_cannot_be_are_refused(form, said):
    with pytest.raises(LlameroError, match=said):
        weights(LLAMA_70B, form)


def test_gguf_files_weigh_each_tensor_in_its_own_type():
    norms = (2 * 80 + 1) * 8192
    matrices = weights(LLAMA_70B, "float16") // 2 - norms
    assert weights(LLAMA_70B, "gguf-Q8_0") == matrices * 34 // 32 + 4 * norms
    assert 41.4e9 < weights(LLAMA_70B, "gguf-Q4_K_M") < 41.5e9  # the file that everybody publishes has 41.42 GB


def test_int8_weighs_a_byte_a_weight_and_a_scale_a_row():
    plain = 2 * (2 * 32_000 * 8192 + 80 * 2 * 8192 + 8192)  # embedding, head, norms
    rows = 2 * 8192 + 2 * 1024 + 2 * 28_672 + 8192
    codes = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28_672
    assert weights(LLAMA_70B, "int8") == plain + 80 * (codes + 4 * rows + 7)
    assert weights(LLAMA_70B, "nf4") < weights(LLAMA_70B, "gptq-4bit-64g-actorder_static")


def test_compressed_tensors_weigh_codes_scales_and_where_zero_is_not_in_the_middle_zeros():
    layer = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28672  # weights of a layer, in seven matrices
    plain = 2 * (2 * 32_000 * 8192 + 80 * 2 * 8192 + 8192)  # embedding, head, norms
    found = weights(LLAMA_70B, "gptq-3bit-128g-actorder_static-ct")
    assert found == plain + 80 * (layer * 3 // 8 + layer // 128 * 2 + 7 * 16)
    zeros = 80 * layer // 128 * 3 // 8
    assert weights(LLAMA_70B, "gptq-3bit-128g-actorder_static-asym-ct") == found + zeros
    assert weights(LLAMA_70B, "gptq-3bit-128g-actorder_static-ct", sym=False) == found + zeros
