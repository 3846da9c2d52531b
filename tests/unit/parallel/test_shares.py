"""Every process reads its share of a model and nothing else; together they hold what one process would have read."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import attach
from llamero.model.config import from_hf
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.parallel.config import ParallelConfig
from llamero.parallel.spread import Spread
from llamero.parallel.world import World
from llamero.train.run import grow_vocabulary


def _load():
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).parent / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()
SCRIPT = str(Path(__file__).parent / "shares.py")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,  # a bias is cut twice along its one dimension
    "hidden_act": "silu",
}
ADAPTER = {"lora": 4, "modules_to_save": ["norm"]}
GROW = {"known": 61, "size": 71}


def model_of(config, seed=0):
    model = Llama(from_hf(config, where="here"))
    initialize(model, seed=seed, std=0.2)
    return model


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shares")
    for name, keys in {"base": {}, "tied": {"tie_word_embeddings": True}}.items():
        (root / name).mkdir()
        save_model(model_of(CONFIG | keys), root / name, dtype=torch.bfloat16)
    return root


@pytest.fixture(scope="module")
def four(root):
    def order(name, **keys):
        return {"name": name, "start": str(root / "base"), **keys}

    orders = [
        order("fsdp"),
        order("hsdp", parallel={"replicate": 2}),
        order("tensor × fsdp", parallel={"tensor": 2}),
        order("pipeline × tensor", parallel={"tensor": 2, "pipeline": 2}),
        order("pipeline × fsdp, interleaved", parallel={"pipeline": 2, "schedule": "interleaved"}),
        order("offloaded, recomputed", parallel={"offload": True, "recompute": "full"}),
        order("tied × fsdp", start=str(root / "tied")),
        order("tied × tensor", start=str(root / "tied"), parallel={"tensor": 2}),
        {"name": "fresh × fsdp", "config": CONFIG},
        {"name": "fresh × tensor × pipeline", "config": CONFIG, "parallel": {"tensor": 2, "pipeline": 2}},
        order("adapter × fsdp", adapter=ADAPTER),
        order("adapter × tensor × pipeline", adapter=ADAPTER, parallel={"tensor": 2, "pipeline": 2}),
        order("grown × fsdp", grow={**GROW, "new_rows": "mean"}),
        order("grown × tensor", grow={**GROW, "new_rows": "mean"}, parallel={"tensor": 2}),
        order("grown, copied", grow={**GROW, "new_rows": "copy_last"}, parallel={"pipeline": 2}),
    ]
    run(orders, processes=4, where=root / "four")
    return root / "four"


def run(orders, *, processes, where):
    ended = layouts.end(layouts.start(orders, processes=processes, where=where, script=SCRIPT))
    assert not any(code for code, _ in ended), "\n".join(f"rank {r}: {err[-3000:]}" for r, (_, err) in enumerate(ended))


def assert_same_bits(directory, model):
    found = load_file(directory / "weights.safetensors")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def said(directory):
    return json.loads((directory / "said.json").read_text())


STORED = [
    "fsdp",
    "hsdp",
    "tensor × fsdp",
    "pipeline × tensor",
    "pipeline × fsdp, interleaved",
    "offloaded, recomputed",
]


@pytest.mark.parametrize("name", STORED)
def test_the_shares_are_the_model(root, four, name):
    assert_same_bits(four / name, load_model(root / "base", dtype=torch.float32))


@pytest.mark.parametrize("name", ["tied × fsdp", "tied × tensor"])
def test_a_tied_model_is_read_once(root, four, name):
    assert_same_bits(four / name, load_model(root / "tied", dtype=torch.float32))


@pytest.mark.parametrize("name", ["fresh × fsdp", "fresh × tensor × pipeline"])
def test_fresh_weights_are_those_of_one_process(four, name):
    model = Llama(from_hf(CONFIG, where="here"))
    initialize(model, seed=3)
    assert_same_bits(four / name, model)


@pytest.mark.parametrize("name", ["adapter × fsdp", "adapter × tensor × pipeline"])
def test_an_adapter_and_its_base_are_those_of_one_process(root, four, name):
    model = load_model(root / "base", dtype=torch.float32)
    attach(model, AdapterConfig.model_validate(ADAPTER), seed=3)
    assert_same_bits(four / name, model)


@pytest.mark.parametrize(
    ("name", "new_rows"), [("grown × fsdp", "mean"), ("grown × tensor", "mean"), ("grown, copied", "copy_last")]
)
def test_a_vocabulary_grows_as_in_one_process(root, four, name, new_rows):
    model = load_model(root / "base", dtype=torch.float32)
    grow_vocabulary(model, GROW["size"], known=GROW["known"], new_rows=new_rows)
    assert_same_bits(four / name, model)


@pytest.mark.parametrize("name", [*STORED, "tied × fsdp", "tied × tensor"])
def test_a_process_reads_what_it_holds(root, four, name):
    model = load_model(root / ("tied" if name.startswith("tied") else "base"))
    whole = sum(parameter.numel() for parameter in model.parameters())
    twice = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    everyone = said(four / name)
    copies = 2 if name == "hsdp" else 1
    for one in everyone:
        assert one["read"] - one["holds"] <= twice  # biases that are cut twice are read whole
    held = sum(one["holds"] for one in everyone)
    assert copies * whole <= held <= copies * whole + 4 * twice  # norms lie whole on the tensor axis
    assert max(one["holds"] for one in everyone) < 0.62 * copies * whole


def damaged(root, name, **values):
    """Return an order for a copy of the base with some values in its tensors."""
    (root / name).mkdir()
    (root / name / "config.json").write_text((root / "base" / "config.json").read_text())
    tensors = load_file(root / "base" / "model.safetensors")
    for tensor, (row, value) in values.items():
        tensors[tensor.replace("__", ".")][row] = value
    save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
    return {"name": f"load {name}", "start": str(root / name)}


@pytest.mark.parametrize(
    ("value", "said", "parallel"),
    [
        (float("nan"), "has 32 NaN and 0 infinite values among 2144", {}),
        (float("-inf"), "has 0 NaN and 32 infinite values among 2144", {"pipeline": 2}),
    ],
    ids=["nan", "infinite"],
)
def test_what_one_process_finds_ends_both(root, value, said, parallel):
    """The last row of the head is read by the second process alone."""
    order = damaged(root, str(value), lm_head__weight=(-1, value)) | {"parallel": parallel}
    ended = layouts.end(layouts.start([order], processes=2, where=root / "two", script=SCRIPT))
    for code, err in ended:
        assert code == 2, err
        assert f"model.safetensors: tensor `lm_head.weight` {said}" in err


def test_nobody_is_ahead_of_the_first_process_by_more_than_a_tensor(monkeypatch):
    """Else those with little to send would wait for a slow disk longer than a process may keep others waiting."""
    world, met = World(ParallelConfig(device="cpu")), []
    monkeypatch.setattr(world, "barrier", lambda: met.append(len(taken)))
    spread, taken = Spread(model_of(CONFIG), world, batch=1, sequence=8), []
    for name, _ in spread.whole():
        taken.append(name)
    assert met == list(range(len(spread.specs)))
