"""H4 asks what the leaderboard of 2023 asked: hashes recorded from the old harness's own code."""

import hashlib
import json
import math
import random

import pytest

from llamero.core.errors import LlameroError
from llamero.evaluate import h4, questions, tally
from llamero.evaluate.questions import Document, Request, Task

RECORDED = (
    "arc_challenge",
    "hellaswag",
    "truthfulqa_mc (mc_task_2021.json)",
    *(
        f"hendrycksTest-{subject}"
        for subject in (
            "anatomy",
            "college_computer_science",
            "econometrics",
            "high_school_chemistry",
            "high_school_mathematics",
            "high_school_world_history",
            "machine_learning",
            "moral_scenarios",
            "professional_medicine",
            "virology",
        )
    ),
)


@pytest.fixture(scope="module")
def recorded(real):
    return json.loads((real / "leaderboard_2023_requests.json").read_text())["tasks"]


def digest(task):
    lines = (json.dumps([each.context, each.continuation], ensure_ascii=True) for each in task.requests)
    found = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    assert questions.digest([task]) == found
    return found


def uniform(tasks):
    return [tally.scores(task, [-1.0] * len(task.requests)) for task in tasks]


# -- the recorded requests


def test_every_recorded_task_is_compared(recorded):
    assert set(recorded) == set(RECORDED)


@pytest.mark.parametrize("entry", RECORDED)
def test_requests_are_those_of_the_old_harness(real, recorded, entry):
    expected = recorded[entry]
    (task,) = h4.tasks(real, [entry.split()[0]])
    assert task.shots == expected["num_fewshot"]
    assert len(task.requests) == expected["requests"]
    assert digest(task) == expected["sha256"]


@pytest.mark.parametrize("entry", RECORDED)
def test_limited_requests_are_those_of_the_old_harness(real, recorded, entry):
    expected = recorded[entry]
    (task,) = h4.tasks(real, [entry.split()[0]], limit=100)
    assert len(task.requests) == expected["requests_limit100"]
    assert digest(task) == expected["sha256_limit100"]


def test_a_summary_says_how_far_the_files_are_from_the_published_ones(real):
    tasks = h4.tasks(real, limit=2, truthfulqa_edition="later")
    found = tally.summary(tasks, uniform(tasks))
    assert len(found["benchmarks"]["mmlu"]["subjects"]) == 38
    text = "\n".join(found["departures"])
    assert "mmlu: 38 of 57 subjects" in text
    assert "arc_challenge: 2 of 1172 documents asked (limit)" in text
    assert "arc_challenge: examples drawn from 1056 documents (train), published scores from 1119" in text
    assert "hellaswag: 1000 of 10042 documents on disk" in text
    assert "(validation, the document itself left out)" in text
    assert "later edition (mc_task.json)" in text


# -- which tasks


def test_h4_is_the_four_benchmarks(small):
    tasks = h4.tasks(small)
    assert [(task.name, task.shots, task.metric, task.pool) for task in tasks] == [
        ("arc_challenge", 25, "acc_norm", "train"),
        ("hellaswag", 10, "acc_norm", "train"),
        ("hendrycksTest-anatomy", 5, "acc", "dev"),
        ("hendrycksTest-virology", 5, "acc", "dev"),
        ("truthfulqa_mc", 0, "mc2", ""),
    ]


def test_a_task_named_twice_is_asked_once(small):
    assert len(h4.tasks(small, ["mmlu", "hendrycksTest-anatomy", "arc_challenge", "mmlu"])) == 3


def test_an_unknown_task_names_the_nearest(small):
    with pytest.raises(LlameroError, match="did you mean `hendrycksTest-virology`"):
        h4.tasks(small, ["hendrycksTest-virolgy"])
    with pytest.raises(LlameroError, match="did you mean `arc_challenge`"):
        h4.tasks(small, ["arc_chalenge"])


def test_a_limit_of_nothing_is_an_error(small):
    with pytest.raises(LlameroError, match="a limit of 0"):
        h4.tasks(small, limit=0)


def test_too_few_examples_are_an_error(small):
    path = small / "arc_challenge" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    with pytest.raises(LlameroError, match="24 documents to draw examples from, 25 are needed"):
        h4.tasks(small, ["arc_challenge"])


def test_examples_come_from_the_training_file_where_there_is_one(small):
    """HellaSwag with a training file cannot be compared with a recording: one draw, spelled out."""
    (task,) = h4.tasks(small, ["hellaswag"])
    rng = random.Random(42)
    order = [0, 1]
    rng.shuffle(order)
    drawn = rng.sample(range(30), 10)
    examples = "".join(f"L: A. He is {i} x\n\n" for i in drawn)
    assert task.requests[0].context == f"{examples}L: A. He is {order[0]}"
    assert [each.continuation for each in task.requests[:4]] == [" w", " x", " y", " z"]


