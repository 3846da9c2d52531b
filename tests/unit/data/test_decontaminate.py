"""Test questions are found in whatever dress they come, and hardly anything else is."""

import json
import os
import pickle
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus import overlap, rows
from llamero.corpus.samples import Chat, Document
from llamero.data import decontaminate
from llamero.data.decontaminate import Index, Report, TestText, load_tests, statement, texts_of
from llamero.text.messages import Message

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
LONG = "a farmer who keeps eleven brown hens sells every third egg at the village market on sunny Sundays"
SHORT = "Where do fortune cookies come from?"


def found(texts, *tests, ngram=13):
    return Index(tests, ngram=ngram).find(list(texts))


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_a_passage_is_shown_as_it_stands_in_the_sample():
    text = f"Tell me:\n«{LONG.upper().replace(' ', '  ')}!» Well."
    (match,) = found([text], TestText("eggs", "7", (LONG,)))
    assert match is not None
    assert (match.test, match.id, match.words, match.share) == ("eggs", "7", 18, 1.0)
    assert text[match.start : match.stop] == match.passage == f"«{LONG.upper().replace(' ', '  ')}!»"


def test_a_long_passage_is_cut_for_the_report():
    words = " ".join(f"word{number}" for number in range(200))
    (match,) = found([words], TestText("t", "1", (words,)))
    assert match is not None
    assert (match.words, match.start, match.stop, len(match.passage)) == (200, 0, len(words), 300)


@pytest.mark.parametrize(("words", "there"), [(12, False), (13, True)])
def test_thirteen_words_of_a_question_or_of_an_answer_count(words, there):
    part = " ".join(LONG.split()[2 : 2 + words])
    for test in (TestText("t", "1", (LONG,)), TestText("t", "1", ("What is it about the hens?",), (LONG,))):
        assert (found([f"x {part} y"], test)[0] is not None) is there


@pytest.mark.parametrize(("words", "there"), [(7, False), (8, True)])
def test_eight_words_count_if_they_are_two_fifths_of_a_question(words, there):
    part = " ".join(LONG.split()[:words])
    assert (found([part], TestText("t", "1", (LONG,)), ngram=8)[0] is not None) is there
    assert found([part], TestText("t", "1", (f"{LONG} and buys flour for bread",)), ngram=8) == [None]
    assert found([part], TestText("t", "1", (SHORT,), (LONG,)), ngram=8) == [None]


def test_a_short_question_counts_as_a_whole():
    test = TestText("t", "1", (SHORT,))
    texts = [
        "so, where do Fortune cookies come from -- Japan?",
        "where do fortune cookies come",
        "do cookies come from",
    ]
    assert [match is not None for match in found(texts, test)] == [True, False, False]


def test_a_question_of_four_words_is_not_searched_for():
    index = Index([TestText("t", "1", ("Who are you now?",)), TestText("t", "2", (SHORT,))])
    assert index.find(["Who are you now?"]) == [None]
    assert (index.items, index.not_searched) == (Counter(t=2), Counter(t=1))


def test_what_many_test_items_ask_is_not_searched_for():
    tests = [TestText("t", str(n), ("Which of the following is true?",)) for n in range(4)]
    assert found(["Which of the following is true?"], *tests) != [None]
    tests.append(TestText("t", "4", ("Of dry sand and cold water, which of the following is true about sand alone?",)))
    index = Index(tests)
    assert index.find(["Which of the following is true?"]) == [None]
    assert index.not_searched == Counter(t=4)


@pytest.mark.parametrize("text", [" ".join(map(str, range(20))), "no " * 20, "i 1 i 2 i 3 i 4 j 5 j 6 j 7 j 8"])
def test_numbers_and_repeated_words_say_nothing(text):
    assert found([text], TestText("t", "1", (text,))) == [None]


def test_a_passage_does_not_run_on_into_the_next_text():
    half = len(LONG) // 2
    assert found([LONG[:half], LONG[half:]], TestText("t", "1", (LONG,)), ngram=13) == [None, None]


