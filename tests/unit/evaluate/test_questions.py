"""The rules that decide every request, on documents made up here."""

import random

import pytest

from llamero.corpus.benchmarks import MmluRow
from llamero.evaluate import h4
from llamero.evaluate.questions import LEADERBOARD_2023, LM_EVAL, Document, Plan, build, drawn_beside

POOL = [Document(f"question {n}", ("yes", "no"), n % 2) for n in range(20)]


def built(rules, preamble, limit=None):
    return build(Plan("made_up", 2, "acc", "itself", len(POOL), rules=rules), POOL, preamble, limit)


def named(documents):
    return "".join(f"{one.query}\n" for one in documents)


def test_the_leaderboard_shuffles_and_goes_on_drawing_with_one_generator():
    task = built(LEADERBOARD_2023, lambda rng, _: named(rng.sample(POOL, 2)), limit=5)
    rng, order = random.Random(42), list(POOL)
    rng.shuffle(order)
    contexts = [named(rng.sample(POOL, 2)) + document.query for document in order[:5]]
    assert [request.context for request in task.requests] == [context for context in contexts for _ in "ab"]
    assert [request.continuation for request in task.requests] == [" yes", " no"] * 5


def test_lm_eval_keeps_the_order_and_draws_with_a_generator_of_the_task():
    task = built(LM_EVAL, lambda rng, _: named(rng.sample(POOL, 2)), limit=5)
    rng = random.Random(1234)
    contexts = [named(rng.sample(POOL, 2)) + document.query for document in POOL[:5]]
    assert [request.context for request in task.requests] == [context for context in contexts for _ in "ab"]


def test_a_question_is_never_its_own_example():
    task = built(LEADERBOARD_2023, drawn_beside(POOL, 19, named))  # all of the pool is drawn, every time
    for document, request in zip(task.documents, task.requests[::2], strict=True):
        shown = request.context.splitlines()
        assert len(shown) == 20
        assert shown.count(document.query) == 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" a  b ", "a b"),
        ("a   b", "a  b"),  # replaced once, as the harness does: three become two
        ("Stretch [title] Sit down [step] now", "Stretch. Sit down now"),
    ],
)
def test_hellaswag_loses_its_markup(text, cleaned):
    assert h4._clean(text) == cleaned


def test_space_around_a_question_of_mmlu_is_not_asked():
    row = MmluRow("made up", "\n What is one? ", ("1", " 2", "3 ", "4"), 0)
    assert h4._mmlu_query(row) == "What is one?\nA. 1\nB.  2\nC. 3 \nD. 4\nAnswer:"
