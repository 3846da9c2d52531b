"""What lm-eval's `openllm` asks today: hashes recorded from lm-eval 0.4.13's own code on the same files.

HellaSwag and WinoGrande were recorded without a training split, as the files here have none.
"""

import hashlib
import json

import pytest

from llamero.cli import app, main
from llamero.core.errors import LlameroError
from llamero.evaluate import h4, openllm, questions, requests, tally
from llamero.evaluate.config import H4Task, LmEvalTask, named, several
from llamero.evaluate.questions import LEADERBOARD_2023, LM_EVAL, Document, Metric, Request, Task

RECORDED = {
    "arc_challenge": (4687, "b4b12304aa3aa269d2ba8032901ebeff915d952bab4103de170962410d34cd0c"),
    "hellaswag": (4000, "142e9040103152151ccc98527f816ab8325e0f5d22776086a891209cdf26d49d"),
    "truthfulqa_mc1": (4186, "f887df03322e26d7a71238dfbd26f089b6e22394022e4555cd94d8988cfce3e7"),
    "truthfulqa_mc2": (6204, "534f0d72d0ea67f79a4093b26f849a4ba8a3c1d83ebb8226c2bd376f01516deb"),
    "winogrande": (2534, "2d1eddcccb520d3d6ff25f4852a7d4c1fafd92eb871740484b3675faf1240dbc"),
    "mmlu_anatomy": (540, "78c49731074a1c5d044d6d47fc85fa920abd8e43a0ce3decbcfa2ed1b1c4c373"),
    "mmlu_college_mathematics": (400, "ce4c2ddc5fd11d62ca5170182d8a70cea7b2898082f68756f96648f32b425d5b"),
    "mmlu_moral_scenarios": (3580, "ba92e760dbfda4e1662b7efa82cc4667159411b356b4f6e7ea69d2d5175ed5cb"),
}
ALL_SUBJECTS = (38, 35228, "4708d420c642bbbda789dea1b7675948f080b3ba764011a77a008acd677d644c")
"""Subjects, requests, and the digest of the digests of the subjects in alphabetical order."""


@pytest.mark.parametrize("name", RECORDED)
def test_requests_are_those_of_lm_eval(real, name):
    (task,) = h4.tasks(real, [name], rules=LM_EVAL)
    assert (len(task.requests), questions.digest([task])) == RECORDED[name]


def test_all_subjects_are_those_of_lm_eval(real):
    tasks = h4.tasks(real, ["mmlu"], rules=LM_EVAL)
    digests = "".join(questions.digest([task]) for task in tasks)
    found = (len(tasks), sum(len(task.requests) for task in tasks), hashlib.sha256(digests.encode()).hexdigest())
    assert found == ALL_SUBJECTS


def test_a_limit_takes_the_first_of_the_file(real):
    (whole,) = h4.tasks(real, ["arc_challenge"], rules=LM_EVAL)
    (some,) = h4.tasks(real, ["arc_challenge"], rules=LM_EVAL, limit=100)
    assert some.requests == whole.requests[: len(some.requests)]
    assert len(some.documents) == 100


def test_openllm_is_the_four_and_what_was_added(real):
    names = [task.benchmark for task in h4.tasks(real, ["openllm"], rules=LM_EVAL, limit=1)]
    assert list(dict.fromkeys(names)) == [*h4.BENCHMARKS, "truthfulqa_mc1", "winogrande", "gsm8k"]


def test_gsm8k_is_asked_with_five_worked_examples(real):
    (task,) = h4.tasks(real, ["gsm8k"], rules=LM_EVAL, limit=3)
    assert [request.context.count("Question: ") for request in task.requests] == [6, 6, 6]
    assert task.requests[0].context.endswith("at the farmers' market?\nAnswer:")
    assert (task.until, task.pool) == (openllm.GSM8K_UNTIL, "test, the document itself left out")


# -- scores


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("She has 3 + 4 = 7.\n#### 7", 1, 1),
        ("#### 1,007", 0, 0),
        ("It is $7.", 0, 1),
        ("It is 7", 0, 1),
        ("#### 7 and then 8", 1, 0),
        ("#### 7 and then #### 9", 1, 0),
        ("seven", 0, 0),
    ],
)
def test_gsm8k_looks_for_the_number_in_two_ways(answer, strict, flexible):
    found = openllm.gsm8k_right("work\n#### 7", answer)
    assert found == {"exact_match": strict, "exact_match_flexible": flexible}


def test_gsm8k_ignores_commas_and_dollars():
    assert openllm.gsm8k_right("x\n#### 1,007", "so #### 1007")["exact_match"] == 1


def task_of(name, *documents, rules=LM_EVAL, metric: Metric = "acc"):
    asked = [Request(name, i, j, "q", c) for i, d in enumerate(documents) for j, c in enumerate(d.choices)]
    return Task(name, 0, metric, "", 0, len(documents), "", documents, tuple(asked), rules)


