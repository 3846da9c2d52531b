"""lm-eval's HumanEval and MBPP run their programs in the sandbox."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from llamero.core.results import Result
from llamero.evaluate import code_eval
from llamero.evaluate.code_eval import CodeEval
from llamero.evaluate.config import named
from llamero.evaluate.run import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
REACHES = "import socket\nsocket.socket()\ndef one(): return 1"


def test_the_metric_counts_programs_that_pass():
    tests, programs = ["assert one() == 1"] * 2, [["def one(): return 1"] * 2, [REACHES, "def one(): return 1"]]
    means, found = CodeEval().compute(references=tests, predictions=programs, k=[1, 2, 3])
    assert means == {"pass@1": 0.75, "pass@2": 1.0}
    assert [said["passed"] for _, said in found[0] + found[1]] == [True, True, False, True]
    assert "PermissionError" in found[1][0][1]["result"]


def test_lm_evals_own_functions_use_it():
    pytest.importorskip("lm_eval")
    library = importlib.import_module("evaluate")
    before = library.load
    with code_eval.fenced(["humaneval"]) as safe:
        assert safe
        theirs = importlib.import_module("lm_eval.tasks.humaneval.utils")
        assert theirs.pass_at_k(["assert one() == 1"], [["def one(): return 1"]], k=[1]) == {"pass@1": 1.0}
        assert theirs.pass_at_k(["assert one() == 1"], [[REACHES]], k=[1]) == {"pass@1": 0.0}
    assert library.load is before
    with code_eval.fenced(["humaneval", "longproc"]) as safe:
        assert not safe
    with code_eval.fenced(["gsm8k"]) as safe:
        assert library.load is before
        assert not safe


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_humaneval_goes_through_lm_eval(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    real, model = DATA / "weights" / "ref-7m-hf", tmp_path / "model"
    if not real.is_dir():
        pytest.skip(f"no model at {real} (set LLAMERO_SHARED)")
    model.mkdir()
    for file in real.iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((real / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1100}))  # answers have 1,024
    folder = tmp_path / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    row = {"task_id": "x", "prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one"}
    rows = [{**row, "test": f"def check(f):\n    assert {right}\n"} for right in (True, False)]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    head = "configs:\n- config_name: openai_humaneval\n  data_files:\n  - split: test\n    path: test.jsonl\n"
    (folder / "README.md").write_text(f"---\n{head}---\n")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    task = named("lm-eval", {"names": ["humaneval"]})
    (found,) = run(task, model=model, name="m", template="auto", root=tmp_path)
    assert isinstance(found, Result)
    assert found.metrics["score"] in (0.0, 0.5)  # what a model of 7 million parameters writes may not even parse
    assert found.metrics["questions"] == 2
