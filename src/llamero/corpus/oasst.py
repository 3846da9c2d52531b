"""Conversations of Open-Assistant: every way through a tree of messages that ends with an answer.

The rules are those of the loader that the published models were trained with (LAION-AI/Open-Assistant,
model/model_training/custom_datasets/oasst_dataset.py). Trees are nested (exports) or tables of messages (the hub).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from llamero.corpus import fields
from llamero.corpus.rows import Located
from llamero.corpus.samples import BadRowError, Chat, LeftOut, Row
from llamero.text.messages import Message, Speaker

READY = "ready_for_export"
"""State of a tree that was finished, reviewed and ranked."""

_SPEAKERS: Sequence[tuple[str, Speaker]] = (("prompter", "user"), ("assistant", "assistant"))


class _Rules(NamedTuple):
    top_k: int | None
    synthetic: bool


def threads(tree: Row, *, top_k: int | None, synthetic: bool = False) -> Sequence[Chat | LeftOut]:
    """Return a conversation, or why there is none, for every leaf of a tree, or one reason against the whole tree.

    Args:
        tree: `tree_state` and `prompt`, a message with nested `replies`.
        top_k: Keep an answer only if people ranked fewer than so many above it.
        synthetic: Keep what a model wrote, too.

    Raises:
        BadRowError: It is no tree of messages, or somebody speaks out of turn.
    """
    prompt = tree.get("prompt")
    if not isinstance(prompt, dict):
        if "message_id" in tree:
            raise BadRowError(
                "a message of OASST outside of a tree; without `tree_state` nobody says that it was finished and ranked"
            )
        raise BadRowError(f"`prompt` must be a message, is {fields.short(prompt)}")
    if tree.get("tree_state") != READY:
        return [LeftOut(f"tree state {fields.printable(tree.get('tree_state'))}")]
    if not prompt.get("review_result"):
        return [LeftOut("prompt not approved in review")]
    language = fields.text(prompt, "lang", optional=True)
    rules = _Rules(top_k, synthetic)
    return [_kept(thread, rules) or _chat(thread, language) for thread in _to_leaves(prompt)]


def _to_leaves(prompt: Row) -> Iterator[list[Row]]:
    """Yield the way from the prompt to every leaf, in depth-first order."""
    thread: list[Row] = []
    waiting = [(prompt, 0)]
    while waiting:
        message, depth = waiting.pop()
        thread[depth:] = [message]
        replies = _replies(message)
        waiting += [(reply, depth + 1) for reply in reversed(replies)]
        if not replies:
            yield thread


def _replies(message: Row) -> list[Row]:
    replies: Any = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise BadRowError(f"`replies` must be a list of messages, is {fields.short(replies)} (in {_name(message)})")
    return replies


def _kept(thread: list[Row], rules: _Rules) -> LeftOut | None:
    """Return why a thread is left out, if it is."""
    if len(thread) == 1:
        return LeftOut("prompt without replies")
    if thread[-1].get("role") == "prompter" and thread[-1] is not _replies(thread[-2])[0]:
        return LeftOut("one more unanswered question")  # the first one stands for the thread up to there
    if any(message.get("deleted") for message in thread):
        return LeftOut("deleted message")
    if not rules.synthetic and any(message.get("synthetic") for message in thread):
        return LeftOut("synthetic message")
    if rules.top_k is not None and not all(_ranked(*both, rules.top_k) for both in pairwise(thread)):
        return LeftOut("reply ranked too low")
    return None


def _ranked(parent: Row, message: Row, top_k: int) -> bool:
    """Return whether a message is none of those that others were ranked above."""
    if message.get("role") != "assistant":
        return True
    rank = message.get("rank")
    if rank is None:
        return len(_replies(parent)) == 1
    if not isinstance(rank, int | float):
        raise BadRowError(f"`rank` must be a number, is {fields.short(rank)} (in {_name(message)})")
    return rank < top_k


def _chat(thread: list[Row], language: str) -> Chat:
    """Return a conversation up to its last answer."""
    said = tuple(_message(number, message) for number, message in enumerate(thread))
    return Chat(said if said[-1].role == "assistant" else said[:-1], language)


def _message(number: int, message: Row) -> Message:
    role, speaker = _SPEAKERS[number % 2]
    if message.get("role") != role:
        raise BadRowError(
            f"roles out of order: `role` is {fields.short(message.get('role'))}, {role} is next (in {_name(message)})"
        )
    try:
        text = fields.text(message, "text")
    except BadRowError as error:
        raise BadRowError(f"{error} (in {_name(message)})") from error
    if speaker == "assistant" and not text.strip():
        raise BadRowError(f"the answer is empty (in {_name(message)})")
    return Message(speaker, text)


def _name(message: Row) -> str:
    return f"message {fields.printable(message.get('message_id'))}"


# -- tables


class _Message(NamedTuple):
    where: str
    row: Row
    name: str
    parent: str | None


def trees(rows: Iterable[Located]) -> Iterator[Located]:
    """Yield the trees of a table of messages, each as one row: `tree_state` and `messages`, as the table has them.

    The messages of a tree stand together. What makes no tree comes out with its problem, where that shows.
    """
    gathered: list[_Message] = []
    tree: Any = None
    for located in rows:
        message = _in_table(located)
        if isinstance(message, Located):
            yield message
            continue
        belongs = message.row.get("message_tree_id") or (tree if message.parent else message.name)
        if gathered and belongs != tree:
            yield _gathered(gathered)
            gathered = []
        gathered.append(message)
        tree = belongs
    if gathered:
        yield _gathered(gathered)


def nested(tree: Row) -> Row:
    """Return a tree of `trees` in the form of exports: `tree_state` and `prompt`, a message with nested `replies`."""
    messages = {message["message_id"]: {**message, "replies": []} for message in tree["messages"]}
    prompt = None
    for message in messages.values():
        if message.get("parent_id"):
            messages[message["parent_id"]]["replies"].append(message)
        else:
            prompt = message
    return {"tree_state": tree["tree_state"], "prompt": prompt}


def _in_table(located: Located) -> _Message | Located:
    if located.row is None:
        return located
    name, parent = located.row.get("message_id"), located.row.get("parent_id")
    if not isinstance(name, str) or not isinstance(parent, str | None):
        said = f"`message_id` is {fields.short(name)}, `parent_id` is {fields.short(parent)}"
        return Located(located.where, None, f"{said}; both must be text")
    return _Message(located.where, located.row, name, parent or None)


def _gathered(messages: list[_Message]) -> Located:
    """Return a tree as one row, where its root stands."""
    fault = _fault(messages)
    if fault:
        return fault
    root = next(message for message in messages if message.parent is None)
    state = root.row.get("tree_state")
    return Located(root.where, {"tree_state": state, "messages": [message.row for message in messages]})


def _fault(messages: list[_Message]) -> Located | None:
    """Return the first thing because of which messages are no tree, where it shows."""
    known: dict[str, _Message] = {}
    children: dict[str | None, list[_Message]] = {None: []}
    for message in messages:
        if message.name in known:
            return _faulty(message, f"a message stands twice in its tree: {message.name}")
        known[message.name] = message
        children.setdefault(message.parent, []).append(message)
    for name in children:
        if name is not None and name not in known:
            child = children[name][0]
            what = f"a parent is missing, or stands apart from its tree: {name}, the parent of message {child.name}"
            return _faulty(child, what)
    roots = children[None]
    if len(roots) > 1:
        return _faulty(roots[1], f"the tree has two roots: message {roots[0].name} and message {roots[1].name}")
    waiting = list(roots)
    while waiting:
        name = waiting.pop().name
        del known[name]
        waiting += children.get(name, [])
    for message in known.values():
        return _faulty(message, f"a cycle: from parent to parent, message {message.name} leads to no root")
    return None


def _faulty(message: _Message, problem: str) -> Located:
    return Located(message.where, None, fields.printable(problem))