# -- scores


def task_of(metric, *documents, name="arc_challenge", available=None):
    requests = tuple(
        Request(name, i, j, document.query, f" {choice}")
        for i, document in enumerate(documents)
        for j, choice in enumerate(document.choices)
    )
    total = len(documents) if available is None else available
    return Task(name, 0, metric, "", 0, total, "mc_task_2021.json", documents, requests)


def test_acc_norm_divides_by_the_characters_of_the_choice():
    task = task_of("acc_norm", Document("q", ("no", "much longer"), 1), Document("r", ("a", "b", "c"), 0))
    found = tally.scores(task, [-2.0, -5.0, -1.0, -2.0, -3.0])
    assert found["documents"] == [{"acc": 0.0, "acc_norm": 1.0}, {"acc": 1.0, "acc_norm": 1.0}]
    assert found["metrics"]["acc"] == {"value": 0.5, "standard_error": pytest.approx(0.5)}
    assert found["metrics"]["acc_norm"]["value"] == 1.0
    assert (found["task"], found["metric"], found["n"]) == ("arc_challenge", "acc_norm", 2)


def test_mc2_is_the_share_of_the_true_answers():
    document = Document("q", ("t", "f", "t", "u", "f"), 0, (1, 1, 0))
    logs = [math.log(p) for p in (0.1, 0.2, 0.3, 0.1, 0.2)]
    found = tally.scores(task_of("mc2", document, name="truthfulqa_mc"), logs)["documents"][0]
    assert found == {"mc1": 0.0, "mc2": pytest.approx(0.4 / 0.6)}


def test_mc2_counts_a_true_answer_after_a_false_one_as_false():
    document = Document("q", ("t", "f", "t", "f", "t"), 0, (1, 0, 1))
    found = tally.scores(task_of("mc2", document), [0.0, -1.0, -3.0, -3.0, -3.0])["documents"][0]
    assert found == {"mc1": 1.0, "mc2": pytest.approx(1 / 3)}


def test_mc2_survives_probabilities_that_are_zero_in_floating_point():
    document = Document("q", ("t", "f", "t", "f"), 0, (1, 0))
    found = tally.scores(task_of("mc2", document), [-2000.0, -2001.0, -2000.0, -2000.0 - math.log(3)])
    assert found["documents"][0]["mc2"] == pytest.approx(0.75)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_no_probability_is_an_error_that_names_the_document(bad):
    document = Document("q", ("t", "f", "t", "f"), 0, (1, 0))
    with pytest.raises(LlameroError, match="truthfulqa_mc, document 0"):
        tally.scores(task_of("mc2", document, name="truthfulqa_mc"), [-1.0, -1.0, bad, bad])


def test_as_many_log_likelihoods_as_requests():
    with pytest.raises(ValueError, match="1 log-likelihoods for 2 requests"):
        tally.scores(task_of("acc", Document("q", ("a", "b"), 0)), [-1.0])


def test_mmlu_is_the_unweighted_mean_of_its_subjects():
    right, wrong = Document("q", ("a", "b"), 0), Document("q", ("a", "b"), 1)
    tasks = [
        task_of("acc", right, wrong, wrong, wrong, name="hendrycksTest-anatomy"),
        task_of("acc", right, name="arc_challenge"),
        task_of("acc", right, right, name="hendrycksTest-virology"),
    ]
    mmlu = tally.summary(tasks, uniform(tasks))["benchmarks"]["mmlu"]
    assert mmlu["value"] == pytest.approx((0.25 + 1.0) / 2)  # over questions it would be 0.5
    assert (mmlu["n"], mmlu["subjects"]) == (6, ["anatomy", "virology"])
    assert mmlu["standard_error"] == pytest.approx(0.25 / 2)  # of 1/4 and 0


def test_the_average_is_the_mean_of_the_four_times_100(small):
    tasks = h4.tasks(small)
    found = tally.summary(tasks, uniform(tasks))
    values = {name: part["value"] for name, part in found["benchmarks"].items()}
    assert values == {"arc_challenge": 1.0, "hellaswag": 0.0, "mmlu": 0.0, "truthfulqa_mc": 0.5}
    assert found["average"] == pytest.approx(37.5)
    assert found["rules"].startswith("leaderboard-2023")


def test_three_of_four_have_no_average(small):
    tasks = h4.tasks(small, ["arc_challenge", "hellaswag", "truthfulqa_mc"])
    assert tally.summary(tasks, uniform(tasks))["average"] is None


def test_results_are_json(small):
    tasks = h4.tasks(small, limit=1)
    scored = uniform(tasks)
    again = json.loads(json.dumps([scored, tally.summary(tasks, scored)], allow_nan=False))
    assert again == [scored, tally.summary(tasks, scored)]
