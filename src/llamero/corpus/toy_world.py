"""A small world to learn in minutes: eighty people, small sums and short messages, drawn from one seed.

A model reads about everything in `documents`, learns to answer in `conversations`, and is examined with `questions`
whose facts no conversation holds:

- facts: the conversations ask about half of the people, the questions about the other half, who are read about only;
- arithmetic: two digits plus or minus one, without carry or borrow; one in seven is held out of every text;
- dialogues: messages (sender, receiver, item, town); one in ten is held out of every text.

What a very small model needs is built in. The name stands before the value, and a value always follows a space, in
statements and answers alike, because a byte-level vocabulary has different tokens for "blue" and " blue". Results have
as many digits as what they come from, so that each digit is found at one distance. Whatever is asked of a message
follows the same word in message, reply and answer ("in", "the", "from"). And towns and items of messages are those of
people, because words that are known already as one kind are the sooner found and copied.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import TYPE_CHECKING, TypeVar

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

Fact = tuple[str, ...]
"""What a text was made from: (attribute, person, value) | ("arithmetic", a, sign, b) |
("dialogue", sender, receiver, item, town) | ("chat", greeting)."""

Message = dict[str, str]
"""`role` and `content`."""

VERSION = 2
"""Raised when the same seed makes another world, so that what was made from the older one is made again."""

NUM_PEOPLE = 80
TWO_DIGITS = range(10, 100)
NUM_HELD_OUT_SUMS = 140
HELD_OUT_MESSAGES = 0.1
NUM_OPTIONS = 4

_NAMES = """
Ada Alma Amos Arlo Asa Axel Beth Bo Boris Cleo Clara Colin Cora Cyrus Dara Della Dora Edith Edwin Elena
Elsa Emil Enid Ezra Faye Felix Flora Gail Gemma Gus Hal Hanna Hazel Hector Hugo Ida Igor Ines Iris Ivan
Jade Jasper Jonas Judith June Kara Karl Kira Lara Leo Lena Lotte Luca Lydia Mabel Magnus Marta Mila Milo
Mona Nadia Nils Nora Odette Olaf Olga Orla Oscar Otto Pearl Petra Quinn Ralph Rhea Rosa Rufus Ruth Selma
Simon Stella Tara Theo Tilda Tobias Tessa Ulla Uma Vera Vito Wanda Wilma Xenia Yara Yuri Zelda Zoe
"""
PEOPLE = tuple(_NAMES.split())
SENDERS = ("Anna", "Ben", "Carl", "Dina", "Eva", "Fred", "Greta", "Hans")


@dataclass(frozen=True)
class Attribute:
    """Something that every person has; `{p}` is the person, `{v}` the value."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


