"""Our adapters against PEFT's: what we write it loads, what it writes we load, and both compute the same; NF4 against
bitsandbytes. Needs `pip install peft accelerate bitsandbytes`.
"""

import json
import warnings
from typing import Any

import pytest
import torch

from llamero.model import nf4
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapter_files import load_adapter, save_adapter
from llamero.model.adapters import attach, merge, updates
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default

pytestmark = pytest.mark.parity

IDS = torch.arange(40).view(2, 20)
VOCABULARY = 44


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    """Directory of a small base."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
    )
    model = Llama(config)
    initialize(model, seed=0, std=0.2)
    (tmp_path / "base").mkdir()
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


def theirs(directory):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def grow(model, rows):
    """Give our model rows as training does."""
    for layer in (model.model.embed_tokens, model.lm_head):
        more = torch.randn(rows - VOCABULARY, 32, generator=torch.Generator().manual_seed(3))
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight.detach(), more]))
    model.config = LlamaConfig(**{**vars(model.config), "vocab_size": rows})
    model.tie()


def shake(model):
    """Let everything that is trained matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def loaded_by_peft(peft, base, adapter, *, rows=VOCABULARY):
    model = theirs(base)
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, adapter)
    assert not [w for w in said if "key" in str(w.message) or "inconsisten" in str(w.message)]
    return loaded.eval()


def assert_same(ours, other, ids=IDS):
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), other(ids).logits, rtol=1e-4, atol=1e-4)


OURS = [
    {"lora": 4},
    {"lora": 4, "alpha": 3, "rslora": True, "init": "gaussian", "dropout": 0.1},
    {"lora": 8, "targets": "all-linear"},
    {"lora": 2, "targets": ("q_proj", "v_proj")},
    {"lora": 2, "targets": ("layers.1.self_attn.o_proj", "layers.0.mlp.up_proj")},
    {"lora": 4, "modules_to_save": ("embed_tokens",)},
    {"lora": 4, "modules_to_save": ("lm_head",)},
    {"lora": 4, "modules_to_save": ("embed_tokens", "lm_head")},
    {"lora": 4, "modules_to_save": ("norm",)},
]


@pytest.mark.parametrize("keys", OURS, ids=str)
def test_peft_loads_what_we_write(peft, base, tmp_path, keys):
    model, config = load_model(base), AdapterConfig.model_validate(keys)
    before = model(IDS)
    attach(model, config, seed=1)
    shake(model)
    save_adapter(model, config, tmp_path / "adapter", base=str(base))
    assert not torch.allclose(model(IDS), before, atol=0.1)
    other = loaded_by_peft(peft, base, tmp_path / "adapter")
    assert_same(model, other)
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS), model(IDS))
    merge(again)
    assert_same(again, other.merge_and_unload())


def test_peft_loads_an_adapter_with_new_tokens(peft, base, tmp_path):
    model, config, rows = load_model(base), AdapterConfig(lora=4), VOCABULARY + 5
    grow(model, rows)
    attach(model, config, seed=1, grown=True)
    shake(model)
    save_adapter(model, config, tmp_path / "adapter", base=str(base))
    ids = torch.arange(rows)[None]
    assert_same(model, loaded_by_peft(peft, base, tmp_path / "adapter", rows=rows), ids)
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


THEIRS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.mlp\.(up|down)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "r": 40},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", THEIRS, ids=str)
def test_we_load_what_peft_writes(peft, base, tmp_path, keys):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **keys})
    other = peft.get_peft_model(theirs(base), config)
    shake(other)
    other.eval().save_pretrained(tmp_path / "adapter")
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    assert_same(ours, other)
    merge(ours)
    assert_same(ours, other)


@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_writes_of_a_grown_vocabulary(peft, base, tmp_path):
    model = theirs(base)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    other = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake(other)
    other.eval().save_pretrained(tmp_path / "adapter")  # it stores the embeddings of its own accord
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    assert_same(ours, other, torch.arange(VOCABULARY + 3)[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("init", "rank"), [("default", 4), ("gaussian", 16)])
def test_both_begin_alike(peft, base, init, rank):
    """Other random numbers, the same distribution."""
    ours = load_model(base)
    attach(ours, AdapterConfig(lora=rank, init=init), seed=1)
    their_config = peft.LoraConfig(
        r=rank, target_modules="all-linear", init_lora_weights=True if init == "default" else init
    )
    other = dict(peft.get_peft_model(theirs(base), their_config).named_parameters())
    both = [], []
    for name, layer in updates(ours).items():
        theirs_a = other[f"base_model.model.{name}.lora_A.default.weight"]
        assert not other[f"base_model.model.{name}.lora_B.default.weight"].any()
        assert theirs_a.shape == layer.lora_A.weight.shape
        for values, factor in zip(both, (layer.lora_A.weight, theirs_a), strict=True):
            values.append(factor.detach().flatten() * layer.base.in_features**0.5)
    ours_a, theirs_a = (torch.cat(values) for values in both)
    torch.testing.assert_close(ours_a.std(), theirs_a.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(ours_a.quantile(0.9), theirs_a.quantile(0.9), rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_our_config_is_read_as_it_was_meant(peft, base, tmp_path):
    model, config = load_model(base), AdapterConfig(lora=4, alpha=3, rslora=True)
    attach(model, config, seed=1)
    save_adapter(model, config, tmp_path, base=str(base))
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora, read.bias) == (4, 3, True, "none")
    assert read.base_model_name_or_path == str(base)
    known = set(peft.LoraConfig().to_dict())
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known


# -- NF4


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.mark.filterwarnings("ignore")
def test_code_books_are_those_of_bitsandbytes(bnb):
    assert torch.equal(nf4.CODE_BOOK, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.DYNAMIC_MAP, bnb.create_dynamic_map())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_bytes_of_bitsandbytes(bnb, dtype, double):
    weight = torch.randn(640, 320, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    ours = nf4.encode(weight, double=double)
    assert torch.equal(ours["packed"], packed.flatten())
    if double:
        assert torch.equal(ours["offset"], state.offset)
        assert torch.equal(ours["nested_absmax"], state.state2.absmax)
        # its table for CPU takes a neighbour now and then; ours is the nearest
        assert (ours["absmax"] != state.absmax).float().mean() < 3e-3
        ours["absmax"] = state.absmax
    else:
        assert torch.equal(ours["absmax"], state.absmax)
    assert torch.equal(nf4.decode(ours, (640, 320), dtype), bnb.dequantize_4bit(packed, state))
    if not double:
        twin = nf4.decode_with_bitsandbytes(ours["packed"], ours["absmax"], (640, 320), dtype)
        assert torch.equal(nf4.decode(ours, (640, 320), dtype), twin)
