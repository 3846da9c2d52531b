import copy

import pytest
import torch

from llamero.checkpoint.codes import GroupCodes
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default, rotations
from llamero.quantize import awq
from llamero.quantize.calibrate import INPUTS, Layer, Statistics
from llamero.quantize.problem import pose


def make(kv_heads, *, bias=False):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
        attention_bias=bias,
    )
    model = Llama(config)
    initialize(model, seed=1, std=0.2)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            parameter.data = torch.rand(parameter.shape, generator=random) + 0.1
    block = model.model.layers[0].eval()
    x = torch.randn(200, 64, generator=random) * 10 ** (torch.rand(64, generator=random) * 2 - 1)
    return config, block, x


def run(block, config, x):
    rotation = rotations(torch.arange(len(x)), config.rope.frequencies(len(x)), scale=1.0)
    with torch.no_grad():
        return block(x, rotation, Documents((len(x),)))


def posed(config, block, x):
    seen = {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].detach()})
        )
        for name in INPUTS
    ]
    run(block, config, x)
    for hook in hooks:
        hook.remove()
    statistics = {name: Statistics(v.T @ v, v.abs().mean(0), len(v), v.abs().amax(0)) for name, v in seen.items()}
    return pose(Layer(0, block, statistics), config, damp=0.01)


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (4, True)])
def test_scales_are_folded_so_that_nothing_changes_but_rounding(kv_heads, bias):
    config, block, x = make(kv_heads, bias=bias)
    solution = awq.solve(posed(config, block, x), bits=8, group_size=32)
    assert set(solution.codes) == {name for names in INPUTS.values() for name in names}
    made = copy.deepcopy(block)
    for name, codes in solution.codes.items():
        made.get_submodule(name).weight.data = codes.dequantize()
    for name, value in solution.changed.items():
        made.get_parameter(name).data = value
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= set(solution.changed)
    assert ("self_attn.v_proj.bias" in solution.changed) == bias
    expected, found = run(block, config, x), run(made, config, x)
    assert float((found - expected).norm() / (expected - x).norm()) < 0.02  # 8 bits
    shuffled = {name: value.flip(0) for name, value in solution.changed.items()}
    for name, value in shuffled.items():
        made.get_parameter(name).data = value
    assert float((run(made, config, x) - expected).norm() / (expected - x).norm()) > 0.1


def test_values_that_heads_share_are_not_scaled():
    config, block, x = make(2)
    layer = posed(config, block, x)
    solution = awq.solve(layer, bits=4, group_size=32)
    problem = layer.inputs["self_attn.o_proj"]
    by_hand = awq.clip(problem.weight, problem.statistics.second_moment, bits=4, group_size=32)
    error = float((solution.codes["self_attn.o_proj"].dequantize() - by_hand).abs().max())
    codes = solution.codes["self_attn.o_proj"]
    assert isinstance(codes, GroupCodes)
    step = float(codes.scales.max())
    assert error <= step / 2 + 1e-3


def test_errors_are_those_of_the_outputs_as_they_are_used():
    """A row that is divided before rounding is multiplied afterwards, and so is its error."""
    config, block, x = make(4)
    layer = posed(config, block, x)
    solution = awq.solve(layer, bits=4, group_size=32)
    for problem in layer.inputs.values():
        weights = problem.weight.split(problem.outputs)
        for name, weight in zip(problem.names, weights, strict=True):
            total = float(((weight @ problem.statistics.second_moment) * weight).sum())
            assert solution.fits[name].total == pytest.approx(total, rel=1e-3)
            assert 0 < solution.fits[name].error < 0.1 * total