TOWN = Attribute(
    "town",
    ("Dalby", "Corfen", "Marlow", "Norwick", "Pelham", "Ruston", "Selby", "Tarn", "Velden", "Wexley"),
    (
        "The town of {p} is {v}.",
        "The home of {p} is in {v}.",
        "These days {p} lives in {v}.",
        "You can visit {p} in {v}.",
        "The house that {p} owns is in {v}.",
    ),
    ("What is the town of {p}?", "In which town does {p} live?", "Where is the home of {p}?"),
    "It is {v}.",
)
INSTRUMENT = Attribute(
    "instrument",
    ("cello", "drum", "flute", "guitar", "harp", "piano", "trumpet", "violin"),
    (
        "The instrument of {p} is a {v}.",
        "At night {p} plays a {v}.",
        "You often hear {p} practise on a {v}.",
        "Long ago {p} learned to play a {v}.",
        "At every feast {p} brings a {v} along.",
    ),
    ("What is the instrument of {p}?", "Which instrument does {p} play?", "What does {p} play?"),
    "It is a {v}.",
)
ATTRIBUTES = (
    Attribute(
        "job",
        (
            *("baker", "doctor", "farmer", "judge", "miner", "nurse"),
            *("painter", "pilot", "sailor", "singer", "tailor", "teacher"),
        ),
        (
            "The job of {p} is that of a {v}.",
            "At work {p} is a {v}.",
            "Each day {p} works as a {v}.",
            "People know {p} as a {v}.",
            "By trade {p} is a {v}.",
        ),
        ("What is the job of {p}?", "Which job does {p} have?", "What does {p} work as?"),
        "It is a {v}.",
    ),
    TOWN,
    Attribute(
        "pet",
        ("cat", "dog", "goat", "hamster", "parrot", "pony", "rabbit", "turtle"),
        (
            "The pet of {p} is a {v}.",
            "At home {p} keeps a {v}.",
            "Every morning {p} feeds a {v}.",
            "You may see {p} walk with a {v}.",
            "Some years ago {p} found a {v}.",
        ),
        ("What is the pet of {p}?", "Which pet does {p} have?", "Which animal does {p} keep?"),
        "It is a {v}.",
    ),
    Attribute(
        "colour",
        ("black", "blue", "green", "orange", "purple", "red", "white", "yellow"),
        (
            "The favourite colour of {p} is {v}.",
            "Of all colours {p} likes {v} best.",
            "If asked, {p} will choose {v} paint.",
            "The colour that {p} loves is {v}.",
            "Most of all {p} wears {v} clothes.",
        ),
        ("What is the favourite colour of {p}?", "Which colour does {p} like?", "Which colour does {p} love?"),
        "It is {v}.",
    ),
    INSTRUMENT,
)

SUM = "{a} {sign} {b} is {c}."
SUM_QUESTIONS = ("What is {a} {sign} {b}?", "How much is {a} {sign} {b}?")

MESSAGE = "From {sender} to {receiver}: I left the {item} in {town}."
REPLY = "Reply of {receiver}: I will get the {item} from {sender} in {town}."
MESSAGE_QUESTIONS = (
    ("town", "Where is the {item}?", "It is in {v}."),
    ("town", "In which town is the {item}?", "It is in {v}."),
    ("item", "What is in {town}?", "It is the {v}."),
    ("item", "What did {sender} leave in {town}?", "It is the {v}."),
    ("sender", "Who is the {item} from?", "It is from {v}."),
    ("sender", "Who is the message from?", "It is from {v}."),
)
MESSAGE_VALUES = {"town": TOWN.values, "item": INSTRUMENT.values, "sender": SENDERS}

CHAT = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi!", "Hello! What would you like to know?"),
    ("How are you?", "I am fine, thank you."),
    ("Who are you?", "I am a small model of a small world."),
    ("What can you do?", "I know some people, I can add a little, and I read messages."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
)

DOCUMENT_WEIGHTS = {"biography": 2.0, "mixed": 0.25, "equation": 9.0, "dialogue": 4.0}
CONVERSATION_WEIGHTS = {"fact": 4.0, "arithmetic": 6.0, "dialogue": 4.0, "chat": 1.0}
MIXED_FACTS = 6


@dataclass(frozen=True)
class Person:
    """Somebody and the value of each of the `ATTRIBUTES`, in their order."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """Everything that is so under one seed.

    Args:
        seed: What the world, and every text about it, was drawn from.
        taught: People that conversations ask about.
        tested: People that questions ask about; only documents tell of them.
        sums: Equations for documents and conversations, as facts.
        held_out_sums: Equations for questions.
        messages: Messages for documents and conversations, as facts.
        held_out_messages: Messages for questions.
    """

    seed: int
    taught: tuple[Person, ...]
    tested: tuple[Person, ...]
    sums: tuple[Fact, ...]
    held_out_sums: tuple[Fact, ...]
    messages: tuple[Fact, ...]
    held_out_messages: tuple[Fact, ...]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; the options are whole answers, and `options[answer]` is right.

    Args:
        category: "facts", "arithmetic" or "dialogues".
        fact: What no conversation may hold.
    """

    category: str
    question: str
    options: tuple[str, ...]
    answer: int
    fact: Fact


@dataclass(frozen=True)
class Asked:
    """A question about a fact, its answer, and wrong answers of the same form."""

    question: str
    right: str
    wrong: tuple[str, ...]


