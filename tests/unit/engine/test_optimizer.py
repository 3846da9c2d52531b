import pytest
import torch
from torch import nn

from llamero.engine.optimizer import adamw
from llamero.engine.stage import StageConfig

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


def test_a_step_is_adamws_by_hand():
    layer = nn.Linear(2, 1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.tensor([[0.5, -2.0]]), torch.tensor([3.0])
    adamw(layer, STAGE).step()
    # after one step the corrected moments are g and g²
    expected = weight * (1 - 0.5 * 0.1) - 0.5 * layer.weight.grad / (layer.weight.grad.abs() + 1e-6)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * 3 / (3 + 1e-6))
