"""MT-Bench's files: where they lie, and what is wrong with broken ones."""

import json

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import mt_bench
from llamero.corpus.benchmarks import MtBenchRow

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write it.", "Again."]}
ANSWER = {"question_id": 81, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}]}
PROMPT = {
    "name": "single-v1",
    "system_prompt": "s",
    "prompt_template": "{question} {answer}",
    "output_format": "[[rating]]",
}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lay_out(root):
    write(root / "judge_prompts.jsonl", PROMPT)
    write(root / "mt_bench" / "question.jsonl", QUESTION)
    write(root / "mt_bench" / "reference_answer" / "gpt-4.jsonl", ANSWER)


@pytest.mark.parametrize("given", ["", "mt_bench", "mt_bench/mt_bench"])
def test_the_directory_may_be_any_of_three(tmp_path, given):
    lay_out(tmp_path / "mt_bench")
    found = mt_bench.load(tmp_path / given)
    assert found.questions == (MtBenchRow(81, "writing", ("Write it.", "Again.")),)
    assert found.references == {"gpt-4": {81: ("a", "b")}}
    assert found.prompt("single-v1").fill(question="{q}", answer="A") == "{q} A"


def test_a_judge_sees_its_own_reference_answers_if_there_are(tmp_path):
    lay_out(tmp_path)
    write(tmp_path / "mt_bench" / "reference_answer" / "other.jsonl", ANSWER)
    found = mt_bench.load(tmp_path)
    assert [found.reference(judge)[0] for judge in ("other", "gpt-4", "third")] == ["other", "gpt-4", "gpt-4"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(LlameroError, match=r"question\.jsonl: no such file of MT-Bench"):
        mt_bench.load(tmp_path)
    write(tmp_path / "mt_bench" / "question.jsonl", QUESTION)
    with pytest.raises(LlameroError, match=r"judge_prompts\.jsonl: no such file"):
        mt_bench.load(tmp_path)
    write(tmp_path / "judge_prompts.jsonl", PROMPT)
    found = mt_bench.load(tmp_path)
    with pytest.raises(LlameroError, match="no judge prompt `single-v2`"):
        found.prompt("single-v2")
    with pytest.raises(LlameroError, match="no reference answers"):
        found.reference("gpt-4")
    with pytest.raises(LlameroError, match="asks for 'answer'; there is question"):
        found.prompt("single-v1").fill(question="q")


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("mt_bench/question.jsonl", "", "nothing in it"),
        ("mt_bench/question.jsonl", "{", r"question\.jsonl:1: not JSON"),
        ("mt_bench/question.jsonl", "[]", "a JSON object was expected"),
        ("mt_bench/question.jsonl", json.dumps({**QUESTION, "question_id": "81"}), "question_id is '81'"),
        ("mt_bench/question.jsonl", json.dumps({**QUESTION, "turns": "Write."}), "turns is 'Write.'"),
        ("mt_bench/question.jsonl", json.dumps({**QUESTION, "category": None}), "category is None"),
        ("judge_prompts.jsonl", json.dumps({**PROMPT, "output_format": 3}), "output_format is 3"),
        ("mt_bench/reference_answer/gpt-4.jsonl", json.dumps({**ANSWER, "choices": []}), "must hold an answer"),
    ],
)
def test_broken_files_are_named(tmp_path, file, line, problem):
    lay_out(tmp_path)
    (tmp_path / file).write_text(line)
    with pytest.raises(LlameroError, match=problem):
        mt_bench.load(tmp_path)


def test_the_hubs_copy_is_fetched(tmp_path, monkeypatch):
    lay_out(tmp_path / "data")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **how: (asked.append((repo, how)), tmp_path)[1]
    )
    assert mt_bench.load(mt_bench.fetch()).questions[0].id == 81
    assert asked[0][0] == "lmsys/mt-bench"
    assert asked[0][1]["repo_type"] == "space"


def test_a_hub_that_is_not_there_is_an_error(monkeypatch):
    def down(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", down)
    with pytest.raises(LlameroError, match="neither the hub nor its cache has MT-Bench's files"):
        mt_bench.fetch()
