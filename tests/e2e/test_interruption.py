"""Kill one process or all at any moment: no finished checkpoint is lost, and the next run ends in the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamero.data.config import DataConfig, MixtureConfig
from llamero.data.run import tokenize_mixture
from llamero.data.vocabulary import prepare_tokenizer
from llamero.engine import metrics
from llamero.text.tokenizer import train_bpe

STAGE = {"name": "tiny", "mixture": "chat", "sequence": 64, "batch": 8, "steps": 7, "lr": 1e-2, "warmup": 2}
STAGE |= {"save_every": 2, "eval_every": 3, "learn": {"user": 0.5}, "dropout": {"hidden": 0.1}}
LAYOUTS = {2: {"gpus": 2}, 4: {"gpus": 4, "pipeline": 2}}
MOMENTS = 10


class Victims:
    def __init__(self, process, **about):
        self._process, self._about = process, about

    def run(self, root, parallel, *, number=0, rank=-1, at=("", 0), everyone=False, full="", **changes):
        order = {"root": str(root), "stage": STAGE | changes, "parallel": parallel, "signal": int(number), "rank": rank}
        order |= {"at": at, "everyone": everyone, "full": full}
        self._process.stdin.write(json.dumps(self._about | order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("base", "tokenizer", "mixture"):
        (root / name).mkdir()
    train_bpe(iter(["the cat sat on the mat and the dog sat on the log\n"] * 3), vocab_size=265).save(root / "base")
    config = DataConfig(extra_tokens=["<|im_start|>", "<|im_end|>"])
    prepare_tokenizer(config, root / "base", template="chatml", root=root, out=root / "tokenizer")
    rows = [f'{{"instruction": "cat {n}", "output": "the dog {n * n}"}}' for n in range(60)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    mixture = MixtureConfig.model_validate({"sources": [{"source": "rows", "path": "rows.jsonl", "val_split": 0.1}]})
    about = {"tokenizer": root / "tokenizer", "template": "chatml", "root": root, "seed": 1}
    tokenize_mixture("chat", mixture, out=root / "mixture", **about)
    command = [sys.executable, str(Path(__file__).parent / "victims.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Victims(process, data=str(root / "mixture"), tokenizer=str(root / "tokenizer"))


def decided(root):
    """Everything in the artifact that must not depend on interruptions."""
    (directory,) = root.iterdir()
    assert not directory.name.endswith(".partial")
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl"
    }
    return files, [metrics.decided(line) for line in metrics.read_lines(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(victims, tmp_path_factory):
    """What a run makes that nothing happens to, and all that each of its processes does; by number of processes."""
    found = {}

    def get(processes):
        if processes not in found:
            root = tmp_path_factory.mktemp("whole")
            said = victims.run(root, LAYOUTS[processes])
            assert [one["state"] for one in said] == ["made"] * processes, said
            found[processes] = decided(root), [one["events"] for one in said]
        return found[processes]

    return get


def moment(events, number):
    """Return rank, event and which of them: the first in a save, the second in the export, the others anywhere."""
    choose = random.Random(number)
    if number == 0:
        rank = choose.randrange(len(events))
        return rank, ("write_data", choose.randint(2, events[rank]["write_data"]))
    if number == 1:
        return 0, ("add", choose.randint(1, events[0]["add"]))
    rank = choose.randrange(len(events))
    name = choose.choice(sorted(events[rank]))
    return rank, (name, choose.randint(1, events[rank][name]))


def check_checkpoints(root):
    """Check that every finished checkpoint is whole, and that never two intervals are lost."""
    (directory,) = root.iterdir()
    there = sorted(path for path in directory.glob("checkpoints/step-*") if path.name[5:].isdigit())
    for checkpoint in there:
        sums = json.loads((checkpoint / "state.json").read_text())["sha256"]
        assert {path.name for path in checkpoint.iterdir()} == {*sums, "state.json"}
        for name, expected in sums.items():
            assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == expected
    steps = len(metrics.read_lines(directory / "metrics.jsonl"))
    trained = (directory / "training.json").exists()
    assert trained or steps - (int(there[-1].name[5:]) if there else 0) <= 2 * STAGE["save_every"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
@pytest.mark.parametrize("processes", LAYOUTS)
def test_killed_at_a_random_moment_the_next_run_ends_in_the_same_bytes(victims, whole, tmp_path, processes, number):
    expected, events = whole(processes)
    rank, at = moment(events, number)
    everyone = bool(number % 2)
    said = victims.run(tmp_path, LAYOUTS[processes], number=signal.SIGKILL, rank=rank, at=at, everyone=everyone)
    assert said[rank] == {"state": "killed", "signal": signal.SIGKILL}, said
    check_checkpoints(tmp_path)
    again = victims.run(tmp_path, LAYOUTS[processes])
    assert {one["state"] for one in again} <= {"made", "found"}, again
    assert decided(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", LAYOUTS)
def test_asked_to_stop_all_processes_save_the_same_step(victims, whole, tmp_path, processes, number, everyone):
    asked = {"number": number, "rank": processes - 1, "at": ("losses", 3), "everyone": everyone}
    said = victims.run(tmp_path, LAYOUTS[processes], **asked)
    assert {one["state"] for one in said} == {"interrupted"}, said
    (says,) = {one["says"] for one in said}
    (directory,) = tmp_path.iterdir()
    assert says == "stage tiny is saved after step 3 of 7"
    assert (directory / "checkpoints" / "step-00000003" / "state.json").exists()
    again = victims.run(tmp_path, LAYOUTS[processes])
    assert {one["state"] for one in again} == {"made"}, again
    assert decided(tmp_path) == whole(processes)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "full"), [(0, "write_data"), (1, "write_data"), (0, "finish"), (0, "add")])
def test_a_disk_that_is_full_for_one_process_is_an_error_of_all(victims, whole, tmp_path, rank, full):
    said = victims.run(tmp_path, LAYOUTS[2], rank=rank, full=full)
    assert {one["state"] for one in said} == {"error"}, said
    assert "no room to write (No space left on device); what was finished before is kept" in said[rank]["says"]
    if full == "add":  # in the export, which the first process writes
        assert "rank 0 (host " in said[1]["says"]
    else:
        assert said[0] == said[1]
    check_checkpoints(tmp_path)
    again = victims.run(tmp_path, LAYOUTS[2])
    assert {one["state"] for one in again} == {"made"}, again
    assert decided(tmp_path) == whole(2)[0]
