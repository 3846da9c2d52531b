"""Attention kernels against brute force in float64: values, log-sum-exp, gradients, and blocks that merge."""

import math

import pytest
import torch

from llamero.kernels import attention as kernels

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for


def brute_force(q, k, v, sees):
    """One query at a time; `sees(i, j)` says whether query i may look at key j."""
    groups = q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if sees(i, j)]
        for head in range(q.shape[1]):
            scores = k[seen, head // groups] @ q[i, head] / math.sqrt(q.shape[-1])
            weights = scores.exp()
            out[i, head] = weights @ v[seen, head // groups] / weights.sum()
            lse[i, head] = weights.sum().log()
    return out, lse


def drawn(tokens, *, heads=4, kv=2, d=8, keys=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, d), (keys or tokens, kv, d), (keys or tokens, kv, d)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def same_document(lengths):
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    return lambda i, j: owner[i] == owner[j] and j <= i


LENGTHS = [(7,), (1, 1, 1), (3, 3, 5, 1, 9), (4, 0, 4)]


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_are_causal_and_apart(lengths, kv):
    q, k, v = drawn(sum(lengths), kv=kv)
    expected = brute_force(q, k, v, same_document(lengths))
    torch.testing.assert_close(kernels.documents(q, k, v, lengths), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_documents_in_lower_precision_keep_a_wide_log_sum_exp(dtype, tolerance):
    q, k, v = drawn(24, dtype=dtype)
    out, lse = kernels.documents(q, k, v, (10, 14))
    expected, expected_lse = brute_force(q.double(), k.double(), v.double(), same_document((10, 14)))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_of_documents_are_those_of_brute_force(lengths, kv):
    tensors = drawn(sum(lengths), kv=kv)
    weight = torch.randn_like(tensors[0])
    grads = []
    for attention in (kernels.documents, lambda q, k, v, lengths: brute_force(q, k, v, same_document(lengths))):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        (attention(q, k, v, lengths)[0] * weight).sum().backward()
        grads.append([q.grad, k.grad, v.grad])
    torch.testing.assert_close(*grads)


def test_masked_looks_where_the_mask_says():
    q, k, v = drawn(6, keys=9)
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[:, 2] = True
    torch.testing.assert_close(kernels.masked(q, k, v, mask), brute_force(q, k, v, lambda i, j: bool(mask[i, j])))


def test_masked_widens_half_precision_only():
    for dtype, wide in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        q, k, v = drawn(5, dtype=dtype)
        out, lse = kernels.masked(q, k, v, kernels.same_document((5,)))
        assert (out.dtype, lse.dtype) == (dtype, wide)


@pytest.mark.parametrize("bias", [None, "row", "full"])
def test_batched_is_masked_row_by_row(bias):
    rows = [drawn(3, keys=7, seed=seed) for seed in range(4)]
    masks = torch.ones(4, 3, 7, dtype=torch.bool)
    if bias:
        masks = torch.rand(4, 1 if bias == "row" else 3, 7, generator=torch.Generator().manual_seed(1)) > 0.4
        masks[..., 0] = True
    expected = [kernels.masked(*row, mask.expand(3, 7)) for row, mask in zip(rows, masks, strict=True)]
    scores = torch.zeros(masks.shape).masked_fill(~masks, -math.inf) if bias else None
    q, k, v = (torch.stack(x) for x in zip(*rows, strict=True))
    out, lse = kernels.batched(q, k, v, scores)
    torch.testing.assert_close(out, torch.stack([row for row, _ in expected]))
    torch.testing.assert_close(lse, torch.stack([row for _, row in expected]))


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_two_blocks_of_keys_merge_to_the_whole(cut):
    q, k, v = drawn(5, keys=9)
    everything = kernels.masked(q, k, v, torch.ones(5, 9, dtype=torch.bool))
    blocks = [kernels.batched(q[None], k[None, part], v[None, part]) for part in (slice(cut), slice(cut, None))]
    merged = kernels.merge(*[(out[0], lse[0]) for out, lse in blocks])
    torch.testing.assert_close(merged, everything)


def test_merging_with_a_block_nobody_sees_changes_nothing():
    q, k, v = drawn(5)
    block = kernels.documents(q, k, v, (5,))
    nothing = (torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=q.dtype))
    torch.testing.assert_close(kernels.merge(block, nothing), block)


def ancestors(parents, node):
    while node >= 0:
        yield node
        node = parents[node]


@pytest.mark.parametrize("seed", range(5))
def test_tree_mask_sees_ancestors(seed):
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(30)]
    mask = kernels.tree_mask(torch.tensor(parents), 30)
    for node in range(30):
        assert mask[node].nonzero()[:, 0].tolist() == sorted(ancestors(parents, node))
    assert torch.equal(kernels.tree_mask(torch.tensor(parents), 4), mask[-4:])


def test_a_parent_must_stand_before_its_children():
    with pytest.raises(ValueError, match="node 1 stands before its parent 2"):
        kernels.tree_mask(torch.tensor([-1, 2, 0]), 3)
