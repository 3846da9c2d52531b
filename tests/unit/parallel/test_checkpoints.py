"""Checkpoints of several processes: exact in the same layout, readable in any other, whole or not there."""

import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from llamero.engine.metrics import decided


def _load():
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).parent / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


layouts = _load()
STAGE = {"steps": 6, "save_every": 2, "warmup": 2}


def order(name, directory=None, *, tied=False, **keys):
    about = {"name": name, "stage": STAGE, "shape": {"tied": tied}, **keys}
    return about if directory is None else about | {"directory": str(directory)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def whole(root):
    """The runs that nothing happens to, on one process."""
    return layouts.run([order("whole"), order("tied", tied=True)], processes=1, where=root / "one")


def cut(where, directory, *, processes, number, parallel=None, rank=1, step=5, **about):
    """Start a run of which one process is hit by a signal; return how they ended."""
    stop = {"rank": rank, "signal": int(number), "step": step}
    keys = {"parallel": {"timeout": 5} | (parallel or {}), "stop": stop}
    running = layouts.start([order("cut", directory, **about, **keys)], processes=processes, where=where)
    return layouts.end(running)


def assert_same_bits(one, other):
    assert [decided(line) for line in one.lines] == [decided(line) for line in other.lines]
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name


def kept(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir() if not path.name.endswith(".partial"))


def test_killed_on_one_process_a_run_ends_in_the_same_bits_and_the_dead_one_is_named(root):
    ended = cut(root / "kill", root / "killed", processes=2, number=signal.SIGKILL)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] in (2, 70), ended[0][1]
    assert "rank 1 (host" in ended[0][1]
    assert kept(root / "killed")[0] == "step-00000002"  # that of step 4 was perhaps still being written
    said = layouts.run([order("again", root / "killed"), order("calm")], processes=2, where=root / "kill")
    assert_same_bits(said["again"], said["calm"])


def test_asked_to_stop_on_one_process_all_save_the_same_step(root, whole):
    stopped = root / "stopped"
    ended = cut(root / "stop", stopped, processes=2, number=signal.SIGTERM, parallel={"tensor": 2}, step=3)
    assert [code for code, _ in ended] == [130, 130]
    assert all("saved after step 3 of 6" in said for _, said in ended)
    assert kept(stopped)[-1] == "step-00000003"
    resumed = layouts.run([order("again", stopped)], processes=1, where=root / "alone")["again"]
    assert max(layouts.differences(resumed, whole["whole"]).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "four"),
    [
        ("whole", {"pipeline": 2, "tensor": 2}),
        pytest.param("tied", {"pipeline": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("tied", {"pipeline": 2, "zero": 3}, marks=pytest.mark.slow),
        pytest.param("tied", {"pipeline": 4, "micro_batch": 2}, marks=pytest.mark.slow),
    ],
)
def test_four_processes_then_two_then_one_go_on_from_each_other(root, whole, name, four, tmp_path):
    tied, shared = name == "tied", tmp_path / "shared"
    keys = {"number": signal.SIGTERM, "rank": 0, "tied": tied}
    ended = cut(tmp_path / "four", shared, processes=4, parallel=four, step=8, **keys)
    assert {code for code, _ in ended} == {130}
    first = json.loads((shared / "checkpoints" / kept(shared)[-1] / "state.json").read_text())["step"]
    ended = cut(tmp_path / "two", shared, processes=2, step=2, **keys)
    assert {code for code, _ in ended} == {130}
    assert kept(shared)[-1] == f"step-{first + 2:08}"
    last = layouts.run([order("last", shared, tied=tied)], processes=1, where=tmp_path / "last")["last"]
    assert [line["step"] for line in last.lines] == [1, 2, 3, 4, 5, 6]
    assert max(layouts.differences(last, whole[name]).values()) < 1e-5


@pytest.mark.slow
def test_a_damaged_file_is_named_on_every_process(root):
    stopped = root / "damaged"
    cut(root / "damage", stopped, processes=2, number=signal.SIGTERM, step=1)
    last = stopped / "checkpoints" / kept(stopped)[-1]
    file = last / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    ended = layouts.end(layouts.start([order("again", stopped)], processes=2, where=root / "damage"))
    assert [code for code, _ in ended] == [2, 2]
    assert all("__1_0.distcp: not what was written" in said for _, said in ended)
    shutil.rmtree(last)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_and_the_run_ends(root):
    stop = {"rank": 1, "signal": int(signal.SIGSTOP), "step": 2}
    orders = [order("stands", parallel={"timeout": 3}, stop=stop)]
    running = layouts.start(orders, processes=2, where=root / "stands")
    try:
        _, said = running[0].communicate(timeout=60)
    finally:
        running[1].kill()
    running[1].communicate()
    assert running[0].returncode == 70
    assert "rank 1 (host " in said
    assert "has been silent for" in said
