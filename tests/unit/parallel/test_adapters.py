"""An adapter over several processes: losses, gradient norms, factors and the merged model are those of one process."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import attach
from llamero.model.config import LlamaConfig
from llamero.model.linear import pack
from llamero.model.llama import Llama
from llamero.model.rope import Default
from llamero.parallel.adapted import refuse_cuts
from llamero.parallel.config import ParallelConfig

TOLERANCE = 1e-5


def _load():
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).parent / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()

WIDE = {"hidden": 128, "mlp": 256, "layers": 2, "std": 0.1}
"""A shape whose matrices can be cut between blocks of codes; of weights so small that AdamW magnifies no rounding."""
KINDS = {
    "lora": {"adapter": {"dropout": 0.3}},
    "whole": {"adapter": {"lora": 3, "modules_to_save": ["embed_tokens", "lm_head", "norm"], "targets": ["v_proj"]}},
    "tied": {"adapter": {"modules_to_save": ["embed_tokens"], "targets": ["v_proj"]}, "shape": {"tied": True}},
    "nf4": {"adapter": {"packed": "nf4-double"}, "shape": WIDE},
    "grid": {"adapter": {"packed": "rtn-4bit-32g", "dropout": 0.3}, "shape": WIDE},
}
TWO = {
    "lora": [{"tensor": 2, "recompute": "selective"}, {"pipeline": 2}],
    "nf4": [{"recompute": "full"}, {"tensor": 2}],
    "grid": [{"tensor": 2, "sequence_parallel": False, "recompute": "full"}],
}
FOUR = {
    "lora": [
        {"pipeline": 2, "tensor": 2, "schedule": "zero-bubble"},
        {"replicate": 2, "compile": True},
    ],
    "tied": [{"pipeline": 2, "tensor": 2}, {"pipeline": 2}],
    "whole": [{"tensor": 2}],  # the rank is no multiple of what FSDP spreads
    "nf4": [{"tensor": 2}, {"pipeline": 2, "micro_batch": 1}],
    "grid": [{"replicate": 2, "tensor": 2}, {"offload": True}],
}


STREAMED = [("nf4-double", {"tensor": 2}), ("nf4", {"offload": True}), ("rtn-4bit-32g", {"pipeline": 2}), (None, {})]
"""Forms whose layers are read as they are spread."""


def cases(layouts):
    return [(kind, number) for kind, found in layouts.items() for number in range(len(found))]


def ordered(found):
    return [
        {"name": f"{kind} {number}", "parallel": parallel, "probe": False, **KINDS[kind]}
        for kind, several in found.items()
        for number, parallel in enumerate(several)
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    orders = [{"name": kind, "probe": False, **about} for kind, about in KINDS.items()]
    return layouts.run(orders, processes=1, where=tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return layouts.run(ordered(TWO), processes=2, where=tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return layouts.run(ordered(FOUR), processes=4, where=tmp_path_factory.mktemp("four"))


def assert_same(result, expected):
    assert any(name.endswith("lora_B.weight") for name in expected.weights)
    assert any(name.startswith("plain.") for name in expected.weights)
    found = layouts.differences(result, expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(("kind", "number"), cases(TWO))
def test_an_adapter_over_two_processes_is_that_of_one(two, expected, kind, number):
    assert_same(two[f"{kind} {number}"], expected[kind])


@pytest.mark.slow
def test_a_base_that_is_read_as_it_is_spread_is_the_same(tmp_path):
    about = {
        "shape": WIDE,
        "stage": {"eps": 1e-3},
        "probe": False,
    }
    whole = [{"name": f"{form}", "adapter": {"packed": form, "streamed": False}, **about} for form, _ in STREAMED]
    parts = [
        {"name": f"{form}", "adapter": {"packed": form, "streamed": True}, "parallel": parallel, **about}
        for form, parallel in STREAMED
    ]
    expected = layouts.run(whole, processes=1, where=tmp_path / "one")
    for name, result in layouts.run(parts, processes=2, where=tmp_path / "two").items():
        found = layouts.differences(result, expected[name])
        assert max(found.values()) < TOLERANCE, (name, found)
    tensor = [{**parts[0], "parallel": {"tensor": 2}}]
    found = layouts.differences(
        layouts.run(tensor, processes=4, where=tmp_path / "four")["nf4-double"], expected["nf4-double"]
    )
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), cases(FOUR))
def test_an_adapter_over_four_processes_is_that_of_one(four, expected, kind, number):
    assert_same(four[f"{kind} {number}"], expected[kind])


@pytest.mark.slow
def test_an_adapter_goes_on_from_four_processes_to_two_to_one(tmp_path):
    about = {
        "adapter": {"packed": "nf4", "dropout": 0.3},
        "shape": WIDE,
        "stage": {"steps": 6, "save_every": 2},
        "probe": False,
    }
    whole = layouts.run([{"name": "whole", **about}], processes=1, where=tmp_path / "whole")["whole"]

    def cut(processes, parallel, step):
        order = {"name": "cut", **about, "parallel": parallel, "directory": str(tmp_path / "shared")}
        order["stop"] = {"rank": 0, "signal": int(signal.SIGTERM), "step": step}
        ended = layouts.end(layouts.start([order], processes=processes, where=tmp_path / f"of{processes}"))
        assert {code for code, _ in ended} == {130}, ended

    cut(4, {"tensor": 2}, 2)
    cut(2, {"pipeline": 2, "micro_batch": 4}, 3)
    order = {"name": "last", **about, "directory": str(tmp_path / "shared")}
    last = layouts.run([order], processes=1, where=tmp_path / "one")["last"]
    assert [line["step"] for line in last.lines] == [1, 2, 3, 4, 5, 6]
    found = layouts.differences(last, whole)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("packed", [None, "nf4"])
def test_a_frozen_base_of_bfloat16_learns_alike_over_processes(tmp_path, packed):
    about = {
        "adapter": {"dtype": "bfloat16", "packed": packed},
        "shape": WIDE,
        "stage": {"precision": "bfloat16"},
        "probe": False,
    }
    alone = layouts.run([{"name": "alone", **about}], processes=1, where=tmp_path / "one")["alone"]
    several = [{"name": name, **about, "parallel": {axis: 2}} for name, axis in (("data", "shard"), ("cut", "tensor"))]
    for result in layouts.run(several, processes=2, where=tmp_path / "two").values():
        found = layouts.differences(result, alone)
        assert max(found[key] for key in ("loss", "grad_norm", "validation_loss")) < 0.03, found


def model():
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=384,
        num_layers=1,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        rope=Default(10000.0, 8),
        max_position_embeddings=64,
    )
    return Llama(config)


@pytest.mark.parametrize(
    ("form", "tensor", "says"),
    [
        ("nf4", 2, r"cuts the 64 inputs of `self_attn.o_proj`(?s:.*)`tensor:` one of 1, or another form"),
        ("rtn-3bit--1g", 2, r"cuts the 32 outputs of `self_attn.k_proj`(?s:.*)one of 1, or"),
        ("rtn-4bit-32g", 8, r"cuts the 32 outputs of `self_attn.k_proj`(?s:.*)one of 1, 2, 4, or"),
    ],
)
def test_a_cut_through_a_word_or_block_is_refused_with_the_sizes_that_make_none(form, tensor, says):
    packed = model()
    pack(packed.model.layers, form)
    attach(packed, AdapterConfig(lora=2), seed=1)
    with pytest.raises(LlameroError) as told:
        refuse_cuts(ParallelConfig(gpus=tensor, tensor=tensor), packed)
    assert told.match(says)


def test_cuts_between_words_pass_and_plain_layers_have_none():
    packed = model()
    refuse_cuts(ParallelConfig(gpus=8, tensor=8), packed)
    pack(packed.model.layers, "rtn-4bit-32g")
    refuse_cuts(ParallelConfig(gpus=4, tensor=4), packed)
    refuse_cuts(ParallelConfig(gpus=1), packed)


def test_a_frozen_head_has_no_gradient_anywhere():
    from llamero.kernels.cross_entropy import sharded_linear_cross_entropy

    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    targets, weights = torch.arange(5), torch.ones(5)
    sharded_linear_cross_entropy(hidden, head, targets, weights, None).backward()
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(hidden.grad, expected)