def world(seed: int) -> World:
    """Return the world of a seed."""
    rng = random.Random(f"world {seed}")
    names = rng.sample(PEOPLE, NUM_PEOPLE)
    # Every value is had equally often, so that guessing the commonest does not help.
    columns = [rng.sample(list(islice(cycle(attribute.values), NUM_PEOPLE)), NUM_PEOPLE) for attribute in ATTRIBUTES]
    people = [Person(*both) for both in zip(names, zip(*columns, strict=True), strict=True)]
    held_out_sums = frozenset(rng.sample(_all_sums(), NUM_HELD_OUT_SUMS))
    messages = [
        ("dialogue", sender, receiver, item, town)
        for sender, receiver, item, town in product(SENDERS, SENDERS, INSTRUMENT.values, TOWN.values)
        if sender != receiver
    ]
    rng.shuffle(messages)
    border = round(len(messages) * HELD_OUT_MESSAGES)
    return World(
        seed=seed,
        taught=tuple(people[: NUM_PEOPLE // 2]),
        tested=tuple(people[NUM_PEOPLE // 2 :]),
        sums=tuple(fact for fact in _all_sums() if fact not in held_out_sums),
        held_out_sums=tuple(fact for fact in _all_sums() if fact in held_out_sums),
        messages=tuple(messages[border:]),
        held_out_messages=tuple(messages[:border]),
    )


def documents(world: World, count: int) -> Iterator[str]:
    """Yield `count` texts for language modelling; fewer are the beginning of more.

    One is a biography, six mixed facts, one equation or one message with its reply, drawn 2:0.25:9:4.
    """
    rng = random.Random(f"documents {world.seed}")
    kinds: dict[str, Callable[[], str]] = {
        "biography": lambda: _biography(world, rng),
        "mixed": lambda: " ".join(_statement(fact, rng) for fact in rng.sample(_facts(world), MIXED_FACTS)),
        "equation": lambda: _equation(rng.choice(world.sums)),
        "dialogue": lambda: "\n".join(_dialogue(rng.choice(world.messages))),
    }
    for kind in _draws(DOCUMENT_WEIGHTS, count, rng):
        yield kinds[kind]()


def conversations(world: World, count: int) -> Iterator[list[Message]]:
    """Yield `count` instruction samples, each one user turn and one answer; fewer are the beginning of more.

    Facts, arithmetic, dialogues and chat are drawn 4:6:4:1.
    """
    for messages, _ in conversations_with_facts(world, count):
        yield messages


def conversations_with_facts(world: World, count: int) -> Iterator[tuple[list[Message], Fact]]:
    """Yield what `conversations` yields, each with the fact that it was made from."""
    rng = random.Random(f"conversations {world.seed}")
    known = _facts_of(world.taught)
    for kind in _draws(CONVERSATION_WEIGHTS, count, rng):
        if kind == "chat":
            question, answer = rng.choice(CHAT)
            yield _chat(question, answer), ("chat", question)
            continue
        fact = rng.choice({"fact": known, "arithmetic": world.sums, "dialogue": world.messages}[kind])
        asked = rng.choice(_ways_to_ask(fact))
        yield _chat(asked.question, asked.right), fact


def questions(world: World, *, per_category: int = 200) -> list[Question]:
    """Return held-out questions in three categories, the position of the right answer balanced in each.

    A fact is asked in a second wording only after every fact of its category was asked once (140 equations make
    200 questions).
    """
    rng = random.Random(f"questions {world.seed}")
    held_out: dict[str, Sequence[Fact]] = {
        "facts": _facts_of(world.tested),
        "arithmetic": world.held_out_sums,
        "dialogues": world.held_out_messages,
    }
    return [
        question for category, facts in held_out.items() for question in _examine(category, facts, per_category, rng)
    ]


def _examine(category: str, facts: Sequence[Fact], count: int, rng: random.Random) -> Iterator[Question]:
    wordings = {fact: _shuffled(_ways_to_ask(fact), rng) for fact in _shuffled(facts, rng)}
    rounds = max(len(ways) for ways in wordings.values())
    order = [(fact, ways[i]) for i in range(rounds) for fact, ways in wordings.items()]
    if not 1 <= count <= len(order):
        raise LlameroError(
            f"{count} questions on {category}, there are {len(order)}",
            fix=f"ask for 1 to {len(order)} per category",
        )
    positions = _shuffled([i % NUM_OPTIONS for i in range(count)], rng)
    for (fact, asked), position in zip(order, positions, strict=False):
        options = rng.sample(asked.wrong, NUM_OPTIONS - 1)
        options.insert(position, asked.right)
        yield Question(category, asked.question, tuple(options), position, fact)


# -- what is so


def _all_sums() -> list[Fact]:
    """Return every a ± b with a of two digits and b of one that needs neither carry nor borrow: 990."""
    return [
        ("arithmetic", str(a), sign, str(b))
        for a, b in product(TWO_DIGITS, range(10))
        for sign, easy in (("+", a % 10 + b <= 9), ("-", a % 10 >= b))
        if easy
    ]


def _facts(world: World) -> list[Fact]:
    return _facts_of(world.taught + world.tested)


def _facts_of(people: Sequence[Person]) -> list[Fact]:
    return [
        (attribute.name, person.name, value)
        for person in people
        for attribute, value in zip(ATTRIBUTES, person.values, strict=True)
    ]


# -- how it is said


def _biography(world: World, rng: random.Random) -> str:
    person = rng.choice(world.taught + world.tested)
    return " ".join(_statement(fact, rng) for fact in _shuffled(_facts_of([person]), rng))


def _statement(fact: Fact, rng: random.Random) -> str:
    name, person, value = fact
    return rng.choice(_BY_NAME[name].statements).format(p=person, v=value)


def _equation(fact: Fact) -> str:
    _, a, sign, b = fact
    return SUM.format(a=a, sign=sign, b=b, c=_result(fact))


def _dialogue(fact: Fact) -> tuple[str, str]:
    parts = _parts(fact)
    return MESSAGE.format(**parts), REPLY.format(**parts)


def _ways_to_ask(fact: Fact) -> list[Asked]:
    """Return every wording of a question about a fact."""
    if fact[0] == "arithmetic":
        return _ask_sum(fact)
    if fact[0] == "dialogue":
        return _ask_message(fact)
    name, person, value = fact
    attribute = _BY_NAME[name]
    wrong = tuple(attribute.answer.format(v=other) for other in attribute.values if other != value)
    right = attribute.answer.format(v=value)
    return [Asked(question.format(p=person), right, wrong) for question in attribute.questions]


def _ask_sum(fact: Fact) -> list[Asked]:
    _, a, sign, b = fact
    result = _result(fact)
    near = (result + step for step in (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20))
    wrong = tuple(f"It is {other}." for other in near if other in TWO_DIGITS)
    wordings = (wording.format(a=a, sign=sign, b=b) for wording in SUM_QUESTIONS)
    return [Asked(question, f"It is {result}.", wrong) for question in wordings]


def _ask_message(fact: Fact) -> list[Asked]:
    parts = _parts(fact)
    message, _ = _dialogue(fact)
    return [
        Asked(
            question=f"{message}\n{question.format(**parts)}",
            right=answer.format(v=parts[part]),
            wrong=tuple(answer.format(v=other) for other in MESSAGE_VALUES[part] if other != parts[part]),
        )
        for part, question, answer in MESSAGE_QUESTIONS
    ]


def _parts(fact: Fact) -> dict[str, str]:
    return dict(zip(("sender", "receiver", "item", "town"), fact[1:], strict=True))


def _result(fact: Fact) -> int:
    _, a, sign, b = fact
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def _chat(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# -- drawing


def _draws(weights: dict[str, float], count: int, rng: random.Random) -> Iterator[str]:
    if count < 0:
        raise ValueError(f"{count} texts")
    names, shares = list(weights), list(weights.values())
    return (rng.choices(names, shares)[0] for _ in range(count))


def _shuffled(values: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(values, len(values))


_BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}
