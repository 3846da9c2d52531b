"""MT-Bench from the command line: recorded replies, and a model before a judge."""

import json
import os
from pathlib import Path

import pytest

from llamero.cli import app
from llamero.core.errors import LlameroError

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[3] / "shared"))
PUBLISHED = SHARED / "data" / "published" / "fasteval" / "mt-bench"


def said_by(command, capsys):
    app([str(part) for part in command], result_action="return_value")
    return capsys.readouterr().out


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no {PUBLISHED}")
def test_recorded_replies_give_the_published_scores(capsys):
    (report,) = PUBLISHED.glob("OpenAssistant--llama2-70b-oasst-sft-v10/*")
    said = said_by(["evaluate", "--mt-bench-replies", report], capsys)
    assert said == (report / "scores.json").read_text() + "\n"


def test_fastchats_judgments_are_recomputed_too(tmp_path, capsys):
    scores = [(81, 1, 8), (81, 2, 5), (111, 1, 6), (111, 2, -1)]
    rows = [{"question_id": q, "model": "m", "turn": turn, "score": score} for q, turn, score in scores]
    path = tmp_path / "gpt-4_single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(said_by(["evaluate", "--mt-bench-replies", path], capsys))
    assert found == {
        "m": {
            "overall": 19 / 3,
            "turn_1": 7.0,
            "turn_2": 5.0,
            "mean_of_turns": 6.0,
            "categories": {"writing": 6.5, "math": 6.0},
            "without_rating": 1,
        }
    }


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--mt-bench-replies", "/no/such"], "no such file or directory"),
        (["m", "--tasks", "mt_bench", "--judge", "http://localhost:1/v1"], "judge_model"),
        (["m", "--tasks", "mt_bench", "--votes", "0"], "votes"),
        (["m", "--tasks", "toy_world", "--judge", "x"], "judge"),
    ],
)
def test_mistakes_are_named(options, problem):
    with pytest.raises(LlameroError, match=problem):
        app(["evaluate", *options], result_action="return_value")
