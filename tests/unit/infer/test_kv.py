"""The paged cache: rows come and go, nothing is lost, nothing is shared, and a full pool says so."""

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.infer.kv import PagedCache
from llamero.model.config import LlamaConfig
from llamero.model.rope import Default

CONFIG = LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rope=Default(10000.0, 4),
    max_position_embeddings=64,
)


def cache(**options):
    return PagedCache(CONFIG, dtype=torch.float32, page=4, **{"pages": 2, **options})


class Mirror:
    """The obvious cache: one tensor for each row and layer, beside the one under test."""

    def __init__(self, paged):
        self.paged, self.rows, self.count = paged, {}, 0

    def add(self):
        row = self.paged.add()
        self.rows[row] = [torch.empty(0, 1, 4) for _ in range(2)]
        return row

    def remove(self, row):
        self.paged.remove(row)
        del self.rows[row]

    def write(self, rows, new):
        layout = self.paged.reserve(rows, new)
        for layer in range(2):
            self.count += 1
            k = torch.randn(sum(new), 1, 4, generator=torch.Generator().manual_seed(self.count))
            keys, values = self.paged.extend(layer, k, -k)
            for index, (row, part) in enumerate(zip(rows, k.split(new), strict=True)):
                self.rows[row][layer] = torch.cat((self.rows[row][layer], part))
                assert torch.equal(layout.gather(keys, index), self.rows[row][layer])
                assert torch.equal(layout.gather(values, index), -self.rows[row][layer])


def test_rows_come_grow_and_go():
    mirror = Mirror(cache())
    a, b = mirror.add(), mirror.add()
    mirror.write([a, b], [3, 9])
    mirror.write([b, a], [1, 1])
    mirror.write([a], [7])
    mirror.remove(a)
    c = mirror.add()
    mirror.write([c, b], [6, 2])
    assert mirror.paged.rows == (b, c)
    assert (mirror.paged.length(b), mirror.paged.length(c)) == (12, 6)


def test_random_traffic():
    generator = torch.Generator().manual_seed(0)
    mirror = Mirror(cache(pages=1))
    for _ in range(60):
        rows = list(mirror.rows)
        if len(rows) < 4:
            rows.append(mirror.add())
        if len(rows) > 2 and torch.rand((), generator=generator) < 0.2:
            mirror.remove(rows.pop(1))
        new = torch.randint(1, 6, (len(rows),), generator=generator).tolist()
        mirror.write(rows, new)
    used = sum(-(-mirror.paged.length(row) // 4) for row in mirror.paged.rows)
    assert mirror.paged.free_pages == mirror.paged.pages - used


def test_pages_of_a_removed_row_are_used_again():
    paged = cache(pages=2, limit=2)
    for _ in range(5):
        row = paged.add()
        paged.reserve([row], [8])
        paged.remove(row)
    assert paged.free_pages == 2


def test_a_full_pool_says_so_and_changes_nothing():
    paged = cache(pages=2, limit=3)
    a, b = paged.add(), paged.add()
    paged.reserve([a, b], [4, 5])
    with pytest.raises(LlameroError, match=r"2 more pages of 4 tokens are needed, 0 of 3 are left") as error:
        paged.reserve([a, b], [1, 4])
    assert "fewer or shorter" in str(error.value)
    assert (paged.length(a), paged.length(b)) == (4, 5)
    paged.reserve([b], [3])  # there is still room on the last page


def test_a_row_is_written_once_in_a_pass():
    paged = cache()
    row = paged.add()
    with pytest.raises(ValueError, match="must differ"):
        paged.reserve([row, row], [1, 1])
    with pytest.raises(ValueError, match="at least one"):
        paged.reserve([row], [0])
