"""Real benchmark files, and a folder of few questions."""

import csv
import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real():
    beside = Path(__file__).resolve().parents[4] / "shared"
    folder = Path(os.environ.get("LLAMERO_SHARED", beside)) / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"no benchmark files at {folder} (set LLAMERO_SHARED)")
    return folder


@pytest.fixture
def small(tmp_path):
    """A folder with two questions of each benchmark, and HellaSwag with its training file."""
    arc = {"question": "Q{}?", "choices": {"text": ["x", "yy"], "label": ["A", "B"]}, "answerKey": "B"}
    swag = {"activity_label": "L", "ctx_a": "A.", "endings": list("wxyz"), "label": 1}
    for name, count in (("arc_challenge/test", 2), ("arc_challenge/train", 30)):
        rows = [{**arc, "id": str(i), "question": f"Q{i}?"} for i in range(count)]
        write(tmp_path / f"{name}.jsonl", rows)
    for name, count in (("hellaswag_val", 2), ("hellaswag_train", 30)):
        rows = [{**swag, "ind": i, "ctx_b": f"he is {i}"} for i in range(count)]
        write(tmp_path / "hellaswag" / f"{name}.jsonl", rows)
    for subject in ("anatomy", "virology"):
        for split, count in (("dev", 6), ("test", 2)):
            path = tmp_path / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([f"{split}{i}", *"abcd", "C"] for i in range(count))
    targets = {"yes": 1, "no": 0}
    row = {"mc1_targets": targets, "mc2_targets": targets}
    (tmp_path / "truthfulqa").mkdir()
    for name in ("mc_task_2021.json", "mc_task.json"):
        rows = [{**row, "question": f"{i}?"} for i in range(2)]
        (tmp_path / "truthfulqa" / name).write_text(json.dumps(rows))
    return tmp_path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