def test_the_test_item_of_which_most_is_there_is_named():
    other = "before noon " + LONG + " and buys flour for the bread of the week after"
    (match,) = found([LONG], TestText("t", "other", (other,)), TestText("t", "this", (LONG,)))
    assert match is not None
    assert match.id == "this"


def test_no_texts_and_empty_texts_are_searched_too():
    index = Index([TestText("t", "1", (LONG,))])
    assert index.find([]) == []
    assert index.find(["", "?", "short"]) == [None, None, None]
    assert Index([]).find([LONG]) == [None]


def test_passages_of_few_words_are_refused():
    with pytest.raises(LlameroError, match="passages of 4 words"):
        Index([], ngram=4)


def test_an_index_can_be_sent_to_a_worker():
    index = Index([TestText("t", "1", (LONG,))])
    assert pickle.loads(pickle.dumps(index)).find([LONG]) == index.find([LONG])


def test_everything_in_a_sample_is_searched():
    chat = Chat((Message("system", "a"), Message("context", "b"), Message("user", "c"), Message("assistant", "d")))
    assert texts_of(chat) == "a\nb\nc\nd"
    assert texts_of(Document("e")) == "e"


# -- against sets of n-grams -------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["ab", "cd", "ef", "gh", "ij", "kl", "1", "2"]), max_size=24)


def grams(words, length):
    return [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]


def plainly_found(text, tests, ngram):
    """Return whether a text holds a test item, by sets of tuples."""

    def says_something(gram):
        different = {word for word in gram if word.isalpha()}
        items = [test for test in tests if any(gram in grams(part, len(gram)) for part in (*test[0], *test[1]))]
        return 2 * len(different) >= len(gram) and len(items) <= 4

    def holds(part, question):
        length = 13 if not question else min(len(part), ngram)
        if len(part) < (5 if question else 13):
            return False
        known = {gram for gram in grams(part, length) if says_something(gram)}
        there = [gram in known for gram in grams(text, length)]
        runs = "".join("x" if hit else " " for hit in there).split()
        covered = {
            at + step
            for at, gram in enumerate(grams(part, length))
            if gram in known and gram in grams(text, length)
            for step in range(length)
        }
        searched = {at + step for at, gram in enumerate(grams(part, length)) if gram in known for step in range(length)}
        long = any(len(run) - 1 + length >= 13 for run in runs)
        return bool(runs) and (long or (question and len(covered) >= 0.4 * len(searched)))

    return any(holds(part, kind == 0) for test in tests for kind in (0, 1) for part in test[kind])


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.lists(WORDS, max_size=2), st.lists(WORDS, max_size=2)), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([8, 13]),
)
def test_the_same_is_found_by_sets_of_passages(tests, data, ngram):
    parts = [part for test in tests for kind in test for part in kind] or [[]]
    drawn = st.lists(st.one_of(WORDS, st.sampled_from(parts)), max_size=3)
    texts = [list(chain(*pieces)) for pieces in data.draw(st.lists(drawn, min_size=1, max_size=3))]
    items = [
        TestText("t", str(number), tuple(map(" ".join, questions)), tuple(map(" ".join, answers)))
        for number, (questions, answers) in enumerate(tests)
    ]
    matches = Index(items, ngram=ngram).find([" ".join(text) for text in texts])
    assert [match is not None for match in matches] == [plainly_found(text, tests, ngram) for text in texts]


# -- test sets on disk -------------------------------------------------------------------------------------------------


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "gsm8k" / "test.jsonl", {"question": "How many?", "answer": "Two.\n#### 2"})
    write(
        tmp_path / "mt_bench" / "question.jsonl", {"question_id": 81, "category": "c", "turns": ["Write it.", "Again."]}
    )
    return tmp_path


def test_a_benchmark_is_named_by_its_folder_or_by_the_one_that_holds_it(folder):
    item = TestText("gsm8k", "1", ("How many?",), ("Two.\n#### 2",))
    assert load_tests({"gsm8k": folder}) == load_tests({"gsm8k": folder / "gsm8k"}) == [item]


