import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.quantize import gptq


def layer(out=8, d=64, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(d, tokens, generator=generator)
    return torch.randn(out, d, generator=generator), x @ x.T


def test_a_factor_is_that_of_the_damped_inverse():
    _, h = layer()
    factor = gptq.factorize(h.double(), by_activation=False, damp=0.01)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(factor.u.T @ factor.u, torch.linalg.inv(damped))
    assert factor.u.tril(-1).abs().max() == 0


def test_dead_channels_become_zero_and_are_known():
    w, h = layer()
    h[5], h[:, 5] = 0, 0
    factor = gptq.factorize(h, by_activation=True, damp=0.01)
    assert factor.dead.nonzero().flatten().tolist() == [5]
    solved = gptq.solve(w, factor, bits=4, group_size=32, sym=True, static=False)
    assert solved.dequantize()[:, 5].abs().max() == 0


def test_a_layer_that_never_saw_anything_is_solved():
    w, h = layer()
    solved = gptq.quantize(w, torch.zeros_like(h), bits=4, group_size=32)
    assert solved.dequantize().abs().max() == 0


def test_damping_is_raised_where_it_is_too_little_and_recorded():
    h = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert gptq.factorize(h, by_activation=False, damp=0.01).damp == pytest.approx(0.1)


def test_damping_that_never_suffices_names_the_layer():
    h = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(LlameroError, match="not positive definite, even damped by 10 ") as caught:
        gptq.factorize(h, by_activation=False, damp=0.01, where="model.layers.3.mlp.down_proj")
    assert caught.value.where == "model.layers.3.mlp.down_proj"
    assert "more varied" in str(caught.value)


def test_the_scale_of_the_second_moment_does_not_matter():
    w, h = layer()
    one = gptq.quantize(w, h, bits=4, group_size=32)
    other = gptq.quantize(w, 4 * h, bits=4, group_size=32)
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("actorder", ["none", "static", "desc"])
def test_stacked_rows_are_solved_as_if_alone(actorder):
    w, h = layer(out=12)
    how = {"bits": 4, "group_size": 16, "actorder": actorder}
    whole = gptq.quantize(w.double(), h.double(), **how)
    assert torch.equal(whole.rows(4, 9).codes, gptq.quantize(w[4:9].double(), h.double(), **how).codes)


def test_groups_of_desc_order_follow_activation_and_static_groups_do_not():
    w, h = layer()
    order = h.diagonal().argsort(descending=True, stable=True)
    desc = gptq.quantize(w, h, bits=4, group_size=16, actorder="desc")
    assert desc.g_idx[order].tolist() == [i // 16 for i in range(64)]
    static = gptq.quantize(w, h, bits=4, group_size=16, actorder="static")
    assert static.g_idx.tolist() == [i // 16 for i in range(64)]


@pytest.mark.parametrize(("inputs", "size"), [(384, 32), (384, 96), (768, 256), (300, 300), (320, 160), (120, 40)])
def test_no_group_begins_where_later_channels_are_stale(inputs, size):
    blocks = list(gptq._blocks(inputs, size))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == inputs
    assert all(stop - start <= gptq.BLOCK for start, stop in blocks)
    for begin in range(0, inputs, size):
        start, stop = next((start, stop) for start, stop in blocks if start <= begin < stop)
        assert begin == start or begin + size <= stop
