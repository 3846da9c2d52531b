"""HumanEval asks and counts as lm-eval does, and every published solution passes in the sandbox."""

import json
import math
import os
import random
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import cast

import pytest
import yaml

from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks
from llamero.corpus.benchmarks import HumanEvalRow
from llamero.evaluate import humaneval, sandbox
from llamero.evaluate.config import HumanEvalTask
from llamero.evaluate.run import run
from llamero.infer.engine import OwnEngine

DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
PROBLEM = HumanEvalRow("x", "def one():\n", "    return 1\n", "def check(f):\n    assert f() == 1\n", "one")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@pytest.fixture(scope="module")
def problems():
    if not (DATA / "benchmarks" / "humaneval").is_dir():
        pytest.skip(f"no HumanEval at {DATA} (set LLAMERO_SHARED)")
    return benchmarks.humaneval(DATA / "benchmarks")


def test_answers_end_where_those_of_lm_eval_do():
    import lm_eval

    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)
    path = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
    config = yaml.load(path.read_text(), Loader=loader)
    assert config["generation_kwargs"]["until"] == list(humaneval.UNTIL)
    assert config["generation_kwargs"]["max_gen_toks"] == HumanEvalTask.model_fields["max_new_tokens"].default
    assert config["generation_kwargs"]["do_sample"] is False
    assert (config["doc_to_text"], config["num_fewshot"]) == ("{{prompt}}", 0)
    assert config["doc_to_target"] == "{{test}}\ncheck({{entry_point}})"


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for answers in range(1, 7):
        for right in range(answers + 1):
            for k in range(1, answers + 1):
                marks = [number < right for number in range(answers)]
                picks = [any(pick) for pick in combinations(marks, k)]
                assert math.isclose(humaneval.pass_at(k, answers, right), sum(picks) / len(picks), abs_tol=1e-12)
    with pytest.raises(ValueError, match="3 are taken"):
        humaneval.pass_at(3, 2, 1)


def test_metrics_are_means_with_their_errors():
    found = humaneval.metrics([1, 0, 1, 1], 1)
    assert found["pass@1"] == 0.75
    assert math.isclose(found["pass@1_stderr"], statistics.stdev([1, 0, 1, 1]) / 2)
    assert "pass@10" not in found
    assert "pass@10" in humaneval.metrics([5, 0], 10)


@linux
@pytest.mark.slow
def test_every_published_solution_passes_and_no_empty_one_does(problems):
    whole = sandbox.run_all([humaneval.program(each, each.solution) for each in problems])
    assert [each.id for each, outcome in zip(problems, whole, strict=True) if not outcome.passed] == []
    few = random.Random(0).sample(problems, 20)
    assert not any(o.passed for o in sandbox.run_all([humaneval.program(each, "    pass\n") for each in few]))


@linux
def test_the_published_examples_of_completions(problems):
    """One of six is right (openai/human-eval, data/example_samples.jsonl); two of the others reach out or wait."""
    folder = DATA / "benchmarks" / "humaneval"
    row = json.loads((folder / "example_problem.jsonl").read_text())
    problem = HumanEvalRow("", row["prompt"], row["canonical_solution"], row["test"], row["entry_point"])
    lines = (folder / "example_samples.jsonl").read_text().splitlines()
    said = [json.loads(line)["completion"] for line in lines if "sleep" not in line]
    found = [sandbox.run(humaneval.program(problem, each)).how for each in said]
    assert found == ["denied", "failed", "passed", "passed", "passed"]


class Answers:
    """An engine that gives fixed answers."""

    context = 64

    def __init__(self, engine, said):
        self.engine, self.said, self.asked = engine, said, []

    def generate(self, prompts, sampling):
        from llamero.infer.generate import Completion

        self.asked += [(tuple(prompt), sampling) for prompt in prompts]
        return [Completion((1,), self.said[len(self.asked) % len(self.said)], "length") for _ in prompts]

    def describe(self):
        return self.engine.describe()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "humaneval").mkdir()
    keys = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    row = dict(zip(keys, vars(PROBLEM).values(), strict=True))
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return tmp_path


@pytest.fixture
def directory():
    path = DATA / "weights" / "tinystories-656k-hf"
    if not path.is_dir():
        pytest.skip(f"no model at {path} (set LLAMERO_SHARED)")
    return path


def measured(directory, folder, **keys):
    task = HumanEvalTask.model_validate({"tasks": "humaneval", "data": str(folder), **keys})
    (result,) = run(task, model=directory, name="m", template="auto", root=folder, work=folder)
    return result


@linux
def test_a_model_is_measured_and_its_samples_are_kept(directory, folder, monkeypatch):
    result = measured(directory, folder, max_new_tokens=8)
    assert result.metrics["pass@1"] == 0
    assert result.metrics["problems"] == 3
    assert "3 of 3 answers were cut off at 8 tokens" in str(result.notes)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["doc"] for line in lines[1:]] == [0, 1, 2]
    monkeypatch.setattr(humaneval, "_answered", None)  # nothing is asked again
    assert measured(directory, folder, max_new_tokens=8).metrics == result.metrics
    with pytest.raises(LlameroError, match="another `max_new_tokens`"):
        measured(directory, folder, max_new_tokens=9)


@linux
def test_right_answers_are_counted(directory, folder, monkeypatch):
    from llamero.evaluate import subject

    real = subject.Subject.__init__

    def with_answers(self, name, engine, *more):
        real(self, name, cast("OwnEngine", Answers(engine, ["    return 1", "    return 2"])), *more)

    monkeypatch.setattr(subject.Subject, "__init__", with_answers)
    result = measured(directory, folder, num_samples=10, temperature=0.8)
    assert result.metrics["pass@1"] == 0.5
    assert 0.5 < result.metrics["pass@10"] <= 1
    assert "at most 32 tokens" in result.protocol
    assert "half of the context" in str(result.notes)


def test_several_greedy_answers_are_refused():
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        HumanEvalTask.model_validate({"tasks": "humaneval", "data": "d", "num_samples": 2})
