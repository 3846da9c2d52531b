"""Multiple choice: what the likeliest answer is, and how sure the mean is."""

import math
import statistics

import pytest

from llamero.core.errors import LlameroError
from llamero.infer.choices import Item, Mean, accuracy, likeliest, mean, verdict


def test_the_first_of_equals_is_likeliest():
    assert likeliest([-2.0, -1.0, -1.0]) == 1
    assert likeliest([-math.inf, -math.inf]) == 0


def test_not_a_number_is_never_ranked():
    with pytest.raises(LlameroError, match="not a number"):
        likeliest([-1.0, math.nan])


def test_characters_are_code_points():
    item = Item(("ab", "äöüß"), answer=1)  # 4 characters, 8 bytes
    assert verdict(item, [-2.0, -3.9]).acc == 0.0
    assert verdict(item, [-2.0, -3.9]).acc_norm == 1.0  # -1 against -0.975; per byte -1 against -0.49
    assert verdict(item, [-2.0, -4.1]).acc_norm == 0.0


def test_categories_are_counted_apart():
    items = [Item(("a", "b"), 0, "x"), Item(("a", "b"), 1, "x"), Item(("a", "b"), 1, "y")]
    found = accuracy(items, [[-1, -2], [-1, -2], [-2, -1]])
    assert found.acc.value == pytest.approx(2 / 3)
    assert found.by_category["x"] == Mean(0.5, 0.5, 2)
    assert found.by_category["y"] == Mean(1.0, None, 1)


def test_the_standard_error_is_that_of_the_mean():
    values = [1.0, 0.0, 0.25, 1.0, 1.0]
    found = mean(values)
    assert found.value == pytest.approx(statistics.mean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 log-likelihoods for 2 choices"):
        verdict(Item(("a", "b"), 0), [-1.0])
    with pytest.raises(ValueError, match="shorter"):
        accuracy([Item(("a", "b"), 0)], [])
    with pytest.raises(ValueError, match="no questions"):
        mean([])
