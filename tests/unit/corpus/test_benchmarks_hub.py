"""Files of the hub become the files of the layout: the same requests come out of them."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from llamero.core import download
from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks, benchmarks_hub

ARC = {"id": "a", "question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
SWAG = {"ind": 3, "activity_label": "L", "ctx_a": "A.", "ctx_b": "b", "endings": ["v", "w", "x", "y"], "label": "2"}
MMLU = {"question": 'Two\r\nlines, "quoted"', "subject": "anatomy", "choices": ["a", "b,c", "", "d\r"], "answer": 2}
TARGETS = {"choices": ["yes", "no"], "labels": [1, 0]}
TRUTH = {"question": "Q?", "mc1_targets": TARGETS, "mc2_targets": TARGETS}
WINO = {"sentence": "He saw _ there.", "option1": "x", "option2": "y", "answer": "1"}
GSM = {"question": "How many?", "answer": "Two.\n#### 2"}

HUB = {
    "allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet": [ARC],
    "allenai/ai2_arc/ARC-Challenge/train-00000-of-00001.parquet": [ARC, ARC],
    "Rowan/hellaswag/data/validation-00000-of-00001.parquet": [SWAG],
    "Rowan/hellaswag/data/train-00000-of-00002.parquet": [SWAG],
    "Rowan/hellaswag/data/train-00001-of-00002.parquet": [{**SWAG, "ind": 4}],
    "cais/mmlu/anatomy/test-00000-of-00001.parquet": [MMLU],
    "cais/mmlu/anatomy/dev-00000-of-00001.parquet": [MMLU],
    "cais/mmlu/all/test-00000-of-00001.parquet": [MMLU],
    "truthfulqa/truthful_qa/multiple_choice/validation-00000-of-00001.parquet": [TRUTH],
    "allenai/winogrande/winogrande_xl/validation-00000-of-00001.parquet": [WINO],
    "allenai/winogrande/winogrande_xl/train-00000-of-00001.parquet": [WINO],
    "openai/gsm8k/main/test-00000-of-00001.parquet": [GSM],
    "openai/gsm8k/main/train-00000-of-00001.parquet": [GSM],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of few rows; says how often it was asked."""
    for path, rows in HUB.items():
        file = tmp_path / "hub" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    asked = []

    def resolve(repo, pattern):
        asked.append(repo)
        return tmp_path / "hub" / repo

    monkeypatch.setattr(download, "resolve_dataset", resolve)
    monkeypatch.setattr(download, "cache", lambda: tmp_path / "cache")
    return asked


def test_every_file_is_read_as_if_it_lay_there(hub):
    folder = benchmarks_hub.fetched(benchmarks_hub.SOURCES)
    assert benchmarks.arc_challenge(folder, "test") == [benchmarks.ArcRow("a", "Why?", ("x", "y"), 1)]
    assert len(benchmarks.arc_challenge(folder, "train")) == 2
    assert benchmarks.hellaswag_validation(folder)[0].answer == 2
    assert [row.id for row in benchmarks.hellaswag_train(folder) or ()] == [3, 4]
    assert benchmarks.mmlu_subjects(folder) == ["anatomy"]
    (row,) = benchmarks.mmlu(folder, "anatomy", "test")
    assert (row.question, row.choices, row.answer) == (MMLU["question"], tuple(MMLU["choices"]), 2)
    (row,) = benchmarks.truthfulqa(folder, "later")
    assert (row.mc1_choices, row.mc2_labels) == (("yes", "no"), (1, 0))
    assert benchmarks.winogrande(folder)[0].options == ("x", "y")
    assert benchmarks.winogrande_train(folder) == benchmarks.winogrande(folder)
    assert benchmarks.gsm8k(folder) == benchmarks.gsm8k_train(folder) == [benchmarks.Gsm8kRow(**GSM)]


def test_what_was_fetched_is_not_fetched_again(hub):
    benchmarks_hub.fetched(["gsm8k"])
    assert hub == ["openai/gsm8k"] * 2
    benchmarks_hub.fetched(["gsm8k"])
    assert len(hub) == 2


def test_files_that_are_not_there_are_named(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "resolve_dataset", lambda repo, pattern: tmp_path)
    with pytest.raises(LlameroError, match="openai/gsm8k on the hub: there is no file `main/test"):
        benchmarks_hub.fetched(["gsm8k"])


def test_lines_are_json(hub):
    folder = benchmarks_hub.fetched(["arc_challenge"])
    assert json.loads((folder / "arc_challenge" / "test.jsonl").read_text()) == ARC
