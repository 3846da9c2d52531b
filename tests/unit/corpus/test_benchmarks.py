"""Benchmark files are read whole, and what is wrong in one is named with its line."""

import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks

ARC = {
    "id": "x",
    "question": "Which?",
    "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
HELLASWAG = {
    "ind": 4,
    "activity_label": "Rowing",
    "ctx_a": "A boat.",
    "ctx_b": "a man",
    "endings": ["a", "b", "c", "d"],
    "label": "3",
}
TRUTHFULQA = {
    "question": "Why?",
    "mc1_targets": {"Because.": 1, "No.": 0},
    "mc2_targets": {"Because.": 1, "So.": 1, "No.": 0},
}


@pytest.fixture(scope="module")
def real():
    beside = Path(__file__).resolve().parents[4] / "shared"
    folder = Path(os.environ.get("LLAMERO_SHARED", beside)) / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"no benchmark files at {folder} (set LLAMERO_SHARED)")
    return folder


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mmlu(folder, *rows):
    path = folder / "mmlu" / "test" / "anatomy_test.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def test_arc_numbers_are_letters(tmp_path):
    write(tmp_path / "arc_challenge" / "test.jsonl", ARC, {**ARC, "answerKey": "C"})
    rows = benchmarks.arc_challenge(tmp_path, "test")
    assert rows[0] == benchmarks.ArcRow("x", "Which?", ("one", "two", "three"), 1)
    assert rows[1].answer == 2


@pytest.mark.parametrize("key", ["D", "4", "0", "F", "", "AB"])
def test_arc_answer_out_of_range_is_named(tmp_path, key):
    write(tmp_path / "arc_challenge" / "train.jsonl", ARC, {**ARC, "answerKey": key})
    with pytest.raises(LlameroError) as caught:
        benchmarks.arc_challenge(tmp_path, "train")
    assert str(caught.value).startswith(str(tmp_path / "arc_challenge" / "train.jsonl") + ":2: answerKey is")
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": 3}, "question is 3, not a string"),
        ({"choices": []}, "choices is [], not an object"),
        ({"choices": {"text": [], "label": []}}, "text is [], not a list of strings"),
        ({"choices": {"text": ["a"]}}, "no `label`"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, problem):
    write(tmp_path / "arc_challenge" / "test.jsonl", {**ARC, **change})
    with pytest.raises(LlameroError) as caught:
        benchmarks.arc_challenge(tmp_path, "test")
    assert f"test.jsonl:1: {problem}" in str(caught.value)


@pytest.mark.parametrize("label", [3, "3"])
def test_hellaswag_labels_are_numbers_or_strings(tmp_path, label):
    write(tmp_path / "hellaswag" / "hellaswag_val.jsonl", {**HELLASWAG, "label": label})
    assert benchmarks.hellaswag_validation(tmp_path)[0].answer == 3
    assert benchmarks.hellaswag_train(tmp_path) is None


@pytest.mark.parametrize("label", [4, -1, "", None, "A", True])
def test_hellaswag_label_out_of_range_is_named(tmp_path, label):
    write(tmp_path / "hellaswag" / "hellaswag_val.jsonl", HELLASWAG, {**HELLASWAG, "label": label})
    with pytest.raises(LlameroError, match=r"val\.jsonl:2: label is .*, there are 4 endings"):
        benchmarks.hellaswag_validation(tmp_path)


def test_two_validation_files_are_not_chosen_from(tmp_path):
    write(tmp_path / "hellaswag" / "a_val.jsonl", HELLASWAG)
    write(tmp_path / "hellaswag" / "b_val.jsonl", HELLASWAG)
    with pytest.raises(LlameroError, match=r"a_val\.jsonl, b_val\.jsonl"):
        benchmarks.hellaswag_validation(tmp_path)


def test_mmlu_keeps_carriage_returns(tmp_path):
    write_mmlu(tmp_path, ["What\r\nis it?", "a", "b", "c", "d", "D"])
    assert benchmarks.mmlu_subjects(tmp_path) == ["anatomy"]
    row = benchmarks.mmlu(tmp_path, "anatomy", "test")[0]
    assert row == benchmarks.MmluRow("anatomy", "What\r\nis it?", ("a", "b", "c", "d"), 3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (["q", "a", "b", "c", "d", "E"], "answer is 'E'"),
        (["question", "A", "B", "C", "D", "answer"], "answer is 'answer'"),
        (["q", "a", "b", "c", "D"], "5 columns, not 6"),
    ],
)
def test_mmlu_names_the_line(tmp_path, row, problem):
    path = write_mmlu(tmp_path, ["two\nlines", "a", "b", "c", "d", "A"], row)
    with pytest.raises(LlameroError) as caught:
        benchmarks.mmlu(tmp_path, "anatomy", "test")
    assert str(caught.value).startswith(f"{path}:3: {problem}")