def test_a_folder_of_benchmarks_is_read_whole(folder):
    turns = TestText("mt_bench", "81", ("Write it.", "Again."))
    assert load_tests({"benchmarks": folder}) == [turns, *load_tests({"gsm8k": folder})]


def test_any_file_of_texts_is_a_test_set(tmp_path):
    path = write(tmp_path / "own.jsonl", {"q": "A?", "n": 3, "more": [{"a": "B"}]}, {"q": "C?"})
    assert load_tests({"own": path}) == [
        TestText("own", f"{path}:1", ("A?", "B")),
        TestText("own", f"{path}:2", ("C?",)),
    ]


@pytest.mark.parametrize(
    ("name", "problem"), [("mmlu", "neither a folder called mmlu"), ("all", "no known benchmark in it")]
)
def test_a_folder_without_the_benchmark_is_an_error(tmp_path, name, problem):
    with pytest.raises(LlameroError, match=problem) as caught:
        load_tests({name: tmp_path})
    assert caught.value.where == str(tmp_path)


def test_a_broken_file_of_tests_is_an_error(tmp_path):
    path = write(tmp_path / "own.jsonl", [1])
    with pytest.raises(LlameroError, match=r"own\.jsonl:1: not an object"):
        load_tests({"own": path})
    with pytest.raises(LlameroError, match="no such data file"):
        load_tests({"gone": tmp_path / "gone.jsonl"})


# -- the report --------------------------------------------------------------------------------------------------------


def reported(texts, *, dropped=True, ngram=13):
    tests = [TestText("gsm8k", "1", (LONG,)), TestText("own", "2", (SHORT,)), TestText("own", "3", ("Why?",))]
    index = Index(tests, ngram=ngram)
    report = Report.of(index, dropped=dropped)
    for number, text in enumerate(texts):
        report.add([f"a.jsonl:{number + 1}"], index.find([text]))
    return report


def test_a_report_counts_and_shows_examples(monkeypatch):
    monkeypatch.setattr(decontaminate, "_EXAMPLES", 1)
    said = reported([LONG, "x", LONG, SHORT]).to_json()
    assert json.loads(json.dumps(said)) == said
    assert (said["ngram"], said["dropped"], said["samples"]) == (13, True, 4)
    assert said["tests"]["gsm8k"] == {
        "items": 1,
        "published_items": 1319,
        "not_searched": 0,
        "samples": 2,
        "examples": [{"sample": "a.jsonl:1", "item": "1", "passage": LONG, "words": 18, "share": 1.0}],
    }
    assert [said["tests"]["own"][key] for key in ("items", "published_items", "not_searched", "samples")] == [
        2,
        None,
        1,
        1,
    ]


REST = (
    " Passages that more than 4 test questions share or that are mostly numbers do not count;"
    " 1 test question with no others, or of fewer than 5 words, was not searched for."
)


@pytest.mark.parametrize(
    ("texts", "dropped", "start"),
    [
        (["x"], True, "None of 1 training samples shares a 13-word passage or a whole shorter question with the tests"),
        ([LONG, "x"], True, "No training sample shares a 13-word passage or a whole shorter question with the tests"),
        ([LONG, "x"], False, "1 of 2 training samples shares a 13-word passage or a whole shorter question with the"),
    ],
)
def test_the_statement_says_what_was_searched_and_found(texts, dropped, start):
    said = statement(reported(texts, dropped=dropped))
    assert said.startswith(start)
    assert "GSM8K (1 of 1,319) and own (2)" in said
    assert said.endswith(REST)
    assert ("; 1 of 2 samples read did, and was removed." in said) == (len(texts) == 2 and dropped)
    assert (" It was kept." in said) == (not dropped)


def test_the_statement_of_eight_words_says_so():
    said = statement(reported(["x"], ngram=8))
    assert "a 13-word passage, 8 words in a row that are two fifths of a question, or a whole shorter question" in said


