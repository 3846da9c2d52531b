"""However a forest is cut into blocks, each query sees each key that it may see once, and no other."""

import numpy as np
import pytest
import torch

from llamero.kernels.attention import tree_mask
from llamero.model.tree_blocks import CPU, CUDA, Prices, blocks


def seen(found, keys, queries):
    """Return how often each query sees each key."""
    count = np.zeros((keys, keys), dtype=int)
    for block in found:
        (start, stop), (begin, end) = block.queries, block.keys
        if block.mask is not None:
            count[start:stop, begin:end] += block.mask
        elif block.lengths:
            assert block.queries == block.keys
            assert sum(block.lengths) == stop - start
            for length in block.lengths:
                count[start : start + length, start : start + length] += np.tri(length, dtype=int)
                start += length
        else:
            count[start:stop, begin:end] += 1
    return count[keys - queries :]


def preorder(rng, path, nodes, branch):
    """Return parents of a path and a forest whose nodes come as a walk in depth meets them."""
    parents = list(range(-1, path - 1))
    way = list(range(path))
    for node in range(path, path + nodes):
        if rng.random() < branch:
            way = way[: rng.integers(0, len(way) + 1)]
        parents.append(way[-1] if way else -1)
        way.append(node)
    return parents


FREE = Prices(0, 0, 0)


@pytest.mark.parametrize("prices", [CPU, CUDA, FREE, Prices(0, 0, 3), Prices(20, 1, 0), Prices(20, 1, 48)])
@pytest.mark.parametrize("branch", [0.02, 0.2, 0.6])
def test_every_walk_is_covered_once(prices, branch):
    rng = np.random.default_rng(7)
    for path, nodes in ((0, 1), (0, 60), (1, 90), (50, 40), (7, 200)):
        parents = preorder(rng, path, nodes, branch)
        found = blocks(parents, nodes, prices)
        assert found is not None
        assert (seen(found, path + nodes, nodes) == tree_mask(torch.tensor(parents), nodes).numpy()).all()
        assert [block.own for block in found] == sorted((block.own for block in found), reverse=True)
        own = sorted(block.queries for block in found if block.own)
        assert [start for start, _ in own] == [path, *(stop for _, stop in own[:-1])]


@pytest.mark.parametrize("prices", [CPU, FREE, Prices(0, 0, 2)])
def test_any_order_with_parents_first_is_covered_once(prices):
    rng = np.random.default_rng(3)
    for size in (5, 30, 80):
        parents = [int(rng.integers(-1, node)) if node else -1 for node in range(size)]
        found = blocks(parents, size, prices)
        assert found is not None
        assert (seen(found, size, size) == tree_mask(torch.tensor(parents), size).numpy()).all()


def test_keys_that_do_not_ask_and_branch_need_a_mask():
    assert blocks([-1, 0, 0, 2], 1) is None


def test_a_long_stem_is_seen_without_a_mask():
    """A path of 500, a question of 300 and four answers of 20: the stems are seen whole, the answers causally."""
    answers = [parent for n in range(4) for parent in (799, *range(800 + 20 * n, 819 + 20 * n))]
    found = blocks([*range(-1, 799), *answers], 380)
    assert found is not None
    masks = sum(block.mask.size for block in found if block.mask is not None)
    assert masks <= 60 * 380  # those that do not follow the question directly, after the question
    assert [block.keys for block in found if not block.own] == [(0, 500)]


def test_questions_after_a_stem_are_documents():
    """Forty questions of 50 tokens after examples of 600: one call for the examples, one for the questions."""
    questions = [parent for n in range(40) for parent in (599, *range(600 + 50 * n, 649 + 50 * n))]
    found = blocks([*range(-1, 599), *questions], 2000)
    assert found is not None
    assert [(block.own, block.lengths) for block in found] == [(True, (50,) * 40), (False, ())]
