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
    solved = gptq.solve(w, factor, [gptq.Grids(4, 32)])[0]
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
    whole = gptq._blocks(inputs, size)
    blocks = [(start, stop) for start, stop, _ in whole]
    strips = [strip for _, _, mine in whole for strip in mine]
    assert [(mine[0][0], mine[-1][1]) for _, _, mine in whole] == blocks
    for parts, most in ((blocks, gptq.BLOCK), (strips, gptq.STRIP)):
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == inputs
        assert all(stop - start <= most for start, stop in parts)
        for begin in range(0, inputs, size):
            start, stop = next((start, stop) for start, stop in parts if start <= begin < stop)
            assert begin == start or begin + size <= stop


ASKED = (
    gptq.Grids(4, 16),
    gptq.Grids(2, 32, sym=False, static=True),
    gptq.Grids(3, -1),
    gptq.Grids(8, 64, static=True),
    gptq.Grids(5, 16, shrinks=(0.8, 0.9)),
)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_grids_are_solved_together_as_if_alone(by_activation, coupled, monkeypatch):
    monkeypatch.setattr(gptq, "COLUMNS", 17)  # several rows at a time, but not all
    monkeypatch.setattr(gptq, "OUTPUTS", 4)
    w, h = layer(out=12)
    factor = gptq.factorize(h.double(), by_activation=by_activation, damp=0.01)
    outputs = gptq.couple(gradients(12, sets=2)) if coupled else None
    together = gptq.solve(w.double(), factor, ASKED, outputs)
    for grids, codes in zip(ASKED, together, strict=True):
        (alone,) = gptq.solve(w.double(), factor, [grids], outputs)
        assert codes.bits == grids.bits
        for part in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(codes, part), getattr(alone, part))


def gradients(outputs, *, sets=1):
    generator = torch.Generator().manual_seed(3)
    size = outputs // sets
    mix = torch.randn(sets, size, size, generator=generator, dtype=torch.float64)
    g = mix @ torch.randn(sets, size, 200, generator=generator, dtype=torch.float64)
    return g @ g.mT


def loss(w, h, g, codes):
    """Return what the loss feels: `tr(G dW H dW.T)`, both damped."""
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    g = g + gptq.OUTPUT_DAMP * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    change = w - codes.dequantize(torch.float64)
    return float(((g @ change @ h) * change).sum())


def test_outputs_still_to_come_answer_to_the_errors_of_those_before(monkeypatch):
    """Against the best continuous answer, found anew for each step from all errors so far."""
    monkeypatch.setattr(gptq, "OUTPUTS", 4)
    w, h = layer(out=12)
    w, h, (g,) = w.double(), h.double(), gradients(12)
    factor, grids = gptq.factorize(h, by_activation=True, damp=0.01), gptq.Grids(3, 16)
    (found,) = gptq.solve(w, factor, [grids], gptq.couple(g[None]))
    order = g.diagonal().argsort(descending=True)
    damped = g + gptq.OUTPUT_DAMP * g.diagonal().mean() * torch.eye(12, dtype=g.dtype)
    off = torch.zeros_like(w)
    for start in range(0, 12, 4):
        done, now, left = order[:start], order[start : start + 4], order[start:]
        answer = -torch.linalg.solve(damped[left][:, left], damped[left][:, done] @ off[done])[:4]
        target = w[now] - answer
        expected = gptq.solve(target, factor, [grids])[0]
        torch.testing.assert_close(found.dequantize(torch.float64)[now], expected.dequantize(torch.float64))
        off[now] = w[now] - expected.dequantize(torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coupled_outputs_cost_less(bits):
    w, h = layer(out=192)
    w, h, (g,) = w.double(), h.double(), gradients(192)
    factor, grids = gptq.factorize(h, by_activation=True, damp=0.01), gptq.Grids(bits, 32, static=True)
    alone, coupled = (gptq.solve(w, factor, [grids], outputs)[0] for outputs in (None, gptq.couple(g[None])))
    assert loss(w, h, g, coupled) < 0.8 * loss(w, h, g, alone)


def test_outputs_that_nobody_feels_are_solved_by_themselves():
    w, h = layer(out=12)
    factor = gptq.factorize(h.double(), by_activation=True, damp=0.01)
    alone = gptq.solve(w.double(), factor, [gptq.Grids(4, 16)])[0]
    unfelt = gptq.solve(w.double(), factor, [gptq.Grids(4, 16)], gptq.couple(torch.zeros(3, 4, 4).double()))[0]
    assert torch.equal(alone.codes, unfelt.codes)
