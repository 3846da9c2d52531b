"""Kill a stage at any moment: the next run ends in the same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.engine import metrics

STAGE = {"name": "tiny", "mixture": "chat", "sequence": 64, "batch": 4, "steps": 6, "lr": 1e-2, "warmup": 2}
STAGE |= {"save_every": 2, "eval_every": 3, "learn": {"user": 0.5}}


class Victims:
    def __init__(self, process, data, tokenizer):
        self._process = process
        self._about = {"data": str(data), "tokenizer": str(tokenizer)}

    def run(self, root, *, number=0, at=0, largest_file=0, **changes):
        order = {"root": str(root), "stage": STAGE | changes, "signal": int(number), "at": at}
        self._process.stdin.write(json.dumps(self._about | order | {"largest_file": largest_file}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def victims(data, tokenizer_files):
    command = [sys.executable, str(Path(__file__).parent / "victim.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Victims(process, data, tokenizer_files)


def artifact_of(root):
    (found,) = [path for path in root.iterdir() if path.is_dir() and not path.name.endswith(".partial")]
    assert not list(root.glob("*.partial"))
    return found


def decided(root):
    """Everything in the artifact that must not depend on interruptions."""
    directory = artifact_of(root)
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl"
    }
    return files, [metrics.decided(line) for line in metrics.read_lines(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(victims, tmp_path_factory):
    """An uninterrupted run: what it made, and in how many events."""
    root = tmp_path_factory.mktemp("whole")
    said = victims.run(root)
    assert said["state"] == "made"
    return decided(root), said["events"]


def test_an_uninterrupted_run_writes_each_step_once_and_keeps_no_checkpoints(whole):
    (files, lines), events = whole
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert not [name for name in files if "checkpoint" in name]
    assert {"model.safetensors", "config.json", "tokenizer.json", "artifact.json"} <= files.keys()
    assert events > 80


@pytest.mark.parametrize("share", range(20))
def test_killed_at_any_moment_the_next_run_ends_in_the_same_bytes(victims, whole, tmp_path, share):
    expected, events = whole
    at = 1 + share * (events - 1) // 19  # the first event, the last, and those between
    assert victims.run(tmp_path, number=signal.SIGKILL, at=at) == {"state": "killed"}
    assert victims.run(tmp_path)["state"] in ("made", "found")
    assert decided(tmp_path) == expected


def test_killed_again_and_again_it_still_ends_in_the_same_bytes(victims, whole, tmp_path):
    expected, events = whole
    said = {"state": ""}
    for at in (events // 2, 5, events // 4, 30, events // 3, 60):
        said = victims.run(tmp_path, number=signal.SIGKILL, at=at)
    assert said["state"] in ("killed", "made")
    assert victims.run(tmp_path)["state"] in ("made", "found")
    assert decided(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_where(victims, whole, tmp_path, number):
    said = victims.run(tmp_path, number=number, at=5)
    assert said["state"] == "interrupted"
    assert said["says"].startswith("stage tiny is saved after step ")
    (partial,) = tmp_path.glob("*.partial")
    step = int(said["says"].split("step ")[1].split()[0])
    assert (partial / f"checkpoints/step-{step:08}/state.json").exists()
    assert victims.run(tmp_path)["state"] == "made"
    assert decided(tmp_path) == whole[0]


def test_interrupted_in_its_last_step_it_stops_before_the_next_stage(victims, whole, tmp_path):
    said = victims.run(tmp_path, number=signal.SIGINT, at=5, steps=1, warmup=0)
    assert said == {"state": "interrupted", "says": "stage tiny is saved after step 1 of 1"}
    assert victims.run(tmp_path, steps=1, warmup=0)["state"] == "made"


@pytest.mark.parametrize("largest", [500, 30_000], ids=["metrics", "checkpoint"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(victims, whole, tmp_path, largest):
    said = victims.run(tmp_path, largest_file=largest)
    assert said["state"] == "error"
    assert "no room to write" in said["says"]
    assert str(tmp_path / "train-tiny-") in said["says"]
    assert "free some space and run the same command again" in said["says"]
    assert victims.run(tmp_path)["state"] == "made"
    assert decided(tmp_path) == whole[0]


def test_a_finished_run_is_found_and_not_made_again(victims, tmp_path):
    assert victims.run(tmp_path, steps=1, warmup=0)["state"] == "made"
    before = decided(tmp_path)
    assert victims.run(tmp_path, steps=1, warmup=0) == {"state": "found"}
    assert decided(tmp_path) == before
