import pytest
import torch

from llamero.quantize import factor
from llamero.quantize.factor import inverse_factor


def moment(size, seed=0, dtype=torch.float64):
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.T @ x


@pytest.mark.parametrize("block", [1, 3, 8, 64])
@pytest.mark.parametrize("size", [1, 7, 24, 40])
def test_its_square_is_the_inverse(block, size, monkeypatch):
    monkeypatch.setattr(factor, "BLOCK", block)
    h, order = moment(size), torch.randperm(size, generator=torch.Generator().manual_seed(1))
    added = torch.linspace(0, 1, size, dtype=torch.float64)
    before = h.clone()
    u = inverse_factor(h, order, added=added)
    assert u is not None
    expected = torch.linalg.inv((h + added.diag())[order][:, order])
    torch.testing.assert_close(u.T @ u, expected)
    assert torch.equal(u, u.triu())
    assert (u.diagonal() > 0).all()
    assert torch.equal(h, before)


def test_threads_leave_every_byte_as_it_is(monkeypatch):
    monkeypatch.setattr(factor, "BLOCK", 128)
    h, found = moment(400, dtype=torch.float32), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(inverse_factor(h, torch.arange(400), added=torch.ones(400)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("where", [0, 20, 39])
def test_without_an_inverse_there_is_none(where, monkeypatch):
    monkeypatch.setattr(factor, "BLOCK", 16)
    h = moment(40)
    h[where, where] = -1.0
    assert inverse_factor(h, torch.arange(40), added=torch.zeros(40, dtype=torch.float64)) is None