# -- on real data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if not (SHARED / "instruct").is_dir():
        pytest.skip(f"no data at {SHARED} (set LLAMERO_SHARED)")
    files = sorted((SHARED / "instruct").glob("*/*.json*"))
    found = [located for file in files for located in rows.rows(file)]
    texts = [(located.where, "\n".join(decontaminate._strings(located.row))) for located in found if located.row]
    return texts, load_tests({"benchmarks": SHARED / "benchmarks"})


def lettered(choices):
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJKLM", choices, strict=False))


def planted(test, way, chance, carrier):
    """Return a training sample that holds a test item in one of the ways in which they get there."""
    question = test.questions[0]
    words = question.split()
    choices = chance.sample(test.answers, len(test.answers))
    return {
        "shouted": " ".join(overlap.split(question)).upper(),
        "dressed": f"“{question.replace(' ', chr(10))}”…",
        "embedded": f"{carrier}\nNow, dear model, answer what follows. {question} Think step by step!\n{carrier}",
        "choices": f"Question: {question}\n{lettered(choices)}\nAnswer: {lettered(choices[:1])}",
        "answered": f"{question}\nI do not believe that anybody can know this, but forty-two.",
        "half": f"{carrier} " + " ".join(words[: (len(words) + 1) // 2]),
        "chat": f"Hi!\nHello, how can I help?\n{question}\nGood question.\n{carrier}",
    }[way]


WAYS = ("shouted", "dressed", "embedded", "choices", "answered", "half", "chat")


@pytest.mark.parametrize("ngram", [13, 8])
def test_every_test_item_that_is_searched_for_is_found_by_its_question(real, ngram):
    _, tests = real
    index = Index(tests, ngram=ngram)
    copies = [f"Now: {' '.join(overlap.split(' '.join(test.questions)))}".upper() for test in tests]
    missed = Counter(test.test for test, match in zip(tests, index.find(copies), strict=True) if match is None)
    assert sum(index.not_searched.values()) <= 0.02 * len(tests)
    assert all(count <= index.not_searched[test] for test, count in missed.items())


@pytest.mark.parametrize("ngram", [13, 8])
def test_what_is_planted_is_found_and_little_else(real, ngram):
    texts, tests = real
    chance = random.Random(ngram)
    index = Index(tests, ngram=ngram)
    searched = {
        (index.parts[part].item)
        for table in index._tables.values()
        for part in table.parts.tolist()
        if index.parts[part].question
    }
    samples, expected = [], {}
    for name in index.items:
        for way in WAYS:
            # half of a question is only looked for in questions of which half is 13 words
            least = 26 if way == "half" else 0
            fitting = [
                test
                for number, test in enumerate(tests)
                if test.test == name and number in searched and len(overlap.split(test.questions[0])) >= least
            ]
            test = chance.choice(fitting)
            _, carrier = chance.choice(texts)
            expected[len(samples)] = test
            samples.append(planted(test, way, chance, carrier[:2000]))
    short = [
        test
        for number, test in enumerate(tests)
        if test.test in ("arc_challenge", "truthfulqa")
        and number in searched
        and 5 <= len(overlap.split(test.questions[0])) <= 12
    ]
    for test in chance.sample(short, 10):
        expected[len(samples)] = test
        samples.append(planted(test, chance.choice(["shouted", "dressed", "embedded", "chat"]), chance, texts[0][1]))
    assert len(expected) >= 50

    matches = index.find(samples)
    missed = [test.id for number, test in expected.items() if matches[number] is None]
    assert missed == []

    alarms = [match for match in index.find([text for _, text in texts]) if match]
    assert len(texts) > 7000
    assert len(alarms) <= 0.01 * len(texts)
    assert len(alarms) == {13: 8, 8: 13}[ngram]  # each one looked at: docs/decisions/…-overlap-and-duplicates.md


def test_the_folder_of_another_benchmark_is_refused(tmp_path):
    for name in ("gsm8k", "mmlu"):
        (tmp_path / name).mkdir()
    with pytest.raises(LlameroError, match="neither a folder called gsm8k"):
        load_tests({"gsm8k": tmp_path / "mmlu"})
