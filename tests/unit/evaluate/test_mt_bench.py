"""MT-Bench's rules: what is asked, how words become a score; and the published scores from the published replies."""

import json
import os
import statistics
from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import mt_bench as corpus
from llamero.evaluate.mt_bench import (
    Game,
    Match,
    Rated,
    Record,
    pair,
    rating,
    records,
    scores,
    single,
    temperature,
    verdict,
)
from llamero.evaluate.recorded import recomputed

DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
PUBLISHED = DATA / "published" / "fasteval" / "mt-bench"
MODELS = sorted(PUBLISHED.iterdir()) if PUBLISHED.is_dir() else []
needs_data = pytest.mark.skipif(not MODELS, reason=f"no {PUBLISHED}")


@needs_data
@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_the_published_scores_follow_from_the_published_replies(directory):
    (published,) = directory.rglob("scores.json")
    assert json.dumps(recomputed(directory), indent=4) == published.read_text()


@needs_data
def test_replies_away_from_their_questions_and_with_other_questions(tmp_path):
    (replies,) = MODELS[0].rglob("judge-replies.json")
    alone = tmp_path / "judge-replies.json"
    alone.write_bytes(replies.read_bytes())
    expected = json.loads(replies.with_name("scores.json").read_text())
    assert recomputed(tmp_path) == recomputed(alone) == recomputed(alone, DATA / "benchmarks") == expected


def test_replies_that_cannot_be_scored(tmp_path):
    with pytest.raises(LlameroError, match=r"no judge-replies\.json in it"):
        recomputed(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "judge-replies.json").write_text("[]")
    with pytest.raises(LlameroError, match=r"2 reports in it \(a, b\)"):
        recomputed(tmp_path)
    for said, problem in [
        ([], "no replies"),
        ([{"question_id": "81"}], "needs question_id, turn_number and judge_reply"),
        ([{"question_id": "7", "turn_number": 0, "judge_reply": "[[3]]"}], "question 7 is unknown"),
        ([{"question_id": "81", "turn_number": 3, "judge_reply": "[[3]]"}], "turn_number 3"),
        ([{"question_id": "81", "turn_number": 0, "judge_reply": "[[3]]"}], "no reply to turn 2 holds a rating"),
    ]:
        (tmp_path / "a" / "judge-replies.json").write_text(json.dumps(said))
        with pytest.raises(LlameroError, match=problem):
            recomputed(tmp_path / "a")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[7.5]]", 7.5),
        ("[[8.]]", 8.0),
        ("first [[3]], then [[9]]", 3),
        ("Rating: [6]", 6),
        ("see [1], Rating: [[4]]", 4),  # double brackets first
        ("Rating: [[85]]", 85),
        ("Rating: [[08]]", 8.0),
        ("Rating: [[-3]]", -1),
        ("Rating: [[five]]", -1),
        ("Rating: 5", -1),
        ("[[A]]", -1),
        ("", -1),
        ("$ERROR$", -1),
    ],
)
def test_a_rating_is_read_as_fastchat_reads_it(said, expected):
    assert rating(said) == expected
    assert type(rating(said)) is type(expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("so [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]]", "tie"),
        ("[A]", "error"),
        ("", "error"),
        ("not [[B]] but [[A]]", "A"),
    ],
)
def test_a_verdict_is_read_as_fastchat_reads_it(said, expected):
    assert verdict(said) == expected


def test_temperatures():
    assert [temperature(c) for c in ("writing", "math", "stem", "something else")] == [0.7, 0.0, 0.1, 0.7]


# -- scores

CATEGORIES = {1: "math", 2: "stem"}


def test_the_overall_score_is_the_mean_of_all_ratings():
    found = scores([Rated(1, 1, 10), Rated(1, 2, 4), Rated(2, 1, 7.5), Rated(2, 2, -1)], CATEGORIES)
    assert found.overall == (10 + 4 + 7.5) / 3
    assert found.turns == {1: 8.75, 2: 4.0}
    assert found.mean_of_turns == (8.75 + 4) / 2  # FastEval's, another number when a rating is missing
    assert found.categories == {"math": 7.0, "stem": 7.5}
    assert (found.nothing, found.beyond, found.spread) == (1, 0, None)


def test_votes_have_a_spread():
    rated = [Rated(1, turn, score, vote) for vote, score in ((1, 6), (2, 7), (3, 8)) for turn in (1, 2)]
    found = scores([*rated, Rated(2, 1, 70, 1)], CATEGORIES)
    assert found.spread == pytest.approx(statistics.stdev([82 / 3, 7, 8]))
    assert found.beyond == 1


def test_a_judge_that_says_nothing_is_an_error():
    with pytest.raises(LlameroError, match="none of 1 judgments of turn 2 holds a rating"):
        scores([Rated(1, 1, 5), Rated(2, 1, 5), Rated(1, 2, -1)], CATEGORIES)


def test_only_who_wins_in_both_orders_wins():
    one, two = "model_1", "model_2"
    games: list[tuple[Game, Game]] = [(one, one), (one, two), ("tie", one), (two, two), ("tie", "tie"), ("error", one)]
    found = records(Match("x", "y", each) for each in [*games, (one, one)])
    assert found == {"x": Record(2, 1, 3), "y": Record(1, 2, 3)}
    assert found["x"].adjusted == 3.5 / 6


# -- what a judge is asked


@pytest.fixture(scope="module")
def bench():
    if not (DATA / "benchmarks" / "mt_bench").is_dir():
        pytest.skip(f"no {DATA / 'benchmarks' / 'mt_bench'}")
    return corpus.load(DATA / "benchmarks")


def test_every_question_gets_its_prompt(bench):
    whose, reference = bench.reference("some judge")
    assert whose == "gpt-4"
    for question in bench.questions:
        answer = ("one {answer}", "zwei")  # braces of an answer are no places to fill
        refers = question.category in ("math", "reasoning", "coding")
        for turn in (1, 2):
            asked = single(bench, question, turn, answer, reference)
            assert asked.prompt.name == f"single-{'math-' if refers else ''}v1{'' if turn == 1 else '-multi-turn'}"
            assert question.turns[turn - 1] in asked.text
            assert answer[turn - 1] in asked.text
            assert ("zwei" in asked.text.split()) == (turn == 2)
            assert (refers and reference[question.id][0] in asked.text) == refers
            both = pair(bench, question, turn, answer, ("drei", "vier"), reference)
            assert both.prompt.name == f"pair-{'math-v1' if refers else 'v2'}{'' if turn == 1 else '-multi-turn'}"
            assert both.text.index("one {answer}") < both.text.index("drei")


def test_a_prompt_is_fastchats_word_for_word(bench):
    question = bench.questions[0]
    asked = single(bench, question, 1, ("My answer.", "…"), {})
    told = bench.prompts["single-v1"].template
    assert asked.text == told.replace("{question}", question.turns[0]).replace("{answer}", "My answer.")
    assert asked.prompt.system == "You are a helpful assistant."


def test_a_missing_reference_is_an_error(bench):
    math = next(question for question in bench.questions if question.category == "math")
    with pytest.raises(LlameroError, match=rf"no reference answer to question {math.id} \(math\)"):
        single(bench, math, 1, ("a", "b"), {})