def test_mmlu_cut_off_inside_quotes_is_an_error(tmp_path):
    path = write_mmlu(tmp_path, ["q", "a", "b", "c", "d", "A"])
    path.write_text('q,a,b,c,d,A\n"q,a', encoding="utf-8")
    with pytest.raises(LlameroError, match="not a CSV file"):
        benchmarks.mmlu(tmp_path, "anatomy", "test")


def test_truthfulqa_keeps_the_order_of_answers(tmp_path):
    path = tmp_path / "truthfulqa" / "mc_task.json"
    path.parent.mkdir()
    path.write_text(json.dumps([TRUTHFULQA], indent=2), encoding="utf-8")
    row = benchmarks.truthfulqa(tmp_path, "later")[0]
    assert row.mc1_choices == ("Because.", "No.")
    assert (row.mc2_choices, row.mc2_labels) == (("Because.", "So.", "No."), (1, 1, 0))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mc2_targets": {"a": 1, "b": 2}}, "mc2_targets: 'b' has the label 2"),
        ({"mc1_targets": {"a": 0, "b": 1}}, "mc1_targets has labels [0, 1]"),
        ({"mc2_targets": {"a": 1, "b": 1}}, "mc2_targets has labels [1, 1]"),
        ({"mc2_targets": {"a": 0, "b": 1}}, "mc2_targets has labels [0, 1]"),
    ],
)
def test_truthfulqa_names_the_line_where_the_question_starts(tmp_path, change, problem):
    path = tmp_path / "truthfulqa" / "mc_task_2021.json"
    path.parent.mkdir()
    rows = ",\n".join(json.dumps(row) for row in (TRUTHFULQA, {**TRUTHFULQA, **change}))
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    with pytest.raises(LlameroError) as caught:
        benchmarks.truthfulqa(tmp_path, "2021")
    assert str(caught.value).startswith(f"{path}:3: {problem}")


@pytest.mark.parametrize(
    "text", ["{}", "[", "[{}", "[]", '[{"question": "q"}', "[1]", f"[{json.dumps(TRUTHFULQA)}\n{{}}]"]
)
def test_a_broken_array_is_an_error(tmp_path, text):
    path = tmp_path / "truthfulqa" / "mc_task_2021.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LlameroError) as caught:
        benchmarks.truthfulqa(tmp_path, "2021")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"id": ', "test.jsonl:1: not JSON"),
        (b"\n[1]\n", "test.jsonl:2: a JSON object was expected"),
        (b"\xff", "not UTF-8"),
        (b"", "no questions"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path, content, problem):
    path = tmp_path / "arc_challenge" / "test.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LlameroError, match=problem):
        benchmarks.arc_challenge(tmp_path, "test")


def test_a_missing_file_names_the_path_and_the_way_out(tmp_path):
    for read, path in (
        (lambda: benchmarks.arc_challenge(tmp_path, "train"), "arc_challenge/train.jsonl"),
        (lambda: benchmarks.hellaswag_validation(tmp_path), "hellaswag/hellaswag_val.jsonl"),
        (lambda: benchmarks.mmlu_subjects(tmp_path), "mmlu/test/<subject>_test.csv"),
        (lambda: benchmarks.mmlu(tmp_path, "anatomy", "dev"), "mmlu/dev/anatomy_dev.csv"),
        (lambda: benchmarks.truthfulqa(tmp_path, "2021"), "truthfulqa/mc_task_2021.json"),
    ):
        with pytest.raises(LlameroError, match="no such benchmark file") as caught:
            read()
        assert caught.value.where == str(tmp_path / path)
        assert "name the folder" in str(caught.value)


@pytest.mark.parametrize("unknown", ["2022"])
def test_an_unknown_edition_is_an_error(tmp_path, unknown):
    with pytest.raises(LlameroError, match="did you mean `2021`"):
        benchmarks.truthfulqa(tmp_path, unknown)


def test_real_files_have_their_published_sizes(real):
    assert len(benchmarks.arc_challenge(real, "test")) == 1172
    assert len(benchmarks.arc_challenge(real, "train")) == 1056
    assert len(benchmarks.hellaswag_validation(real)) == 1000