def test_mmlu_counts_questions_today_and_subjects_then():
    right, wrong = Document("q", ("a", "b"), 0), Document("q", ("a", "b"), 1)
    for rules, value in ((LM_EVAL, 3 / 6), (LEADERBOARD_2023, (1 / 4 + 1) / 2)):
        parts = [
            task_of("mmlu_a", right, wrong, wrong, wrong, rules=rules),
            task_of("mmlu_b", right, right, rules=rules),
        ]
        scored = [tally.scores(part, [-1.0] * len(part.requests)) for part in parts]
        found = tally.summary(parts, scored)["benchmarks"]["mmlu"]
        assert found["value"] == pytest.approx(value)
    # by hand: ((4 - 1) * 4 * 0.25² + (2 - 1) * 2 * 0²) / (6 - 2) / 6
    pooled = tally.summary(parts, scored)["benchmarks"]["mmlu"]["standard_error"]
    assert pooled == pytest.approx(0.25 / 2)  # of the last, which is the old harness's
    parts = [task_of("mmlu_a", right, wrong, wrong, wrong), task_of("mmlu_b", right, right)]
    scored = [tally.scores(part, [-1.0] * len(part.requests)) for part in parts]
    assert tally.summary(parts, scored)["benchmarks"]["mmlu"]["standard_error"] == pytest.approx((0.75 / 24) ** 0.5)


def test_mc2_counts_every_true_answer_today():
    document = Document("q", ("t", "f", "t"), 0, (1, 0, 1))
    found = tally.scores(task_of("truthfulqa_mc2", document, metric="mc2"), [-1.0, -1.0, -1.0])
    assert found["documents"] == [{"mc2": pytest.approx(2 / 3)}]
    then = tally.scores(task_of("truthfulqa_mc", document, rules=LEADERBOARD_2023, metric="mc2"), [-1.0] * 3)
    assert then["documents"] == [{"mc2": pytest.approx(1 / 3)}]


# -- the command line


def test_the_request_list_is_written_without_a_model(real, tmp_path, capsys):
    recorded = json.loads((real / "leaderboard_2023_requests.json").read_text())["tasks"]
    names = ",".join(name.split()[0] for name in recorded)
    file = tmp_path / "requests.jsonl"
    given = ["--compat", "leaderboard-2023", "--data", str(real), "--requests", str(file), "--limit", "100"]
    app(["evaluate", "no/such-model", "--tasks", names, *given], result_action="return_value")
    digests, counts = {}, {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["task", "doc", "context", "continuation"]
        digest = digests.setdefault(row["task"], hashlib.sha256())
        digest.update((json.dumps([row["context"], row["continuation"]]) + "\n").encode())
        counts[row["task"]] = counts.get(row["task"], 0) + 1
    assert counts == {name: entry["requests_limit100"] for name, entry in recorded.items()}
    assert {name: d.hexdigest() for name, d in digests.items()} == {
        name: entry["sha256_limit100"] for name, entry in recorded.items()
    }
    assert f"{sum(counts.values())} requests" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["0.5", "1.5", "half"])
def test_a_limit_that_is_a_share_is_refused(limit, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "m", "--tasks", "h4", "--data", "x", "--limit", limit])
    assert stopped.value.code != 0
    said = capsys.readouterr()
    assert "no share" in said.out + said.err


def h4_task(name, **given):
    task = named(name, given)
    assert isinstance(task, H4Task)
    return task


def test_what_only_lm_eval_asks_is_asked_by_it():
    assert h4_task("openllm", data="x").compat == "lm-eval"
    with pytest.raises(LlameroError, match="`winogrande` is asked by `compat: lm-eval`"):
        named("winogrande", {"data": "x", "compat": "leaderboard-2023"})


def test_subjects_are_named_as_either_harness_does(real):
    (task,) = several("hendrycksTest-anatomy, mmlu_virology", {"data": str(real), "compat": "lm-eval"})
    assert isinstance(task, H4Task)
    assert [one.name for one in requests.of(task, real)] == ["mmlu_anatomy", "mmlu_virology"]
    with pytest.raises(LlameroError, match="did you mean `anatomy`"):
        requests.of(h4_task("hendrycksTest-anatmy", data=str(real)), real)


def test_several_tasks_take_the_options_they_have():
    first, second = several("arc_challenge,hendrycksTest-anatomy", {"data": "x", "limit": 3})
    assert isinstance(first, H4Task)
    assert isinstance(second, H4Task)
    assert (first.tasks, first.limit, second.tasks, second.subjects) == ("arc_challenge", 3, "mmlu", ["anatomy"])
    first, second = several("mmlu,lm-eval:gsm8k,ifeval", {"data": "x", "shots": 2})
    assert isinstance(second, LmEvalTask)
    assert (first.tasks, second.tasks, second.names, second.shots) == ("mmlu", "lm-eval", ["gsm8k", "ifeval"], 2)
    with pytest.raises(LlameroError, match="`window` is not an option of any"):
        several("mmlu,hellaswag", {"data": "x", "window": 3})
    with pytest.raises(LlameroError, match="did you mean `hellaswag`"):
        several("mmlu,hellaswg", {"data": "x"})
