from contextlib import closing

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default
from llamero.quantize import calibrate, streams
from llamero.quantize.calibrate import INPUTS, Walk
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.progress import Progress

SHAPE = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Default(10000.0, 16),
    max_position_embeddings=64,
)
LENGTHS = (48, 48, 17, 64, 5, 33, 64, 20)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(calibrate, "GROUP_TOKENS", 60)


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    made = Llama(SHAPE)
    initialize(made, seed=1, std=0.3)
    save_model(made, directory)
    return directory


def brute_force(plain, tokens):
    """All inputs of each linear layer, float64, from forward passes of the whole model."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double().flatten(0, -2))
        )
        for name, module in plain.named_modules()
        if name.partition(".layers.")[2].partition(".")[2] in INPUTS or name == "lm_head"
    ]
    with torch.no_grad():
        for ids in tokens:
            plain(ids[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def check(found, x):
    torch.testing.assert_close(found.second_moment.double(), x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.absmax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
    assert found.tokens == len(x) == sum(LENGTHS)


def test_statistics_are_those_of_the_whole_model(model, tokens):
    seen = brute_force(load_model(model, dtype=torch.float32), tokens)
    walk = Walk(model, SHAPE, tokens)
    layers = list(walk)
    assert [layer.number for layer in layers] == [0, 1, 2]
    for layer in layers:
        for name, found in layer.statistics.items():
            check(found, seen[f"model.layers.{layer.number}.{name}"])
    head = walk.heads[calibrate.UNQUANTIZED]
    torch.testing.assert_close(head.energy.double(), seen["lm_head"].square().sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(head.absmax.double(), seen["lm_head"].abs().amax(0), rtol=1e-4, atol=1e-5)


def bytes_of(layers):
    return [
        part.numpy(force=True).tobytes()
        for layer in layers
        for found in layer.statistics.values()
        for part in (found.second_moment, found.mean_abs, found.absmax)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_files_leave_every_byte_as_it_is(model, tokens, tmp_path, dtype):
    expected = bytes_of(calibrate.Walk(model, SHAPE, tokens, dtype=dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with closing(Progress(tmp_path, {})) as progress:
            waiting = progress.waiting({calibrate.UNQUANTIZED: 0})
            found = bytes_of(Walk(model, SHAPE, tokens, dtype=dtype, waiting=waiting))
        assert len(list(tmp_path.glob("activations-*"))) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == expected


def test_bfloat16_is_near_float32(model, tokens):
    exact = list(calibrate.Walk(model, SHAPE, tokens))
    for layer, other in zip(exact, calibrate.Walk(model, SHAPE, tokens, dtype=torch.bfloat16), strict=True):
        for name, found in other.statistics.items():
            true = layer.statistics[name].second_moment
            assert (found.second_moment - true).norm() < 0.05 * true.norm()
        assert next(other.block.parameters()).dtype == torch.float32  # what is solved is what was stored


def test_a_quantized_stream_flows_through_the_weights_it_is_given(model, tokens):
    names = (calibrate.UNQUANTIZED, "halved", "same")
    found = {name: [] for name in names}
    for layer in Walk(model, SHAPE, tokens, streams=names):
        found[layer.stream].append(layer)
        weight = layer.block.mlp.down_proj.weight.detach()
        if layer.stream != calibrate.UNQUANTIZED:
            value = weight / 2 if layer.stream == "halved" else weight
            layer.weights["mlp.down_proj.weight"] = value.clone
    plain = load_model(model, dtype=torch.float32)
    seen = brute_force(plain, tokens)
    for layer in (*found[calibrate.UNQUANTIZED], *found["same"]):
        for name, each in layer.statistics.items():
            check(each, seen[f"model.layers.{layer.number}.{name}"])
    for block in plain.model.layers:
        block.get_parameter("mlp.down_proj.weight").data /= 2
    seen = brute_force(plain, tokens)
    for layer in found["halved"]:
        for name, each in layer.statistics.items():
            check(each, seen[f"model.layers.{layer.number}.{name}"])


def test_a_quantized_stream_without_weights_is_an_error_of_ours(model, tokens):
    with pytest.raises(ValueError, match="layer 0 was given no weights"):
        list(Walk(model, SHAPE, tokens, streams=("4 bits",)))


def test_inputs_that_are_no_numbers_name_layer_and_sequence(tmp_path):
    made = Llama(SHAPE)
    initialize(made, seed=1)
    made.model.embed_tokens.weight.data[95] = float("nan")
    save_model(made, tmp_path)
    tokens = [torch.full((length,), 3) for length in LENGTHS]
    tokens[4][2] = 95
    with pytest.raises(LlameroError, match="first in sequence 4") as caught:
        list(calibrate.Walk(tmp_path, SHAPE, tokens))
    assert caught.value.where == "model.layers.0.self_attn.q_proj"


def test_missing_weights_are_said_before_the_work(tmp_path, tokens):
    made = Llama(SHAPE)
    initialize(made, seed=1)
    save_model(made, tmp_path)
    deeper = LlamaConfig(**{**vars(SHAPE), "num_layers": 4})
    save_model(made, tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(LlameroError, match=r"`model.layers.3.* is missing \(9 are\)"):
        Walk(tmp_path, deeper, tokens)


def config(mode, *variants, **calibration):
    return QuantizeConfig(variants=variants, calibration=Calibration(mixture="chat", propagation=mode, **calibration))


NAMES = ("gptq-4bit-32g-actorder_True", "rtn-4bit-32g", "gptq-2bit-32g-actorder_False")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("shared", {"": (NAMES, None)}),
        ("reference", {"reference": (NAMES, "gptq-4bit-128g-actorder_static-ct")}),
        (
            "per-bits",
            {
                "4 bits": (NAMES[:2], "gptq-4bit-128g-actorder_static-ct"),
                "2 bits": (NAMES[2:], "gptq-2bit-128g-actorder_static-ct"),
            },
        ),
        ("exact", {name: ((name,), name) for name in NAMES}),
    ],
)
def test_which_activations_variants_are_solved_from(mode, expected):
    made = config(mode, *NAMES)
    found = streams.plan(made, made.parsed(), {(256, 64), (128, 64)})
    assert {s.name: (tuple(v.name for v in s.variants), s.leader and s.leader.name) for s in found} == expected


def test_a_leader_fits_the_model_and_may_be_named():
    made = config("reference", *NAMES)
    (found,) = streams.plan(made, made.parsed(), {(96, 64)})
    assert found.leader is not None
    assert found.leader.name == "gptq-4bit--1g-actorder_static-ct"
    made = config("reference", *NAMES, reference="rtn-3bit-32g")
    (found,) = streams.plan(made, made.parsed(), {(96, 64)})
    assert found.leader is not None
    assert found.leader.name == "rtn-3bit-32g"


def test_the_arithmetic_is_part_of_what_decides(monkeypatch):
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("llamero.quantize.config.multiplies_bfloat16", lambda fast=fast: fast)
        assert Calibration().decides()["compute"] == expected
        assert Calibration(compute="float32").decides()["compute"] == "float32"


@pytest.mark.parametrize(
    ("mode", "reference", "says"),
    [("shared", "rtn-3bit-32g", "needs `propagation: reference`"), ("reference", "rtn-9bit", "unknown variant")],
)
def test_references_that_mean_nothing_are_refused(mode, reference, says):
    with pytest.raises(ValueError, match=says):
        config(mode, *NAMES, reference=reference)
