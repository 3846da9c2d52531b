import json

import pytest
import torch

from llamero.checkpoint import gptq, hf
from llamero.checkpoint.codes import pack
from llamero.core.errors import LlameroError
from llamero.model import rtn
from llamero.model.config import LlamaConfig
from llamero.model.linear import PackedLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import empty_model, load_block, load_model, save_model, write_config
from llamero.model.rope import Default

SHAPE = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    rope=Default(10000.0, 32),
    max_position_embeddings=32,
)
IDS = torch.arange(20)[None]
LAST = "model.layers.0.mlp.down_proj"


@pytest.fixture
def plain():
    model = Llama(SHAPE)
    initialize(model, seed=0, std=0.2)
    return model


def quantized(model, directory, *, zero_offset=1, change=None, **keys):
    """Write a directory as other programs do, and give the model the same weights."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            name = f"model.layers.{name}"
            codes = rtn.quantize(tensors.pop(f"{name}.weight"), bits=4, group_size=32, sym=False)
            parts = gptq.Format(codes.bits, -1).encode(codes)
            if zero_offset == 0:
                parts["qzeros"] = pack(codes.zeros, 4).T.contiguous()
            tensors |= {f"{name}.{leaf}": value for leaf, value in parts.items()}
            module.weight = torch.nn.Parameter(codes.dequantize())
    tensors |= change or {}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    specs = {name: hf.Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    hf.write_tensors(directory, specs, tensors.items(), stem="gptq_model-4bit-32g")
    write_config(SHAPE, directory, dtype=torch.float16)
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, **keys}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return directory


@torch.no_grad()
def test_a_saved_model_is_the_same_model(plain, tmp_path):
    save_model(plain, tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), plain(IDS))


@pytest.mark.parametrize(("layout", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@torch.no_grad()
def test_gptq_directories_of_both_layouts_run(plain, tmp_path, layout, offset):
    quantized(plain, tmp_path, zero_offset=offset, checkpoint_format=layout)
    torch.testing.assert_close(load_model(tmp_path, dtype=torch.float32)(IDS), plain(IDS))


@torch.no_grad()
def test_the_dtype_of_a_packed_model_is_that_of_its_computation(plain, tmp_path):
    model = load_model(quantized(plain, tmp_path), dtype=torch.bfloat16, products="plain")
    assert model(IDS).dtype == torch.bfloat16
    assert model.get_submodule(LAST).get_buffer("scales").dtype == torch.float16


@torch.no_grad()
def test_a_bias_that_only_the_packed_file_knows_is_used(plain, tmp_path):
    bias = torch.linspace(-1, 1, 32)
    quantized(plain, tmp_path, change={f"{LAST}.bias": bias})
    plain.get_submodule(LAST).bias = torch.nn.Parameter(bias)
    torch.testing.assert_close(load_model(tmp_path, dtype=torch.float32)(IDS), plain(IDS))


def test_other_quantizations_are_refused_by_name(plain, tmp_path):
    quantized(plain, tmp_path, quant_method="hqq")
    with pytest.raises(LlameroError, match="quantized with `hqq`") as caught:
        load_model(tmp_path)
    assert "a version of it in: gptq" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{LAST}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "names groups 2 to 2, there are 2"),
        (
            {f"{LAST}.qweight": torch.zeros(16, 32, dtype=torch.int32)},
            r"is \(16, 32\) torch.int32, the config says \(8",
        ),
        ({f"{LAST}.scales": torch.zeros(2, 32, dtype=torch.int32)}, r"torch.int32, the config says .* torch.float16"),
        ({f"{LAST}.scales": torch.zeros(0)}, f"tensor `{LAST}.scales` is missing"),
        ({f"{LAST}.extra": torch.zeros(1)}, f"tensor `{LAST}.extra` has no place"),
    ],
)
def test_broken_codes_are_named(plain, tmp_path, change, says):
    quantized(plain, tmp_path, change=change)
    with pytest.raises(LlameroError, match=says):
        load_model(tmp_path)


def test_a_config_that_promises_codes_must_have_them(plain, tmp_path):
    save_model(plain, tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    with pytest.raises(LlameroError, match="and no tensor is"):
        load_model(tmp_path)


def test_a_packed_model_is_not_saved_as_a_plain_one(plain, tmp_path):
    model = load_model(quantized(plain, tmp_path))
    assert isinstance(model.get_submodule(LAST), PackedLinear)
    with pytest.raises(ValueError, match="packed model"):
        save_model(model, tmp_path)


def test_one_layer_can_be_had_alone(plain, tmp_path):
    save_model(plain, tmp_path)
    block = load_block(SHAPE, hf.open_tensors(tmp_path), 0, dtype=torch.bfloat16)
    expected = plain.model.layers[0].state_dict()
    assert {name: p.dtype for name, p in block.named_parameters()} == dict.fromkeys(expected, torch.bfloat16)
    assert torch.equal(block.mlp.up_proj.weight, expected["mlp.up_proj.weight"].bfloat16())


def test_an_empty_model_has_no_storage(plain):
    assert {parameter.device.type for parameter in empty_model(plain.config).parameters()} == {"meta"}
