import json
import warnings

import pytest
import torch

from llamero.checkpoint import hf, peft
from llamero.core.errors import LlameroError
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapter_files import base_of, load_adapter, save_adapter
from llamero.model.adapters import attach, updates
from llamero.model.config import LlamaConfig
from llamero.model.linear import GroupLinear, pack
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.train.run import grow_vocabulary

IDS = torch.arange(30).view(2, 15)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def llama(*, tied=False, hidden=32, vocabulary=40):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = Llama(config)
    initialize(model, seed=0, std=0.2)
    return model


def adapted(model, directory, *, grown=False, **keys):
    """Attach an adapter all of whose values matter, and write it."""
    config = AdapterConfig.model_validate({"lora": 4, **keys})
    generator = torch.Generator().manual_seed(1)
    for parameter in attach(model, config, seed=1, grown=grown):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, config, directory, base="owner/base")
    return model


def changed(directory, change, **keys):
    """Let some tensors (None removes one) and keys of the config be others."""
    stored = peft.open_tensors(directory)
    tensors = {name: stored[name].clone() for name in stored} | change  # the file is written anew
    tensors = {name: value for name, value in tensors.items() if value is not None}
    specs = {name: hf.Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    hf.write_tensors(directory, specs, tensors.items(), stem="adapter_model")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"targets": "all-linear", "rslora": True, "alpha": 0.7},
        {"targets": ("layers.1.self_attn.o_proj",)},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("model.norm", "lm_head")},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_saved_adapter_on_its_base_is_the_same_model(tmp_path, tied, keys):
    model = adapted(llama(tied=tied), tmp_path, **keys)
    again = llama(tied=tied)
    trained = load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.equal(again(IDS), llama(tied=tied)(IDS))
    assert again.config == model.config
    assert {id(p) for p in trained} == {id(p) for p in again.parameters() if p.requires_grad}
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@torch.no_grad()
@pytest.mark.parametrize("form", ["nf4", "rtn-4bit-32g"])
def test_an_adapter_of_a_packed_base_is_the_same_beside_the_same_codes(tmp_path, form):
    models = llama(), llama()
    for model in models:
        pack(model.model.layers, form)
    adapted(models[0], tmp_path)
    load_adapter(models[1], tmp_path)
    assert torch.equal(models[0](IDS), models[1](IDS))
    if form != "nf4":
        assert isinstance(updates(models[1])["model.layers.0.self_attn.q_proj"].base, GroupLinear)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_the_vocabulary_come_with_the_adapter(tmp_path, tied):
    model = llama(tied=tied)
    grow_vocabulary(model, 47, known=40)
    adapted(model, tmp_path, grown=True)
    again = llama(tied=tied)
    load_adapter(again, tmp_path)
    ids = torch.arange(47)[None]
    assert torch.equal(again(ids), model(ids))
    assert again.config.vocab_size == again.model.embed_tokens.num_embeddings == 47


@torch.no_grad()
def test_embeddings_that_the_adapter_parted_are_parted(tmp_path):
    """PEFT trains a copy of the one module that it is told of, and the tie is gone."""
    model = adapted(llama(tied=True), tmp_path, modules_to_save=("embed_tokens",))
    changed(
        tmp_path, {"base_model.model.lm_head.weight": None}, ensure_weight_tying=False, modules_to_save=["embed_tokens"]
    )
    again = llama(tied=True)
    load_adapter(again, tmp_path)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, llama(tied=True).lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@torch.no_grad()
def test_modules_trained_whole_take_the_precision_of_the_model(tmp_path):
    adapted(llama(), tmp_path, modules_to_save=("embed_tokens", "norm"))
    model = llama().bfloat16()
    load_adapter(model, tmp_path)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert updates(model)["model.layers.0.mlp.up_proj"].lora_A.weight.dtype == torch.float32
    assert model(IDS).dtype == torch.bfloat16


def test_an_adapter_of_another_base_is_warned_of_with_both_names(tmp_path):
    adapted(llama(), tmp_path)
    with pytest.warns(UserWarning, match=r"belongs to `owner/base`, it is put on `models/other`"):
        load_adapter(llama(), tmp_path, base="models/other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path, base="elsewhere/base")


@pytest.mark.parametrize(
    ("model", "change", "keys", "says"),
    [
        ({"hidden": 64}, {}, {}, r"embed_tokens.weight` is \(40, 32\), this model .* needs \(40, 64\)"),
        ({"vocabulary": 60}, {}, {}, r"embed_tokens.weight` is \(40, 32\), .* needs \(60, 32\)"),
        ({}, {}, {"r": 5}, r"is \(4, 32\), .* needs \(5, 32\)"),
        ({}, {f"{Q0}.lora_B.weight": None}, {}, rf"`{Q0}.lora_B.weight` is missing \(1 are\)"),
        ({}, {"base_model.model.lm_head.weight": None}, {}, r"lm_head.weight` is missing"),
        ({}, {f"{Q0}.lora_C.weight": torch.ones(1)}, {}, r"lora_C.weight` has no place"),
        ({}, {}, {"target_modules": ["q_proj"]}, "has no place in this model"),
        ({}, {}, {"target_modules": ["query"]}, r"no layer of \('query',\)"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(50, 32)}, {}, r"is \(\d0, 32\), .* needs \(40, 32\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path, model, change, keys, says):
    adapted(llama(), tmp_path, modules_to_save=("embed_tokens", "lm_head"))
    other = llama(**model)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(LlameroError, match=says) as caught:
        load_adapter(other, changed(tmp_path, change, **keys))
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert all(p.requires_grad for p in other.parameters())


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path, monkeypatch):
    model, config = llama(), AdapterConfig(lora=2)
    save_model(model, tmp_path)
    attach(model, config, seed=1)
    save_adapter(model, config, tmp_path / "adapter", base="owner/base:v2")
    stored = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("owner/base", "v2")
    asked = []
    monkeypatch.setattr("llamero.model.adapter_files.resolve_model", lambda name: asked.append(name) or tmp_path)
    assert base_of(tmp_path / "adapter") == tmp_path
    assert asked == ["owner/base:v2"]


def test_the_base_is_found_by_its_name_or_beside_the_adapter(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_model(llama(), base)
    adapted(llama(), tmp_path / "adapter")
    changed(tmp_path / "adapter", {}, base_model_name_or_path=str(base))
    assert base_of(tmp_path / "adapter") == base
    changed(tmp_path / "adapter", {}, base_model_name_or_path="../base")
    assert base_of(tmp_path / "adapter").resolve() == base.resolve()
    changed(tmp_path / "adapter", {}, base_model_name_or_path=None)
    with pytest.raises(LlameroError, match="does not say which model"):
        base_of(tmp_path / "adapter")
    changed(tmp_path / "adapter", {}, base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(LlameroError, match="is an adapter itself"):
        base_of(tmp_path / "adapter")
