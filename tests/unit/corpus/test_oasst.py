import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.corpus import layouts, oasst, rows
from llamero.corpus.layouts import Options
from llamero.corpus.rows import Located
from llamero.corpus.samples import BadRowError, Chat, LeftOut
from llamero.text.messages import Message

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data/instruct/oasst"
NEEDS_SHARED = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")


def all_paths(message):
    """Every way from the root to any message, with the siblings of each message on it (itself included)."""
    yield [message]
    for reply in message.get("replies") or []:
        for path in all_paths(reply):
            yield [message, *path]


def siblings(path, place):
    return path[place - 1].get("replies") or [] if place else [path[0]]


def is_good(path, *, top_k, synthetic):
    """The rules by their definition, one after the other."""
    last = path[-1]
    if len(path) < 2 or last.get("replies"):
        return False
    if any(message["deleted"] for message in path):
        return False
    if any(message["synthetic"] for message in path) and not synthetic:
        return False
    if last["role"] == "prompter" and siblings(path, len(path) - 1).index(last) != 0:
        return False
    if top_k is not None:
        for place, message in enumerate(path):
            if message["role"] != "assistant":
                continue
            if message.get("rank") is None and len(siblings(path, place)) > 1:
                return False
            if message.get("rank") is not None and message["rank"] >= top_k:
                return False
    return True


def brute_force(trees, *, top_k, languages, synthetic=False):
    """The texts of every conversation, found by trying every way through every tree."""
    found = []
    for tree in trees:
        prompt = tree["prompt"]
        if tree["tree_state"] != "ready_for_export" or not prompt["review_result"] or prompt["lang"] not in languages:
            continue
        for path in all_paths(prompt):
            if is_good(path, top_k=top_k, synthetic=synthetic):
                kept = path if path[-1]["role"] == "assistant" else path[:-1]
                found.append([message["text"] for message in kept])
    return found


def chats(trees, *, languages, **options):
    return [
        chat
        for tree in trees
        for chat in oasst.threads(tree, **options)
        if isinstance(chat, Chat) and chat.language in languages
    ]


def texts(chats):
    return [[message.text for message in chat.messages] for chat in chats]


def real(name):
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").split("\n") if line]


EN, THREE = ("en",), ("en", "es", "ru")
COUNTS = [
    ("en_100_tree.jsonl", 1, EN, 98),
    ("en_100_tree.jsonl", 2, EN, 276),
    ("en_100_tree.jsonl", None, EN, 538),
    ("en_100_tree.jsonl", 1, THREE, 98),
    ("en_100_tree.jsonl", 2, THREE, 276),
    ("en_100_tree.jsonl", None, THREE, 538),
    ("oasst2_filtered.jsonl", 1, EN, 48),
    ("oasst2_filtered.jsonl", 2, EN, 141),
    ("oasst2_filtered.jsonl", None, EN, 265),
    ("oasst2_filtered.jsonl", 1, THREE, 82),
    ("oasst2_filtered.jsonl", 2, THREE, 234),
    ("oasst2_filtered.jsonl", None, THREE, 399),
]


@NEEDS_SHARED
@pytest.mark.parametrize(("name", "top_k", "languages", "count"), COUNTS)
def test_the_conversations_of_real_trees_are_those_that_brute_force_finds(name, top_k, languages, count):
    trees = real(name)
    found = chats(trees, languages=languages, top_k=top_k)
    assert texts(found) == brute_force(trees, top_k=top_k, languages=languages)
    assert len(found) == count
    for chat in found:
        assert [message.role for message in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)


@NEEDS_SHARED
@pytest.mark.parametrize(("top_k", "count"), [(1, 103), (2, 286), (None, 555)])
def test_synthetic_messages_are_kept_where_that_is_asked_for(top_k, count):
    trees = real("en_100_tree.jsonl")
    found = chats(trees, languages=EN, top_k=top_k, synthetic=True)
    assert texts(found) == brute_force(trees, top_k=top_k, languages=EN, synthetic=True)
    assert len(found) == count


@NEEDS_SHARED
def test_what_is_left_out_of_real_trees_is_counted():
    counts = Counter(
        item.reason if isinstance(item, LeftOut) else "kept"
        for tree in real("oasst2_filtered.jsonl")
        for item in oasst.threads(tree, top_k=1)
    )
    assert counts == {
        "tree state prompt_lottery_waiting": 333,
        "tree state halted_by_moderator": 49,
        "tree state initial_prompt_review": 33,
        "tree state growing": 22,
        "tree state aborted_low_grade": 18,
        "reply ranked too low": 363,
        "deleted message": 40,
        "one more unanswered question": 5,
        "kept": 97,
    }


def flat(tree):
    """The messages of a nested tree as rows of a table, children after parents."""
    for path in all_paths(tree["prompt"]):
        message = {key: value for key, value in path[-1].items() if key != "replies"}
        parent = path[-2]["message_id"] if len(path) > 1 else None
        root = path[0]["message_id"]
        yield {**message, "parent_id": parent, "message_tree_id": root, "tree_state": tree["tree_state"]}


