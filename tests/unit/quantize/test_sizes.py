from dataclasses import replace

import pytest
import torch

from llamero.checkpoint import hf
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import empty_model, save_model
from llamero.model.rope import Default
from llamero.quantize.choose import choose
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run
from llamero.quantize.sizes import size
from llamero.quantize.variants import default_set, parse
from llamero.text.tokenizer import train_bpe

LLAMA_2_70B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope=Default(10000.0, 128),
    max_position_embeddings=4096,
)
TINY = replace(
    LLAMA_2_70B,
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


@pytest.fixture(scope="module")
def with_extra_tokens():
    return empty_model(replace(LLAMA_2_70B, vocab_size=32_007))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("gptq-4bit--1g-actorder_True", "35.33"),
        ("gptq-4bit-32g-actorder_True", "40.66"),
        ("gptq-4bit-64g-actorder_True", "37.99"),
        ("gptq-4bit-128g-actorder_True", "36.65"),
        ("gptq-3bit--1g-actorder_True", "26.78"),
        ("gptq-3bit-128g-actorder_True", "28.03"),
    ],
)
def test_the_sizes_on_a_published_card(with_extra_tokens, name, gigabytes):
    found = size(with_extra_tokens, parse(name), dtype=torch.float16)
    assert found.as_published is not None
    assert f"{found.as_published / 1e9:.2f}" == gigabytes
    assert found.ours < found.as_published


def test_the_last_printed_digits_of_published_sizes(with_extra_tokens):
    def published(model, name):
        return f"{(size(model, parse(name), dtype=torch.float16).as_published or 0) / 1e9:.5f}"

    plain = empty_model(LLAMA_2_70B)
    assert published(with_extra_tokens, "gptq-3bit--1g-actorder_True") == "26.77521"
    assert published(plain, "gptq-3bit--1g-actorder_True") == "26.77498"
    assert published(plain, "awq-4bit-128g").startswith("36.61")


LAYOUTS = (
    "gptq-4bit--1g-actorder_True",
    "gptq-3bit-32g-actorder_True-asym",
    "gptq-4bit-32g-actorder_static-v2",
    "gptq-5bit-32g-actorder_static-ct",
    "gptq-4bit--1g-actorder_False-asym-ct",
    "awq-4bit-32g",
    "awq-4bit-32g-ct",
    "rtn-8bit-64g",
    "int8",
    "nf4",
)


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 40_000])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_ours_is_what_is_written_to_the_byte(tmp_path, changes, shard_bytes):
    model = Llama(replace(TINY, **changes))
    initialize(model, seed=1, std=0.3)
    (tmp_path / "plain").mkdir()
    save_model(model, tmp_path / "plain")
    config = QuantizeConfig(variants=LAYOUTS, calibration=Calibration(mixture="none"))
    tokens = [torch.arange(64)]
    made = run(
        config, model=tmp_path / "plain", out=lambda v: tmp_path / v.name, tokens=tokens, shard_bytes=shard_bytes
    )
    for report in made:
        on_disk = sum(path.stat().st_size for path in report.path.glob("*.safetensors"))
        planned = size(
            empty_model(replace(TINY, **changes)), report.variant, dtype=torch.float16, shard_bytes=shard_bytes
        )
        assert planned.ours == report.size_bytes == on_disk, report.variant.name


@pytest.mark.parametrize("shard_bytes", [None, 60_000])
def test_gguf_files_are_foretold_to_the_byte(tmp_path, shard_bytes):
    source = tmp_path / "plain"
    shape = replace(TINY, vocab_size=262)
    model = Llama(shape)
    initialize(model, seed=1, std=0.3)
    train_bpe(iter(["the cat sat on the mat"]), vocab_size=262).save(source)
    save_model(model, source)
    names = tuple(name for name in default_set() if name.startswith("gguf"))
    config = QuantizeConfig(variants=names)
    made = run(
        config, model=source, out=lambda v: tmp_path / v.name, tokens=[torch.arange(64)], shard_bytes=shard_bytes
    )
    meta = empty_model(shape)
    for report in made:
        on_disk = sum(path.stat().st_size for path in report.path.glob("*.gguf"))
        found = size(meta, report.variant, dtype=torch.float16, shard_bytes=shard_bytes, source=source)
        assert (found.ours, found.without_tokenizer) == (on_disk, False), report.variant.name
        bare = size(meta, report.variant, dtype=torch.float16, shard_bytes=shard_bytes)
        assert bare.without_tokenizer
        assert on_disk - 10_000 < bare.ours < on_disk


def test_default_variants_that_cannot_be_made_are_left_out_and_named_ones_refused(tmp_path):
    def chosen(config, shape=TINY, source=None):
        return choose(config, shape, source=source, where="here")

    kept, left = chosen(QuantizeConfig())
    assert [variant.name for variant in kept] == [
        "gptq-4bit--1g-actorder_True",
        "gptq-4bit-32g-actorder_True",
        "gptq-4bit-32g-actorder_static",
        "gptq-4bit-64g-actorder_True",
        "gptq-4bit-64g-actorder_static",
        "gptq-3bit--1g-actorder_True",
        "gptq-3bit--1g-actorder_static-ct",
        "awq-4bit-32g",
        *(f"gguf-{mix}" for mix in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")),
    ]
    assert left["awq-4bit-128g"] == "groups of 128 do not divide 64 input channels"
    assert {variant.name for variant in kept} | left.keys() == set(default_set())

    fewer, more = chosen(QuantizeConfig(), source=tmp_path)  # without a tokenizer
    assert not any(variant.layout == "gguf" for variant in fewer)
    assert more["gguf-Q4_K_M"].startswith("its tokenizer: ")
    assert len(fewer) + len(more) == len(default_set())

    with pytest.raises(LlameroError, match="variant `rtn-4bit-96g`: groups of 96 do not divide") as caught:
        chosen(QuantizeConfig(variants=("rtn-4bit-32g", "rtn-4bit-96g")))
    assert caught.value.fix is not None
    assert "rtn-4bit-32g can be made" in caught.value.fix
    with pytest.raises(LlameroError, match="72 channels; its readers need a multiple of 32"):
        chosen(QuantizeConfig(), replace(TINY, intermediate_size=72), tmp_path)
