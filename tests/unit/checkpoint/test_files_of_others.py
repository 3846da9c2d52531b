"""Quantized directories as other programs lay them out, packed here bit by bit, without the packers of this package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.core.errors import LlameroError
from llamero.infer.generate import generate
from llamero.infer.sampler import Sampling
from llamero.infer.score import perplexity, sliding
from llamero.model.config import LlamaConfig
from llamero.model.linear import PackedLinear
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default

IDS = torch.arange(20)[None]
GROUP = 32
SHAPE = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Default(1e4, 16),
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def plain():
    model = Llama(SHAPE)
    initialize(model, seed=0)
    return model.eval()


def words(rows, bits):
    """Each row of numbers as one string of bits, the first number lowest, cut in words of 32."""
    packed = []
    for row in rows.tolist():
        number = sum(value << (i * bits) for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return signed(torch.tensor(packed))


def signed(found):
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def grids(weight, bits, *, sym, size=GROUP, dtype=torch.float16):
    """Codes, scales, zero points of groups of neighbours, and what they mean; zero points of 0 among them."""
    grouped = weight.unflatten(1, (-1, size))
    last = 2**bits - 1
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if sym:
        scale = (2 * grouped.abs().amax(2) / last).to(dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1)).int()
    else:
        scale = ((high - low) / last).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, last).int()
    codes = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(0, last).int()
    meant = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.flatten(1), scale, zero, meant.flatten(1)


def gptq(weight, *, bits=4, sym=True, offset=1, desc_act=False, g_idx=True, bias=False):
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    back = order.argsort() if desc_act else torch.arange(weight.shape[1])
    codes, scale, zero, meant = grids(weight[:, back.argsort()], bits, sym=sym)
    zero = zero.clamp(min=offset)
    meant = (codes - zero.repeat_interleave(GROUP, 1)) * scale.float().repeat_interleave(GROUP, 1)
    parts = {
        "qweight": words(codes[:, back], bits).T,
        "qzeros": words((zero - offset).T, bits),
        "scales": scale.T,
    }
    if g_idx:
        parts["g_idx"] = (back // GROUP).to(torch.int32)
    if bias:
        parts["bias"] = torch.zeros(len(weight), dtype=torch.float16)
    return parts, meant[:, back]


def awq(weight, *, dtype=torch.float16):
    codes, scale, zero, meant = grids(weight, 4, sym=False, dtype=dtype)

    def eights(rows):
        lanes = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k holds the column with this number
        return words(rows.view(len(rows), -1, 8)[:, :, lanes].flatten(1), 4)

    return {"qweight": eights(codes.T), "qzeros": eights(zero.T), "scales": scale.T}, meant


def compressed(weight, *, bits=4, sym=True, size=GROUP, dtype=torch.float16):
    codes, scale, zero, meant = grids(weight, bits, sym=sym, size=size or weight.shape[1], dtype=dtype)
    parts = {
        "weight_packed": words(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not sym:
        parts["weight_zero_point"] = words(zero.T, bits).T
    return parts, meant


def directory(plain, path, keys, pack, *, beside=False, skip=()):
    """Write a model whose decoder layers are packed, and return one that has the weights that are meant."""
    save_model(plain, path)
    config = json.loads((path / "config.json").read_text())
    if beside:
        (path / "quantize_config.json").write_text(json.dumps(keys))
    else:
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": keys}))
    tensors, meant = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight") and not any(s in name for s in skip)]:
        parts, meant[name] = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('.weight')}.{leaf}": value.contiguous() for leaf, value in parts.items()}
    save_file(tensors, path / "model.safetensors")
    twin = Llama(plain.config)
    twin.load_state_dict({**plain.state_dict(), **meant}, strict=False)
    return twin.eval()


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}


def ct(bits=4, *, sym=True, group: int | None = GROUP, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group" if group else "channel",
        "group_size": group, "actorder": None, "dynamic": False, "observer": "mse"}  # fmt: skip
    keys = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {**keys, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": [], **more}


FILES = {
    "gptq, 2 bits": (GPTQ | {"bits": 2}, {"bits": 2}, gptq),
    "gptq, 3 bits": (GPTQ | {"bits": 3}, {"bits": 3}, gptq),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, {"bits": 8}, gptq),
    "gptq, desc_act": (GPTQ | {"desc_act": True}, {"desc_act": True}, gptq),
    "gptq, asymmetric": (GPTQ | {"sym": False}, {"sym": False}, gptq),
    "gptq v2, asymmetric": (GPTQ | {"checkpoint_format": "gptq_v2"}, {"sym": False, "offset": 0}, gptq),
    "gptq, a bias of zeros": (GPTQ, {"bias": True}, gptq),
    "gptq, early 2023": ({k: v for k, v in GPTQ.items() if k != "quant_method"}, {"g_idx": False}, gptq),
    "awq": (AWQ, {}, awq),
    "awq, scales in bfloat16": (AWQ, {"dtype": torch.bfloat16}, awq),
    "awq, other keys": ({"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "zero_point": True}, {}, awq),
    "compressed-tensors": (ct(), {}, compressed),
    "compressed-tensors, rows": (ct(group=None), {"size": None}, compressed),
    "compressed-tensors, asymmetric": (ct(sym=False), {"sym": False}, compressed),
    "compressed-tensors, 5 bits": (ct(5), {"bits": 5, "dtype": torch.bfloat16}, compressed),
    "compressed-tensors, 8 bits": (ct(8, sym=False), {"bits": 8, "sym": False}, compressed),
}


@pytest.mark.parametrize("products", ["fast", "plain"])
@pytest.mark.parametrize("kind", FILES)
@torch.no_grad()
def test_files_of_others_are_read(plain, tmp_path, kind, products):
    keys, how, pack = FILES[kind]
    twin = directory(plain, tmp_path, keys, lambda weight: pack(weight, **how), beside="2023" in kind)
    model = load_model(tmp_path, dtype=torch.float32, products=products)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    torch.testing.assert_close(model(IDS), twin(IDS), atol=1e-4, rtol=1e-4)
    sampling = Sampling(temperature=0, max_new_tokens=4)
    assert generate(model, [[1, 2, 3]], sampling)[0].ids == generate(twin, [[1, 2, 3]], sampling)[0].ids
    windows = sliding(20, window=16, stride=8)
    found, expected = (perplexity(each, IDS[0].tolist(), windows).value for each in (model, twin))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pack", [gptq, awq, compressed])
@torch.no_grad()
def test_layers_that_were_left_alone_stay_plain(plain, tmp_path, pack):
    left = ["down_proj", "lm_head"]
    keys = {gptq: GPTQ, awq: AWQ | {"modules_to_not_convert": left}, compressed: ct(ignore=["re:.*down_proj"])}[pack]
    twin = directory(plain, tmp_path, keys, pack, skip=("down_proj",))
    model = load_model(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 12
    torch.testing.assert_close(model(IDS), twin(IDS), atol=1e-4, rtol=1e-4)


def test_groups_in_another_order_need_their_numbers(plain, tmp_path):
    directory(plain, tmp_path, GPTQ | {"desc_act": True}, lambda weight: gptq(weight, g_idx=False))
    with pytest.raises(LlameroError, match="`desc_act` says that groups lie in its order") as caught:
        load_model(tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (GPTQ | {"checkpoint_format": "gptq_p", "bits": 5}, "layout `gptq_p`"),
        (GPTQ | {"bits": 6}, "`bits: 6`"),
        (GPTQ | {"checkpoint_format": "marlin"}, "layout `marlin`"),
        (AWQ | {"version": "gemv"}, "layout `gemv`"),
        (AWQ | {"version": "gemv_fast"}, "layout `gemv_fast`"),
        (AWQ | {"zero_point": False}, "`zero_point`"),
        (ct(format="int-quantized"), "`int-quantized` .8-bit weights"),
        (ct(format="float-quantized"), "`float-quantized` .8-bit floating point"),
        (ct(format="marlin-24"), "`marlin-24`"),
        ({"quant_method": "fp8"}, "`fp8` .8-bit floating point"),
        ({"quant_method": "exl2", "bits": 4.65}, "`exl2` .ExLlamaV2"),
        ({"quant_method": "exl3", "bits": 3.0}, "`exl3` .ExLlamaV3"),
        ({"quant_method": "hqq"}, "`hqq`"),
    ],
)
def test_what_is_not_read_is_refused_by_name(plain, tmp_path, keys, says):
    directory(plain, tmp_path, keys, gptq)
    with pytest.raises(LlameroError, match=says) as caught:
        load_model(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")
