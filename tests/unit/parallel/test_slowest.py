"""Of several processes the slowest is named, with the time that it took."""

import importlib.util
import sys
from pathlib import Path


def _load():
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).parent / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()


def test_the_process_that_waits_for_its_data_is_named(tmp_path):
    order = {"name": "slow", "stage": {"steps": 1}, "slow": 1, "probe": False}
    (line,) = layouts.run([order], processes=2, where=tmp_path)["slow"].lines
    assert line["slowest/data"] == 1
    assert line["time/data"] >= 1.5
    assert {key.partition("/")[2] for key in line if key.startswith("time/")} >= {"data", "forward_backward", "clip"}
