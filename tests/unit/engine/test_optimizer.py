import pytest
import torch
from torch import nn

from llamero.core.errors import LlameroError
from llamero.engine.optimizer import adamw, load_moments, save_moments
from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig
from llamero.parallel.spread import Spread
from llamero.parallel.world import World

STAGE = StageConfig(name="s", mixture="m", steps=1, lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_matrices_decay_and_norms_and_biases_do_not(make_model, tied):
    model = make_model(tied=tied, attention_bias=True)
    decaying, others = adamw(model, STAGE).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in others["params"]}
    assert kept == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert {names[id(parameter)] for parameter in decaying["params"]} == set(names.values()) - kept
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_are_spared_where_that_is_asked_for(make_model, tied):
    model = make_model(tied=tied)
    decaying, others = adamw(model, STAGE.model_copy(update={"weight_decay_embeddings": False})).param_groups
    spared = {id(parameter) for parameter in others["params"]}
    assert id(model.model.embed_tokens.weight) in spared
    assert (id(model.lm_head.weight) in spared) == tied
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def alone(model):
    return Spread(model, World(ParallelConfig(device="cpu")), batch=1, sequence=8)


def trained(model, steps=2):
    optimizer = adamw(model, STAGE)
    for _ in range(steps):
        model(torch.arange(12)[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_moments_go_from_stage_to_stage_bit_by_bit(make_model, tmp_path):
    model, other = make_model(tied=True), make_model(tied=True, seed=1)
    optimizer = trained(model)
    save_moments(tmp_path, spread=alone(model), optimizer=optimizer)
    again = adamw(other, STAGE)
    load_moments(tmp_path, spread=alone(other), optimizer=again)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[one].keys() == again.state[two].keys()
        assert all(torch.equal(value, again.state[two][key]) for key, value in optimizer.state[one].items())


def test_frozen_weights_have_no_moments(make_model, tmp_path):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    save_moments(tmp_path, spread=alone(model), optimizer=trained(model))
    again = adamw(model, STAGE)
    load_moments(tmp_path, spread=alone(model), optimizer=again)
    assert model.model.embed_tokens.weight not in again.state
    assert len(again.state) == len(list(model.parameters())) - 1


def test_moments_that_are_not_there_or_of_another_model_are_refused(make_model, tmp_path):
    model = make_model(tied=True)
    with pytest.raises(LlameroError, match=r"no moments of an optimizer(?s:.*)export_optimizer: true"):
        load_moments(tmp_path, spread=alone(model), optimizer=adamw(model, STAGE))
    save_moments(tmp_path, spread=alone(model), optimizer=trained(model))
    for other in (make_model(), make_model(attention_bias=True, tied=True)):
        with pytest.raises(LlameroError, match=r"not those of this model: `(lm_head|model.layers.0)"):
            load_moments(tmp_path, spread=alone(other), optimizer=adamw(other, STAGE))


def test_a_step_is_adamws_by_hand():
    layer = nn.Linear(2, 1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.tensor([[0.5, -2.0]]), torch.tensor([3.0])
    adamw(layer, STAGE).step()
    # after one step the corrected moments are g and g²
    expected = weight * (1 - 0.5 * 0.1) - 0.5 * layer.weight.grad / (layer.weight.grad.abs() + 1e-6)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * 3 / (3 + 1e-6))
