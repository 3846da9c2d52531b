"""bitsandbytes files as others lay them out; the layout is written down here once more, from its own library's code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.checkpoint import bitsandbytes, packed
from llamero.core.errors import LlameroError
from llamero.model import int8, nf4
from llamero.model.config import LlamaConfig
from llamero.model.linear import Int8Linear, Nf4Linear, PackedLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default

IDS = torch.arange(20)[None]

EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
FOUR = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["lm_head"],
}


@pytest.fixture(scope="module")
def plain():
    shape = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=Default(1e4, 16),
        max_position_embeddings=64,
    )
    model = Llama(shape)
    initialize(model, seed=0)
    return model.eval()


def int8_parts(weight):
    """Row by row: over the largest value, times 127."""
    top = weight.abs().amax(1)
    codes = torch.stack([(row * 127 / peak).round() for row, peak in zip(weight, top, strict=True)])
    meant = codes * top[:, None] / 127
    return {"weight": codes.to(torch.int8), "SCB": top, "weight_format": torch.tensor(0, dtype=torch.uint8)}, meant


def nf4_parts(weight, *, double):
    """Block by block: the nearest of sixteen values, two to a byte, the first in the high half."""
    blocks = weight.reshape(-1, 64)
    top = blocks.abs().amax(1)
    codes = (blocks / top[:, None])[..., None].sub(nf4.CODE_BOOK).abs().argmin(-1)
    pairs = codes.flatten().view(-1, 2)
    parts = {"weight": (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8), "weight.quant_map": nf4.CODE_BOOK.clone()}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    if double:
        mean = top.mean()
        rest = (top - mean)[None]  # fewer than 256: one block of blocks
        nested = rest.abs().amax(1)
        spots = (rest / nested[:, None])[..., None].sub(nf4.DYNAMIC_MAP).abs().argmin(-1)
        top = (nf4.DYNAMIC_MAP[spots] * nested[:, None]).flatten() + mean
        parts["weight.nested_absmax"], parts["weight.absmax"] = nested, spots.flatten().to(torch.uint8)
        parts["weight.nested_quant_map"] = nf4.DYNAMIC_MAP.clone()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean.item()}
    else:
        parts["weight.absmax"] = top
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return parts, (nf4.CODE_BOOK[codes] * top[:, None]).view(weight.shape)


def directory(plain, path, keys, pack):
    """Write a model whose decoder layers are packed, and return what it means."""
    save_model(plain, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": keys}))
    tensors, meant = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        parts, meant[name] = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('.weight')}.{leaf}": value.contiguous() for leaf, value in parts.items()}
    save_file(tensors, path / "model.safetensors")
    twin = Llama(plain.config)
    twin.load_state_dict({**plain.state_dict(), **meant}, strict=False)
    return twin.eval()


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("products", ["fast", "plain"])
@torch.no_grad()
def test_files_of_others_are_read(plain, tmp_path, kind, products):
    keys = EIGHT if kind == "int8" else {**FOUR, "bnb_4bit_use_double_quant": kind == "nf4-double"}
    pack = int8_parts if kind == "int8" else lambda w: nf4_parts(w, double=kind == "nf4-double")
    twin = directory(plain, tmp_path, keys, pack)
    model = load_model(tmp_path, dtype=torch.float32, products=products)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    torch.testing.assert_close(model(IDS), twin(IDS), atol=1e-4, rtol=1e-4)
    if products == "plain":
        kinds = Int8Linear if kind == "int8" else Nf4Linear
        assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), kinds)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_written_is_what_the_library_would_write(kind):
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(1))
    layout = bitsandbytes.Format(kind)
    codes = int8.encode(weight) if kind == "int8" else nf4.codes(weight)
    parts, meant = int8_parts(weight) if kind == "int8" else nf4_parts(weight[:, :128], double=True)
    if kind == "nf4":
        codes = nf4.codes(weight[:, :128])
    stored, specs = layout.encode(codes), layout.specs(codes.shape[1], codes.shape[0])
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }
    torch.testing.assert_close(codes.dequantize(), meant, atol=2e-2 if kind == "nf4" else 1e-6, rtol=0)
    assert set(stored) == set(parts)
    for name in set(parts) - {bitsandbytes.STATE, "weight.absmax", "weight.nested_absmax", "weight"}:
        assert torch.equal(stored[name], parts[name]), name
    differ = (stored["weight"] != parts["weight"]).float().mean()
    assert float(differ) < 1e-3  # where two values are as near
    if kind == "nf4":
        state = json.loads(bytes(stored[bitsandbytes.STATE].tolist()))
        assert state["shape"] == [96, 128]
        assert state["nested_offset"] == pytest.approx(float(nf4.codes(weight[:, :128]).parts["offset"]))


def test_rows_of_zeros_stay_zeros():
    weight = torch.zeros(2, 64)
    weight[1, 3] = 2.0
    assert torch.equal(int8.encode(weight).dequantize(), weight)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({**FOUR, "bnb_4bit_quant_type": "fp4"}, "kind `fp4`"),
        ({**FOUR, "bnb_4bit_quant_storage": "bfloat16"}, "`bnb_4bit_quant_storage: bfloat16` is not understood"),
        ({"quant_method": "bitsandbytes"}, "neither, or both"),
        ({**FOUR, "load_in_8bit": True}, "neither, or both"),
        ({**EIGHT, "llm_int8_has_fp16_weight": True}, "`llm_int8_has_fp16_weight: True`"),
        ({**EIGHT, "surprise": 1}, "`surprise: 1` is not understood"),
    ],
)
def test_what_is_not_understood_is_refused(keys, says):
    with pytest.raises(LlameroError, match=says):
        packed.parse_format(keys, where="config.json")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_our_own_config_is_understood(kind):
    layout = bitsandbytes.Format(kind)
    assert packed.parse_format(layout.config(sym=True), where="x") == layout


def state_with(parts, **change):
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist())) | change
    return {**parts, "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode())).byte()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda parts: state_with(parts, blocksize=128), "`blocksize: 128`"),
        (lambda parts: state_with(parts, shape=[1, 2]), r"`shape: \[1, 2\]`"),
        (lambda parts: {**parts, "weight.quant_map": torch.zeros(16)}, "other values than those of nf4"),
        (lambda parts: {**parts, bitsandbytes.STATE: torch.zeros(3, dtype=torch.uint8)}, "is not JSON"),
    ],
)
def test_other_kinds_of_nf4_are_refused(plain, tmp_path, damage, says):
    def pack(weight):
        parts, meant = nf4_parts(weight, double=True)
        return damage(parts), meant

    directory(plain, tmp_path, FOUR, pack)
    with pytest.raises(LlameroError, match=says):
        load_model(tmp_path)


def test_int8_rows_in_another_order_are_refused(plain, tmp_path):
    def pack(weight):
        parts, meant = int8_parts(weight)
        return {**parts, "weight_format": torch.tensor(2, dtype=torch.uint8)}, meant

    directory(plain, tmp_path, EIGHT, pack)
    with pytest.raises(LlameroError, match="rows are not in their order"):
        load_model(tmp_path)
