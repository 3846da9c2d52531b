"""The seam: `attend` is `attend_plain` for every layout."""

import pytest
import torch

from llamero.kernels import attention as kernels
from llamero.model.attention import Documents, Pages, Tree, attend, attend_plain

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(queries, keys, *, heads=4, kv=2, d=8, dtype=torch.float64):
    q, k, v = (drawn(n, h, d, seed=n + h, dtype=dtype) for n, h in ((queries, heads), (keys, kv), (keys, kv)))
    return q, k, v.flip(0)


def assert_plain(q, k, v, layout):
    out, lse = attend(q, k, v, layout)
    expected, expected_lse = attend_plain(q, k, v, layout)
    assert (out.dtype, lse.dtype) == (expected.dtype, expected_lse.dtype)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(11,), (3, 3, 3, 2), (1, 5, 1)])
def test_documents(lengths, kv):
    assert_plain(*qkv(sum(lengths), sum(lengths), kv=kv), Documents(lengths))


CHAIN = [-1, 0, 1]
BRANCHES = [-1, 0, 1, 2, 3, 2, 5, 2]  # a trunk of three, branches of two, two and one
FORESTS = {
    "one chain": CHAIN,
    "one tree": BRANCHES,
    "chains": [-1, 0, -1, 2, 3, -1],
    "trees and chains": [*CHAIN, *(p + 3 if p >= 0 else -1 for p in BRANCHES), -1, 11, *[-1, 13, 14, 13]],
    "two roots that interleave": [-1, -1, 0, 1, 2, 3],
    "a chain, then two roots that interleave": [-1, 0, 1, -1, -1, 3, 4, 5],
}


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("name", FORESTS)
def test_trees(name, kv):
    parents = torch.tensor(FORESTS[name])
    assert_plain(*qkv(len(parents), len(parents), kv=kv), Tree(parents, len(parents)))


@pytest.mark.parametrize("seed", range(8))
def test_random_forests(seed):
    generator = torch.Generator().manual_seed(seed)
    near = [max(-1, node - 1 - int(torch.randint(0, 3, (), generator=generator))) for node in range(40)]
    cut = torch.rand(40, generator=generator) < 0.15
    parents = torch.tensor(near).masked_fill(cut, -1)
    assert_plain(*qkv(40, 40), Tree(parents, 40))


def test_the_last_nodes_of_a_tree_may_ask_alone():
    parents = torch.tensor(BRANCHES)
    assert_plain(*qkv(5, len(parents)), Tree(parents, 5))


PAGE = 4


def pool_of(lengths, *, kv=2, d=8, dtype=torch.float64):
    """Return pools and a table whose pages lie in no order."""
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(5)).tolist()
    table = [[order.pop() for _ in range(count)] + [0] * (max(counts) - count) for count in counts]
    pools = [drawn(sum(counts) + 2, PAGE, kv, d, seed=seed, dtype=dtype) for seed in (1, 2)]
    return *pools, torch.tensor(table)


ROWS = {
    "prompts": ((5, 9, 1), (5, 9, 1)),
    "answers": ((5, 9, 12, 1), (1, 1, 1, 1)),
    "pieces of prompts": ((9, 12), (4, 7)),
    "everything": ((9, 13, 6, 7, 4), (1, 13, 2, 1, 3)),
}


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("name", ROWS)
def test_pages(name, kv):
    lengths, new = ROWS[name]
    keys, values, table = pool_of(lengths, kv=kv)
    assert_plain(drawn(sum(new), 4, 8), keys, values, Pages(table, lengths, new))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_keeps_the_dtype_and_a_float32_log_sum_exp(dtype):
    (keys, values, table), parents = pool_of((5, 9), dtype=dtype), torch.tensor(BRANCHES)
    cases = [
        (*qkv(6, 6, dtype=dtype), Documents((2, 4))),
        (*qkv(8, 8, dtype=dtype), Tree(parents, 8)),
        (drawn(4, 4, 8, dtype=dtype), keys, values, Pages(table, (5, 9), (1, 3))),
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for q, k, v, layout in cases:
        out, lse = attend(q, k, v, layout)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        expected, expected_lse = attend_plain(q.double(), k.double(), v.double(), layout)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_gradients_of_a_tree_are_those_of_its_mask():
    parents = torch.tensor(BRANCHES)
    tensors, weight, grads = qkv(8, 8), drawn(8, 4, 8, seed=9), []
    for attention in (attend, attend_plain):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        (attention(q, k, v, Tree(parents, 8))[0] * weight).sum().backward()
        grads.append([q.grad, k.grad, v.grad])
    torch.testing.assert_close(*grads)


def test_a_documents_mask_is_its_block_diagonal():
    mask = kernels.same_document((2, 3))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
