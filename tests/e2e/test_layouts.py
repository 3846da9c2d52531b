"""Many layouts on two, four and eight processes: losses, gradient norms and weights are those of one process."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _load():
    path = Path(__file__).parents[1] / "unit" / "parallel" / "layouts.py"
    spec = importlib.util.spec_from_file_location("layouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()

LAYOUTS = {
    2: {
        "fsdp in micro-batches": {"micro_batch": 1},
        "fsdp, offloaded": {"recompute": "full", "offload": True},
        "tensor, whole sequences": {"tensor": 2, "sequence_parallel": False},
        "gpipe": {"pipeline": 2, "schedule": "gpipe"},
        "interleaved": {"pipeline": 2, "schedule": "interleaved"},
        "tensor, recomputed": {"tensor": 2, "recompute": "selective"},
        "fsdp, compiled": {"compile": True},
        "zero-bubble": {"pipeline": 2, "schedule": "zero-bubble"},
    },
    4: {
        "fsdp": {},
        "hsdp": {"replicate": 2},
        "replicate": {"replicate": 4},
        "fsdp × tensor": {"tensor": 2, "recompute": "full"},
        "pipeline × tensor": {"pipeline": 2, "tensor": 2, "schedule": "gpipe"},
        "pipeline × fsdp": {"pipeline": 2, "schedule": "1f1b", "recompute": "full"},
        "pipeline × fsdp, interleaved": {"pipeline": 2, "schedule": "interleaved"},
        "pipeline × fsdp in micro-batches": {"pipeline": 2, "micro_batch": 1},
        "pipeline of four": {"pipeline": 4, "micro_batch": 2},
    },
    8: {
        "pipeline × fsdp × tensor": {"pipeline": 2, "tensor": 2},
        "hsdp × tensor": {"replicate": 2, "tensor": 2},
    },
}
TIED = {
    2: {
        "tied fsdp": {},
        "tied zero-bubble": {"pipeline": 2, "schedule": "zero-bubble"},
        "tied interleaved": {"pipeline": 2, "schedule": "interleaved"},
    },
    4: {
        "tied pipeline × tensor": {"pipeline": 2, "tensor": 2},
        "tied pipeline × fsdp": {"pipeline": 2, "micro_batch": 1},
        "tied pipeline of four": {"pipeline": 4, "micro_batch": 2},
        "tied pipeline × fsdp, offloaded": {"pipeline": 2, "offload": True},
        "tied pipeline × replicate": {"pipeline": 2, "replicate": 2, "schedule": "zero-bubble"},
        "tied pipeline × tensor, whole sequence": {"pipeline": 2, "tensor": 2, "sequence_parallel": False},
    },
    8: {"tied pipeline × fsdp × tensor": {"pipeline": 2, "tensor": 2, "zero": 3}},
}
"""Layouts of a model whose head is its embedding."""
SAMPLES = {"name": "samples", "stage": {"batch": 17, "batch_samples": 17}}
"""Steps of as many samples, and so of different numbers of rows."""
CASES = [(processes, name) for processes, found in LAYOUTS.items() for name in found]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    where = tmp_path_factory.mktemp("alone")
    return layouts.run(
        [{"name": "alone"}, {"name": "tied", "shape": {"tied": True}}, SAMPLES], processes=1, where=where
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what came of an order; those of as many processes run in one go."""
    found = {}

    def get(processes, name):
        if processes not in found:
            orders = [{"name": key, "parallel": value} for key, value in LAYOUTS[processes].items()]
            tied = TIED.get(processes, {}).items()
            orders += [{"name": key, "shape": {"tied": True}, "parallel": value} for key, value in tied]
            orders += [SAMPLES | {"parallel": {"pipeline": 2}}] if processes == 4 else []
            where = tmp_path_factory.mktemp("layouts")
            found[processes] = layouts.run(orders, processes=processes, where=where)
        return found[processes][name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), CASES)
def test_a_layout_gives_what_one_process_gives(results, expected, processes, name):
    found = layouts.differences(results(processes, name), expected["alone"])
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(number, name) for number, found in TIED.items() for name in found])
def test_a_tied_head_is_spread_with_its_embedding(results, expected, processes, name):
    found = layouts.differences(results(processes, name), expected["tied"])
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_steps_of_as_many_samples_are_the_same_in_a_pipeline(results, expected):
    found = layouts.differences(results(4, "samples"), expected["samples"])
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_lengths_of_documents(tmp_path):
    stage = {"dropout": {"hidden": 0.2}, "steps": 6}
    ways = {"plain": {}, "compiled": {"compile": True}, "selective": {"compile": True, "recompute": "selective"}}
    orders = [{"name": name, "stage": stage, "parallel": parallel} for name, parallel in ways.items()]
    found = layouts.run(orders, processes=1, where=tmp_path)
    for name in ("compiled", "selective"):
        assert max(layouts.differences(found[name], found["plain"]).values()) < 1e-5
        # one program for training and one for validation, for four layers and six steps of other lengths; and one
        # more where the first sizes happen to be equal that later are not
        assert 2 <= found[name].calls["graphs"] <= 3
        assert not found[name].calls["breaks"]
