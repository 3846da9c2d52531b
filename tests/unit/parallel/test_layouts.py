"""A few layouts on two and four processes; tests/e2e/test_layouts.py has the others."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOLERANCE = 1e-5


def _load():
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).parent / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()

TWO = {
    "fsdp": {},
    "replicate": {"replicate": 2, "micro_batch": 3},
    "tensor": {"tensor": 2},
    "pipeline-1f1b": {"pipeline": 2},
    "pipeline-zero-bubble": {"pipeline": 2, "schedule": "zero-bubble"},
    "fsdp-selective": {"recompute": "selective"},
}
MICRO = {
    "zero 3": {"micro_batch": 1},
    "zero 2": {"micro_batch": 1, "zero": 2},
    "zero 1": {"micro_batch": 1, "zero": 1},
}
HALVED = ("zero 3", "zero 1")
FOUR = {
    "fsdp-tensor": {"tensor": 2},
    "hsdp": {"replicate": 2},
    "hsdp-in-micro-batches": {"replicate": 2, "micro_batch": 1},
    "pipeline-tensor": {"pipeline": 2, "tensor": 2},
}
TIED = {
    2: {
        "tied": {"tensor": 2},
        "tied-pipeline": {"pipeline": 2},
    },
    4: {
        "tied-pipeline-zero-3": {"pipeline": 2, "micro_batch": 1, "zero": 3},
    },
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    where = tmp_path_factory.mktemp("alone")
    orders = [{"name": "alone"}, {"name": "tied", "shape": {"tied": True}}, {"name": "bfloat16", "stage": HALF}]
    return layouts.run([*orders, SHORT], processes=1, where=where)


HALF = {"precision": "bfloat16"}


SHORT = {"name": "epochs", "stage": {"steps": None, "epochs": 1, "batch": 7, "dropout": {"hidden": 0.2}}}
"""The last step has fewer rows than there are processes."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    orders = [{"name": name, "parallel": parallel} for name, parallel in TWO.items()]
    orders += [{"name": name, "parallel": parallel, "probe": False} for name, parallel in MICRO.items()]
    orders += [{"name": f"bfloat16 {name}", "stage": HALF, "parallel": MICRO[name]} for name in HALVED]
    orders += [{"name": name, "shape": {"tied": True}, "parallel": parallel} for name, parallel in TIED[2].items()]
    return layouts.run([*orders, SHORT], processes=2, where=tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    orders = [{"name": name, "parallel": parallel} for name, parallel in FOUR.items()]
    orders += [{"name": name, "shape": {"tied": True}, "parallel": parallel} for name, parallel in TIED[4].items()]
    return layouts.run([*orders, SHORT], processes=4, where=tmp_path_factory.mktemp("four"))


def assert_same(result, expected):
    found = layouts.differences(result, expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", TWO)
def test_a_layout_of_two_processes_gives_what_one_process_gives(two, expected, name):
    assert_same(two[name], expected["alone"])


@pytest.mark.parametrize("name", FOUR)
def test_a_layout_of_four_processes_gives_what_one_process_gives(four, expected, name):
    assert_same(four[name], expected["alone"])


@pytest.mark.parametrize(("processes", "name"), [(number, name) for number, found in TIED.items() for name in found])
def test_a_tied_head_is_spread_with_its_embedding(two, four, expected, processes, name):
    assert_same({2: two, 4: four}[processes][name], expected["tied"])


def test_a_last_step_with_too_few_rows_for_all_is_the_same(two, four, expected):
    assert len(expected["epochs"].lines) > 3
    assert_same(two["epochs"], expected["epochs"])
    assert_same(four["epochs"], expected["epochs"])


@pytest.mark.parametrize("name", MICRO)
def test_accumulated_gradients_are_those_of_the_whole_batch(two, expected, name):
    assert_same(two[name], expected["alone"])


def test_zero_decides_how_often_weights_are_fetched_and_gradients_summed(two, four):
    layers, groups, steps, micros = 4, 4 + 1, 3, 4
    once = groups * steps
    calls = {name: two[name].calls for name in MICRO}
    sums = {name: counted["reduce_scatter"] for name, counted in calls.items()}
    assert sums == {"zero 3": micros * once, "zero 2": micros * once, "zero 1": once}
    # the outermost weights stay between forward and backward pass; validation is twice as many rows as go at a time
    fetched = {name: counted["all_gather"] for name, counted in calls.items()}
    looks = 2 * (1 + micros * layers)
    assert fetched == {
        "zero 3": micros * (once + layers * steps) + looks,
        "zero 2": once + 2 * groups,
        "zero 1": once + 2 * groups,
    }
    # four rows are two micro-batches of two devices: their sums cross the copies once
    assert four["hsdp-in-micro-batches"].calls["all_reduce"] == four["hsdp"].calls["all_reduce"]


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_weights_that_are_fetched_are_as_good_as_those_that_are_there(two, expected, name):
    here = layouts.differences(expected["bfloat16"], expected["alone"], rounded=True)
    there = layouts.differences(two[f"bfloat16 {name}"], expected["alone"], rounded=True)
    assert 1e-5 < here["loss"] < 1e-3  # it is bfloat16
    for what in ("loss", "validation_loss", "grad_norm", "weights"):
        assert there[what] < 5 * here[what] + 1e-4, what
    assert layouts.differences(two[f"bfloat16 {name}"], expected["bfloat16"], rounded=True)["loss"] < 2e-3
