import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.corpus.packing import best_fit_decreasing
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"


def naive(lengths, capacity):
    """Best fit decreasing, looking at every row for every document; of equal rows the one filled last."""
    rows, free, filled = [], [], []
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[document]
        if length == 0:
            continue
        fitting = [row for row in range(len(rows)) if free[row] >= length]
        if fitting:
            row = min(fitting, key=lambda row: (free[row], -filled[row]))
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
            filled.append(0)
        rows[row].append(document)
        free[row] -= length
        filled[row] = sum(map(len, rows))
    return rows


def packed(lengths, capacity):
    return [row.tolist() for row in best_fit_decreasing(np.asarray(lengths), capacity)]


def totals(rows, lengths):
    return sorted(sum(int(lengths[document]) for document in row) for row in rows)


@settings(max_examples=300)
@given(st.data())
def test_the_rows_are_those_of_the_naive_method(data):
    capacity = data.draw(st.integers(1, 40))
    most = data.draw(st.integers(0, capacity))  # few lengths, so that many documents share one
    lengths = np.asarray(data.draw(st.lists(st.integers(0, most), max_size=80)), dtype=np.int64)
    rows = packed(lengths, capacity)
    assert rows == naive(lengths, capacity)
    assert sorted(document for row in rows for document in row) == [
        document for document, length in enumerate(lengths) if length
    ]
    assert all(total <= capacity for total in totals(rows, lengths))


def test_the_rows_of_many_documents_are_those_of_the_naive_method():
    lengths = np.random.default_rng(0).lognormal(3.5, 1.0, 2000).astype(np.int32).clip(0, 512)
    assert packed(lengths, 512) == naive(lengths.tolist(), 512)


def test_rows_say_where_they_begin():
    rows = best_fit_decreasing(np.asarray([6, 4, 7, 3, 5]), 10)
    assert (rows.documents.tolist(), rows.offsets.tolist()) == ([2, 3, 0, 1, 4], [0, 2, 4, 5])
    assert rows[2].tolist() == [4]
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]


def test_a_document_goes_to_the_fullest_row_that_has_room():
    # 7 and 6 open rows; 3 fills the first exactly, 4 the second
    assert packed([6, 4, 7, 3], 10) == [[2, 3], [0, 1]]


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_real_lengths_fill_the_rows(capacity):
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).astype(np.int64).clip(2, capacity)
    rows = best_fit_decreasing(lengths, capacity)
    assert lengths.sum() / (len(rows) * capacity) >= 0.98
    assert max(totals(rows, lengths)) <= capacity


def test_the_same_lengths_give_the_same_rows():
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    assert packed(lengths, 100) == packed(lengths.copy(), 100)


def test_nothing_gives_no_rows():
    assert packed(np.zeros(0, np.int64), 8) == []
    assert packed(np.zeros(3, np.int64), 8) == []


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into 8"):
        best_fit_decreasing(np.asarray([9]), 8)


def test_rows_of_real_chats_are_full():
    if not SHARED.exists():
        pytest.skip(f"no data at {SHARED} (set LLAMERO_SHARED)")
    tokenizer = load_tokenizer(SHARED / "tokenizers/llama2")
    rows = json.loads((SHARED / "instruct/alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = ["\n".join(map(str, row.values())) for row in rows]
    rows = json.loads((SHARED / "instruct/lima/lima.json").read_text(encoding="utf-8"))
    texts += ["\n".join(map(str, row.values())) for row in rows]
    lengths = np.asarray([len(ids) for ids in tokenizer.encode_batch(texts)]).clip(max=4096)
    assert lengths.sum() / (len(best_fit_decreasing(lengths, 4096)) * 4096) >= 0.98
