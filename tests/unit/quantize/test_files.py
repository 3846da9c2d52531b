"""What stands beside the weights of a quantized directory, key by key as its loaders read it."""

import json
import stat

import pytest
import torch

from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run
from llamero.quantize.write import without_paths

WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "actorder": "static",
    "block_structure": None,
    "dynamic": False,
    "observer": "minmax",
    "observer_kwargs": {},
}
GPTQ = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.02,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": False,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "model_file_base_name": "model",
}
AWQ = {
    "quant_method": "awq",
    "version": "gemm",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "modules_to_not_convert": None,
}
WANTED = {
    "gptq-4bit-32g-actorder_True": GPTQ,
    "gptq-4bit-32g-actorder_static": GPTQ | {"desc_act": False, "static_groups": True},
    "gptq-3bit--1g-actorder_False-asym": GPTQ | {"bits": 3, "group_size": -1, "desc_act": False, "sym": False},
    "gptq-8bit-64g-actorder_True-v2": GPTQ | {"bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "awq-4bit-32g": AWQ,
    "awq-4bit--1g": AWQ | {"group_size": -1},
}
"""`quantization_config` of config.json, exactly."""
WEIGHTS_WANTED = {
    "gptq-4bit-32g-actorder_static-ct": WEIGHTS,
    # said of rows, an order makes vLLM fail
    "gptq-3bit--1g-actorder_static-ct": WEIGHTS
    | {"num_bits": 3, "strategy": "channel", "group_size": None, "actorder": None},
    "awq-4bit-64g-ct": WEIGHTS | {"symmetric": False, "group_size": 64, "actorder": None},
    "rtn-5bit-32g-ct": WEIGHTS | {"num_bits": 5, "actorder": None},
}

GENERATION = '{"temperature":0.6,   "do_sample": false, "eos_token_id": [1, 2]}'
TOKENIZER = {"chat_template": "{{ x }}", "eos_token": "</s>", "name_or_path": "owner/name"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    shape = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
    )
    model = Llama(shape)
    initialize(model, seed=1, std=0.3)
    save_model(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"_name_or_path": "somebody/else", "_commit_hash": None})
    )
    (directory / "generation_config.json").write_text(GENERATION)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(TOKENIZER | {"tokenizer_file": "/home/me/x/tokenizer.json"})
    )
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "tokenizer.json").write_text('{"vocab": {}}')
    (directory / "LICENSE").write_text("as it was")
    (directory / "optimizer.pt").write_text("not wanted")
    for path in directory.iterdir():
        path.chmod(0o600)
    return directory


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("variants")
    config = QuantizeConfig(variants=(*WANTED, *WEIGHTS_WANTED), damp=0.02)
    reports = run(config, model=source, out=lambda v: out / v.name, tokens=[torch.arange(64)])
    return {report.variant.name: report.path for report in reports}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WANTED)
def test_the_config_says_what_loaders_ask_for_and_no_more(made, name):
    assert read(made[name] / "config.json")["quantization_config"] == WANTED[name]


@pytest.mark.parametrize("name", [name for name in WANTED if name.startswith("gptq")])
def test_gptq_files_say_the_same_beside_the_config(made, name):
    assert read(made[name] / "quantize_config.json") == WANTED[name]
    assert not (made[name] / "quant_config.json").exists()


def test_awq_files_say_it_in_the_words_of_the_first_ones(made):
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert read(made["awq-4bit-32g"] / "quant_config.json") == said
    assert not (made["awq-4bit-32g"] / "quantize_config.json").exists()


@pytest.mark.parametrize("name", WEIGHTS_WANTED)
def test_compressed_tensors_say_an_order_of_groups_only(made, name):
    said = read(made[name] / "config.json")["quantization_config"]
    (group,) = said.pop("config_groups").values()
    assert group == {
        "format": "pack-quantized",
        "targets": ["Linear"],
        "weights": WEIGHTS_WANTED[name],
        "input_activations": None,
        "output_activations": None,
    }
    version = said.pop("version")
    assert tuple(map(int, version.split("."))) >= (0, 15)
    assert said == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    assert not list(made[name].glob("quant*_config.json"))  # another format's readers would take it for theirs


def test_what_belongs_to_the_model_is_carried_over_as_it_was(made, source):
    for path in made.values():
        for name in ("chat_template.jinja", "tokenizer.json", "LICENSE", "generation_config.json"):
            assert (path / name).read_bytes() == (source / name).read_bytes()
        assert not (path / "optimizer.pt").exists()
        assert "do_sample" not in read(path / "config.json")


def test_everybody_may_read_and_nothing_names_a_place_of_its_maker(made, source):
    for path in made.values():
        for file in path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
        said = "".join(file.read_text() for file in path.glob("*.json"))
        assert "/home" not in said
        assert str(source) not in said
        assert read(path / "tokenizer_config.json") == TOKENIZER
        config = read(path / "config.json")
        assert "_name_or_path" not in config
        assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("value", "stays"),
    [
        ("/home/me/model", False),
        ("./model", False),
        ("../up/model", False),
        ("~/model", False),
        ("C:\\Users\\me", False),
        ("owner/name", True),
        ("/", True),
        ("</s>", True),
        ("{% if a/b %}", True),
        (3, True),
    ],
)
def test_paths_are_told_from_names(value, stays):
    assert without_paths({"key": value}) == ({"key": value} if stays else {})


def test_a_tokenizer_config_without_paths_is_copied_byte_for_byte(source, tmp_path):
    from llamero.quantize.write import carry_over

    written = source.parent / "odd"
    written.mkdir(exist_ok=True)
    (written / "tokenizer_config.json").write_text('{"a" :\t1}')
    carry_over(written, tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"a" :\t1}'