@pytest.mark.parametrize(("edition", "one", "many"), [("2021", 4114, 5882), ("later", 4186, 6204)])
def test_real_truthfulqa_editions_have_their_published_sizes(real, edition, one, many):
    rows = benchmarks.truthfulqa(real, edition)
    assert len(rows) == 817
    assert sum(len(row.mc1_choices) for row in rows) == one
    assert sum(len(row.mc2_choices) for row in rows) == many


def test_real_mmlu_is_read_whole(real):
    subjects = benchmarks.mmlu_subjects(real)
    assert len(subjects) == 38
    assert all(len(benchmarks.mmlu(real, subject, "dev")) == 5 for subject in subjects)
    assert len(benchmarks.mmlu(real, "anatomy", "test")) == 135
    assert any("\r\n" in row.question for row in benchmarks.mmlu(real, "college_mathematics", "dev"))


MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write it.", "Again."]}
GSM8K = {"question": "How many?", "answer": "Two.\n#### 2"}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "f",
}
WINOGRANDE = {"qID": "x-1", "sentence": "Ann met Eve so _ left.", "option1": "Ann", "option2": "Eve", "answer": "2"}


@pytest.mark.parametrize("path", ["mt_bench/question.jsonl", "mt_bench/mt_bench/question.jsonl"])
def test_mt_bench_lies_in_its_folder_or_as_in_fastchat(tmp_path, path):
    write(tmp_path / path, MT_BENCH)
    assert benchmarks.mt_bench(tmp_path) == [benchmarks.MtBenchRow(81, "writing", ("Write it.", "Again."))]


def test_gsm8k_keeps_the_worked_solution(tmp_path):
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    assert benchmarks.gsm8k(tmp_path) == [benchmarks.Gsm8kRow("How many?", "Two.\n#### 2")]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_humaneval_may_be_compressed(tmp_path, ending):
    line = (json.dumps(HUMANEVAL) + "\n").encode()
    path = tmp_path / "humaneval" / f"HumanEval.jsonl{ending}"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(line) if ending else line)
    assert benchmarks.humaneval(tmp_path) == [
        benchmarks.HumanEvalRow(*(HUMANEVAL[key] for key in HUMANEVAL)),
    ]


@pytest.mark.parametrize("cut", [lambda data: data[:-9], lambda data: b"no gzip"])
def test_a_broken_gzip_is_an_error(tmp_path, cut):
    path = tmp_path / "humaneval" / "HumanEval.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(cut(gzip.compress(json.dumps(HUMANEVAL).encode())))
    with pytest.raises(LlameroError, match="broken gzip") as caught:
        benchmarks.humaneval(tmp_path)
    assert caught.value.where == str(path)


def test_winogrande_answers_are_one_and_two(tmp_path):
    write(tmp_path / "winogrande" / "dev.jsonl", WINOGRANDE)
    row = benchmarks.winogrande(tmp_path)[0]
    assert row == benchmarks.WinoGrandeRow("x-1", "Ann met Eve so _ left.", ("Ann", "Eve"), 1)


@pytest.mark.parametrize(
    ("read", "path", "row", "problem"),
    [
        (benchmarks.mt_bench, "mt_bench/question.jsonl", {**MT_BENCH, "question_id": "81"}, "question_id is '81'"),
        (benchmarks.mt_bench, "mt_bench/question.jsonl", {**MT_BENCH, "turns": "Write."}, "turns is 'Write.'"),
        (benchmarks.gsm8k, "gsm8k/test.jsonl", {**GSM8K, "answer": "2"}, "answer is '2'"),
        (benchmarks.humaneval, "humaneval/HumanEval.jsonl", {"task_id": "x"}, "no `prompt`"),
        (benchmarks.winogrande, "winogrande/dev.jsonl", {**WINOGRANDE, "sentence": "No."}, "sentence is 'No.'"),
        (benchmarks.winogrande, "winogrande/dev.jsonl", {**WINOGRANDE, "answer": ""}, "answer is ''"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, read, path, row, problem):
    write(tmp_path / path, row)
    with pytest.raises(LlameroError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / path}:1: {problem}")


def test_the_other_real_files_have_their_published_sizes(real):
    assert len(benchmarks.mt_bench(real)) == 80
    assert all(len(row.turns) == 2 for row in benchmarks.mt_bench(real))
    assert len(benchmarks.gsm8k(real)) == 1319
    assert len(benchmarks.humaneval(real)) == 164
    assert len(benchmarks.winogrande(real)) == 1267
