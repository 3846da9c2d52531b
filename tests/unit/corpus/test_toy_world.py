"""The toy world keeps what it asks out of what it teaches."""

import re
from collections import Counter
from itertools import islice

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import toy_world
from llamero.corpus.toy_world import conversations, conversations_with_facts, documents, questions

MANY = 20_000
EQUATION = re.compile(r"(\d+) ([+-]) (\d+)")
MESSAGE = re.compile(r"From (\w+) to (\w+): I left the (\w+) in (\w+)\.")
REPLY = re.compile(r"Reply of (\w+): I will get the (\w+) from (\w+) in (\w+)\.")


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request):
    return toy_world.world(request.param)


@pytest.fixture(scope="module")
def taught(world):
    """Conversations as text, each with its fact."""
    return [(said(messages), fact) for messages, fact in conversations_with_facts(world, MANY)]


@pytest.fixture(scope="module")
def texts(world, taught):
    return [*documents(world, MANY), *(text for text, _ in taught)]


def words(text):
    return set(re.findall(r"\w+", text))


def said(messages):
    return "\n".join(message["content"] for message in messages)


def equations(text):
    return {("arithmetic", *found) for found in EQUATION.findall(text)}


def messages_in(text):
    """Return the messages of a text as facts, those included that a reply gives away."""
    told = {("dialogue", *found) for found in MESSAGE.findall(text)}
    replied = {("dialogue", s, r, item, town) for r, item, s, town in REPLY.findall(text)}
    assert len(MESSAGE.findall(text)) == text.count("I left")
    assert len(REPLY.findall(text)) == text.count("I will get")
    return told | replied


def test_sizes_are_those_that_were_measured_to_be_learnable(world):
    assert len(world.taught) == len(world.tested) == 40
    assert len(world.sums) + len(world.held_out_sums) == 990
    assert len(world.held_out_sums) == 140
    share = len(world.held_out_messages) / (len(world.messages) + len(world.held_out_messages))
    assert share == pytest.approx(0.1, abs=0.001)
    assert all(8 <= len(attribute.values) <= 12 for attribute in toy_world.ATTRIBUTES)
    assert all(len(attribute.statements) == 5 for attribute in toy_world.ATTRIBUTES)
    names = [person.name for person in world.taught + world.tested]
    assert len(set(names)) == 80
    assert not set(names) & set(toy_world.SENDERS)


def test_no_conversation_was_made_from_the_fact_of_a_question(world, taught):
    asked = {question.fact for question in questions(world)}
    facts = {fact for _, fact in taught}
    assert not asked & facts
    assert len(facts) > 3000  # the draw is wide enough for the comparison to mean something


def test_no_conversation_names_a_person_of_a_question(world, taught):
    people = {person.name for person in world.tested}
    asked = {question.fact[1] for question in questions(world) if question.category == "facts"}
    assert asked == people
    assert not any(words(text) & people for text, _ in taught)


def test_every_tested_fact_can_be_read_in_the_documents(world, texts):
    statements = {
        sentence for text in texts[:MANY] for sentence in re.findall(r"[^.]+\.", text) if not text.startswith("From")
    }
    for question in questions(world):
        if question.category == "facts":
            _, person, value = question.fact
            assert any({person, value} <= words(sentence) for sentence in statements)


def test_a_held_out_sum_is_in_no_text(world, texts):
    held_out = set(world.held_out_sums)
    seen = set().union(*map(equations, texts))
    assert seen == set(world.sums)
    assert not seen & held_out


def test_a_held_out_message_is_in_no_text(world, texts):
    seen = set().union(*map(messages_in, texts))
    assert len(seen) > 3000
    assert not seen & set(world.held_out_messages)
    asked = [question for question in questions(world) if question.category == "dialogues"]
    assert all(messages_in(question.question) == {question.fact} for question in asked)


def test_every_sum_is_right_and_needs_no_carry(world):
    for text in documents(world, 2000):
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) is (\d+)\.", text):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert int(a) // 10 == int(c) // 10 >= 1