def located(table):
    return (Located(f"x:{number}", row) for number, row in enumerate(table, 1))


def read(tree, **options) -> Any:
    return layouts.layout_named("oasst-flat").read(tree, Options(**options))


@NEEDS_SHARED
@pytest.mark.parametrize("name", ["en_100_tree.jsonl", "oasst2_filtered.jsonl"])
def test_a_table_of_real_messages_gives_the_same_conversations_as_its_trees(name):
    trees = list({tree["message_tree_id"]: tree for tree in real(name)}.values())  # one stands there twice
    gathered = list(oasst.trees(located(row for tree in trees for row in flat(tree))))
    assert [tree.problem for tree in gathered] == [""] * len(trees)
    for nested, tree in zip(trees, gathered, strict=True):
        assert read(tree.row, top_k=2) == oasst.threads(nested, top_k=2)


@NEEDS_SHARED
def test_single_messages_of_real_trees_are_named_as_what_they_are():
    first = next(rows.rows(SHARED / "en_100_message.jsonl"))
    assert first.row is not None
    with pytest.raises(BadRowError, match="a message of OASST outside of a tree; without `tree_state` nobody says"):
        oasst.threads(first.row, top_k=None)


# -- invented trees


@st.composite
def invented(draw):
    """A tree of up to 30 messages of which each answers an earlier one."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    size = rng.randint(1, 30)
    messages: list[dict[str, Any]] = []
    for number in range(size):
        parent = rng.choice(messages) if messages else None
        message = {
            "message_id": f"m{number}",
            "text": f"text {number}",
            "lang": rng.choice(["en", "de"]),
            "role": "assistant" if parent and parent["role"] == "prompter" else "prompter",
            "rank": rng.choice([None, 0, 1, 2]),
            "deleted": rng.random() < 0.05,
            "synthetic": rng.random() < 0.05,
            "review_result": rng.random() < 0.9,
            "replies": [],
        }
        messages.append(message)
        if parent:
            parent["replies"].append(message)
    return {"tree_state": rng.choice(["ready_for_export"] * 4 + ["growing"]), "prompt": messages[0]}


@given(st.lists(invented(), max_size=4), st.sampled_from([None, 1, 2]), st.booleans())
def test_the_conversations_of_any_trees_are_those_that_brute_force_finds(trees, top_k, synthetic):
    options = {"top_k": top_k, "synthetic": synthetic}
    found = chats(trees, languages=EN, **options)
    assert texts(found) == brute_force(trees, languages=EN, **options)
    gathered = oasst.trees(located(row for tree in renamed(trees) for row in flat(tree)))
    assert [read(tree.row, **options) for tree in gathered] == [oasst.threads(tree, **options) for tree in trees]


def renamed(trees):
    """Trees whose messages have names of their own."""

    def one(message, tree):
        replies = [one(reply, tree) for reply in message["replies"]]
        return {**message, "message_id": f"{tree} {message['message_id']}", "replies": replies}

    return [{**tree, "prompt": one(tree["prompt"], number)} for number, tree in enumerate(trees)]


@given(invented())
def test_every_leaf_becomes_a_conversation_or_a_reason(tree):
    leaves = sum(not path[-1]["replies"] for path in all_paths(tree["prompt"]))
    ready = tree["tree_state"] == "ready_for_export" and tree["prompt"]["review_result"]
    assert len(oasst.threads(tree, top_k=1)) == (leaves if ready else 1)


def message(name, role="prompter", *replies, **changes):
    said = {"message_id": name, "text": name, "role": role, "lang": "en", "review_result": True, "rank": None}
    return {**said, "deleted": False, "synthetic": False, "replies": list(replies), **changes}


def tree(prompt, state="ready_for_export"):
    return {"message_tree_id": "t", "tree_state": state, "prompt": prompt}


def kept(prompt, top_k=None):
    return [
        item.reason if isinstance(item, LeftOut) else "".join(said.text for said in item.messages)
        for item in oasst.threads(tree(prompt), top_k=top_k)
    ]


def test_a_dangling_question_is_taken_off_and_its_answer_kept_once():
    asked = message("q", "prompter", message("a", "assistant", message("r"), message("s")))
    assert kept(asked) == ["qa", "one more unanswered question"]
    first_goes_on = message("r", "prompter", message("b", "assistant"))
    assert kept(message("q", "prompter", message("a", "assistant", first_goes_on, message("s")))) == [
        "qarb",
        "one more unanswered question",
    ]


def test_an_answer_without_a_rank_is_kept_if_it_has_no_rivals():
    assert kept(message("q", "prompter", message("a", "assistant")), top_k=1) == ["qa"]
    rivals = message("q", "prompter", message("a", "assistant", rank=1), message("b", "assistant"))
    assert kept(rivals, top_k=2) == ["qa", "reply ranked too low"]
    assert kept(rivals, top_k=1) == ["reply ranked too low"] * 2


def test_a_tree_of_another_state_or_not_approved_has_one_reason():
    answered = message("q", "prompter", message("a", "assistant"), message("b", "assistant"))
    assert oasst.threads(tree(answered, "growing"), top_k=None) == [LeftOut("tree state growing")]
    assert kept({**answered, "review_result": False}) == ["prompt not approved in review"]
    assert kept({**answered, "review_result": None}) == ["prompt not approved in review"]
    assert kept(message("q")) == ["prompt without replies"]


def test_the_language_is_that_of_the_root():
    asked = message("q", "prompter", message("a", "assistant", lang="de"), lang="sv")
    assert oasst.threads(tree(asked), top_k=None) == [Chat((Message("user", "q"), Message("assistant", "a")), "sv")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tree_state": "ready_for_export"}, "`prompt` must be a message, is NoneType"),
        (tree([]), "`prompt` must be a message, is list"),
        (tree(message("q", lang=3)), "`lang` must be text, is int 3"),
        (tree(message("q", replies="a")), r"`replies` must be a list of messages, is str 'a' \(in message q\)"),
        (tree(message("q", replies=["a"])), r"`replies` must be a list of messages"),
        (tree(message("q", "prompter", message("a"))), r"roles out of order: `role` is str 'prompter', assistant is n"),
        (tree(message("q", "assistant", message("a"))), r"roles out of order.*\(in message q\)"),
        (tree(message("q", "prompter", message("a", "assistant", text=3))), r"`text` must be text.*\(in message a\)"),
        (tree(message("q", "prompter", message("a", "assistant", text=" "))), r"the answer is empty \(in message a\)"),
        (tree(message("q", "prompter", message("a", "assistant", text="\ud83d"))), r"half a char.*\(in message a\)"),
        (tree(message("q", "prompter", message("a", "assistant", rank="1"))), r"`rank` must be a number.*message a"),
    ],
)
def test_what_is_no_tree_of_messages_is_named(row, says):
    with pytest.raises(BadRowError, match=says):
        oasst.threads(row, top_k=1)


def chain(length):
    """Rows of a table, one the answer to the other."""
    return [
        {
            "message_id": f"m{number}",
            "parent_id": f"m{number - 1}" if number else None,
            "message_tree_id": "m0",
            "tree_state": "ready_for_export",
            "role": ("prompter", "assistant")[number % 2],
            "text": str(number),
            "review_result": True,
        }
        for number in range(length)
    ]


def test_a_thread_may_be_longer_than_python_can_recurse():
    (gathered,) = oasst.trees(located(chain(20_000)))
    (chat,) = read(gathered.row)
    assert len(chat.messages) == 20_000


def rewired(length, **parents):
    return [{**row, "parent_id": parents.get(row["message_id"], row["parent_id"])} for row in chain(length)]


@pytest.mark.parametrize(
    ("table", "where", "says"),
    [
        (rewired(4, m2="m3"), "x:3", "a cycle: from parent to parent, message m2 leads to no root"),
        (rewired(3, m0="m2"), "x:1", "a cycle: from parent to parent, message m0 leads to no root"),
        (rewired(3, m1="m1"), "x:2", "a cycle.*message m1"),
        (rewired(3, m1="gone"), "x:2", "a parent is missing, or stands apart from its tree: gone, the parent of"),
        (rewired(3, m2=None), "x:3", "the tree has two roots: message m0 and message m2"),
        (chain(3) + chain(3)[1:2], "x:4", "a message stands twice in its tree: m1"),
    ],
)
def test_messages_that_are_no_tree_are_named_and_the_next_tree_is_read(table, where, says):
    good = [{**row, "message_id": f"n{row['message_id']}", "message_tree_id": "n"} for row in chain(1)]
    bad, fine = oasst.trees(located(table + good))
    assert bad.where == where
    assert bad.row is None
    assert re.match(says, bad.problem)
    assert fine.row is not None


def test_a_tree_whose_rows_do_not_stand_together_is_named():
    other = [{**row, "message_tree_id": "n", "message_id": "n", "parent_id": None} for row in chain(1)]
    first, second, third = oasst.trees(located([*chain(2), *other, *chain(4)[2:]]))
    assert first.row
    assert second.row
    assert third.where == "x:4"
    assert third.problem.startswith("a parent is missing, or stands apart from its tree: m1, the parent of message m2")


def test_rows_that_are_no_messages_are_told_where_they_stand():
    table = [Located("x:1", None, "not JSON"), Located("x:2", {"message_id": 3}), *located(chain(2))]
    read_back = list(oasst.trees(table))
    assert [row.problem for row in read_back] == [
        "not JSON",
        "`message_id` is int 3, `parent_id` is NoneType None; both must be text",
        "",
    ]


def test_trees_without_a_name_begin_with_their_roots():
    table = [{key: value for key, value in row.items() if key != "message_tree_id"} for row in chain(3)]
    again = [
        {**row, "message_id": f"n{row['message_id']}", "parent_id": row["parent_id"] and f"n{row['parent_id']}"}
        for row in table
    ]
    assert [len(tree.row["messages"]) for tree in oasst.trees(located(table + again)) if tree.row] == [3, 3]
