import pytest
import torch
import torch.nn.functional as F

from llamero.core.artifact import Identity
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.quantize import sensitivity
from llamero.quantize.calibrate import INPUTS
from llamero.quantize.sensitivity import Sensitivity, identity, kept, measure, set_size, some

TOKENS = [torch.arange(9) % 48, (7 * torch.arange(14)) % 48]


def make_model(directory, *, tied=False):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=Default(10000.0, 8),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = Llama(config)
    initialize(model, seed=1, std=0.3)
    model.model.norm.weight.data = torch.linspace(0.5, 2, 16)
    directory.mkdir()
    save_model(model, directory)
    return model


def keep(outputs, key):
    def hook(_, __, y):
        outputs[key] = y

    return hook


def by_autograd(model):
    """Second moments of the gradients, from one backward pass through the whole model for each sequence."""
    moments = {}
    for number, ids in enumerate(TOKENS):
        outputs = {}
        hooks = [
            block.get_submodule(name).register_forward_hook(keep(outputs, (i, name)))
            for i, block in enumerate(model.model.layers)
            for names in INPUTS.values()
            for name in names
        ]
        logits = model(ids[None])[0]
        for hook in hooks:
            hook.remove()
        draws = torch.Generator().manual_seed(number)
        share = torch.rand(len(ids), 1, generator=draws)
        drawn = (logits.detach().softmax(-1).cumsum(-1) < share).sum(-1)
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        found = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
        for i in range(len(model.model.layers)):
            for source, names in INPUTS.items():
                g = torch.cat([found[i, name] for name in names], dim=1)
                moments[i, source] = moments.get((i, source), 0) + g.T @ g
    return moments


def place(directory):
    (directory / "felt").mkdir()
    return Sensitivity(directory / "felt")


@pytest.mark.parametrize("tied", [False, True])
def test_moments_are_those_of_a_backward_pass_through_the_whole_model(tmp_path, tied):
    model = make_model(tmp_path / "model", tied=tied)
    felt = place(tmp_path)
    measure(tmp_path / "model", model.config, TOKENS, into=felt)
    for (number, source), expected in by_autograd(model).items():
        (found,) = felt.of(number, source)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert sorted(path.name for path in felt.path.rglob("*.safetensors")) == ["0.safetensors", "1.safetensors"]
    assert not (felt.path / "inputs").exists()  # nothing waits on disk any more


def test_many_outputs_are_coupled_with_their_neighbours_only(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(sensitivity, "COUPLED", 20)
    felt = place(tmp_path)
    measure(tmp_path / "model", model.config, TOKENS, into=felt)
    whole = by_autograd(model)[1, "mlp.gate_proj"]  # (48, 48)
    parts = felt.of(1, "mlp.gate_proj")
    assert parts.shape == (3, 16, 16)
    for i, part in enumerate(parts):
        torch.testing.assert_close(part, whole[16 * i : 16 * i + 16, 16 * i : 16 * i + 16], rtol=1e-3, atol=1e-4)


def test_sets_are_equal_and_not_too_large():
    assert [set_size(n) for n in (512, 4096, 57344, 6144, 2049)] == [512, 2048, 2048, 2048, 683]


def test_sequences_come_from_all_over_the_text():
    tokens = [torch.full((10,), i) for i in range(8)]
    assert [int(ids[0]) for ids in some(tokens, 35)] == [0, 2, 4, 6]
    assert len(some(tokens, 1000)) == 8


@pytest.mark.parametrize(
    ("name", "problem", "where"),
    [
        ("model.layers.1.mlp.down_proj.weight", "weights that are not finite", "model.layers.1.mlp.down_proj.weight"),
        ("model.embed_tokens.weight", "of calibration sequence 0 is not all finite", "model.layers.0"),
    ],
)
def test_a_broken_model_is_refused_by_the_layer_where_it_breaks(tmp_path, name, problem, where):
    model = make_model(tmp_path / "model")
    model.get_parameter(name).data[0, 0] = float("inf")
    (tmp_path / "broken").mkdir()
    save_model(model, tmp_path / "broken")
    felt = place(tmp_path)
    with pytest.raises(LlameroError, match=problem) as caught:
        measure(tmp_path / "broken", model.config, TOKENS, into=felt)
    assert caught.value.where == where


def test_what_was_measured_is_kept_and_damage_is_refused(tmp_path):
    model = make_model(tmp_path / "model")
    statistics = Identity("calibration", "calibration", {}, {"model": "m", "tokens": "t"})
    who, made = identity(statistics, TOKENS), []

    def make(felt):
        made.append(felt)
        measure(tmp_path / "model", model.config, TOKENS, into=felt)

    first, second = (kept(tmp_path / "kept", who, make) for _ in range(2))
    assert len(made) == 1
    assert first == second == Sensitivity(who.path(tmp_path / "kept"))
    assert first.of(1, "mlp.down_proj").shape == (1, 16, 16)
    assert identity(statistics, TOKENS[:1]).digest != who.digest
    (first.path / "1.safetensors").write_bytes(b"")
    with pytest.raises(LlameroError, match="is damaged") as caught:
        kept(tmp_path / "kept", who, make)
    assert caught.value.where == str(first.path / "1.safetensors")