def test_right_answers_are_balanced_over_the_positions(world):
    for category in ("facts", "arithmetic", "dialogues"):
        count = Counter(question.answer for question in questions(world) if question.category == category)
        assert count == {0: 50, 1: 50, 2: 50, 3: 50}


def test_options_are_distinct_and_exactly_one_is_right(world):
    everybody = {person.name: person for person in world.taught + world.tested}
    for question in questions(world):
        assert len(set(question.options)) == 4
        right = question.options[question.answer]
        if question.category == "facts":
            name, person, value = question.fact
            kinds = [attribute.name for attribute in toy_world.ATTRIBUTES]
            assert everybody[person].values[kinds.index(name)] == value
            fits = [value in words(option) for option in question.options]
        elif question.category == "arithmetic":
            _, a, sign, b = question.fact
            result = int(a) + int(b) if sign == "+" else int(a) - int(b)
            fits = [option == f"It is {result}." for option in question.options]
        else:
            _, sender, _, item, town = question.fact
            who = question.question.splitlines()[1].startswith("Who")
            fits = [bool(words(option) & ({sender} if who else {item, town})) for option in question.options]
        assert fits.count(True) == 1
        assert fits[question.answer]
        assert right.startswith("It is ")


def test_a_value_looks_the_same_in_statements_and_answers():
    for attribute in toy_world.ATTRIBUTES:
        assert " {v}" in attribute.answer
        assert " the {v}" not in attribute.answer
        for statement in attribute.statements:
            assert " {v}" in statement
            assert " the {v}" not in statement
            assert 0 < statement.index(" {p}") < statement.index(" {v}")
        assert all(" {p}" in question for question in attribute.questions)


def test_what_is_asked_of_a_message_follows_one_word_in_the_reply_and_in_the_answer():
    for part, _, answer in toy_world.MESSAGE_QUESTIONS:
        cue = answer.removeprefix("It is ").removesuffix(" {v}.")
        assert f" {cue} {{{part}}}" in toy_world.REPLY
        assert f"{cue} {{{part}}}" in toy_world.MESSAGE.lower()


def test_one_seed_gives_one_world_and_its_texts_in_one_order():
    first, second = toy_world.world(7), toy_world.world(7)
    assert first == second
    assert list(documents(first, 50)) == list(documents(second, 50))
    assert list(documents(first, 50)) == list(islice(documents(second, 500), 50))
    assert list(conversations(first, 50)) == list(islice(conversations(second, 500), 50))
    assert questions(first) == questions(second)


def test_seeds_give_distinct_worlds():
    worlds = [toy_world.world(seed) for seed in range(5)]
    assert len({each.tested for each in worlds}) == 5
    assert len({each.held_out_sums for each in worlds}) == 5
    assert len({tuple(documents(each, 20)) for each in worlds}) == 5


def test_kinds_are_drawn_as_stated(texts, taught):
    kinds = Counter(
        "equation" if EQUATION.search(text) else "dialogue" if text.startswith("From") else "people"
        for text in texts[:MANY]
    )
    assert kinds["equation"] / MANY == pytest.approx(9 / 15.25, abs=0.02)
    assert kinds["dialogue"] / MANY == pytest.approx(4 / 15.25, abs=0.02)
    facts = Counter(fact[0] for _, fact in taught)
    assert facts["arithmetic"] / MANY == pytest.approx(6 / 15, abs=0.02)
    assert facts["dialogue"] / MANY == pytest.approx(4 / 15, abs=0.02)
    assert facts["chat"] / MANY == pytest.approx(1 / 15, abs=0.02)


def test_a_question_is_asked_once(world):
    asked = [question.question for question in questions(world)]
    assert len(asked) == len(set(asked)) == 600


def test_more_questions_than_there_are_is_an_error(world):
    assert len(questions(world, per_category=280)) == 3 * 280
    with pytest.raises(LlameroError, match="there are 280"):
        questions(world, per_category=281)
    with pytest.raises(LlameroError, match="0 questions"):
        questions(world, per_category=0)
