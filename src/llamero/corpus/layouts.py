"""The layouts that people share conversations and texts in: what a row becomes.

A layout is recognised by its keys, or stated. A row that does not fit raises `BadRowError`, which names the key and
the value; what a rule of a layout keeps out is `LeftOut`. Where a published data set has rules of its own, they are
those of LAION-AI/Open-Assistant, model/model_training/custom_datasets.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus import fields, oasst
from llamero.corpus.samples import BadRowError, Chat, Document, LeftOut, Row, Sample
from llamero.text.messages import Message, Speaker, rounds
from llamero.text.unwrap import alpaca_unwrap


@dataclass(frozen=True)
class Options:
    """What a source may say about its layout."""

    top_k: int | None = None
    """Of ranked replies (OASST) the best so many at every turn."""
    synthetic: bool = False
    """Whether messages that a model wrote (OASST) are kept."""


Found = Sequence[Sample | LeftOut]


@dataclass(frozen=True)
class Layout:
    """A layout.

    Args:
        read: Returns what a row becomes.
        keys: Sets of keys, any of which it is recognised by.
        gather: What several rows have to be joined to before they are read.
    """

    read: Callable[[Row, Options], Found]
    keys: tuple[frozenset[str], ...] = ()
    gather: Literal["trees"] | None = None


def _one(read: Callable[[Row], Sample | LeftOut]) -> Callable[[Row, Options], Found]:
    """Return what reads a row of which one sample is made, without options."""

    @wraps(read)
    def found(row: Row, _options: Options) -> Found:
        return (read(row),)

    return found


# -- a question and an answer


def _pair(row: Row, user: str, assistant: str, *, system: str = "", context: str = "") -> Chat:
    if not assistant.strip():
        raise BadRowError("the answer is empty")
    said: list[tuple[Speaker, str]] = [("system", system), ("context", context)]
    before = [Message(role, text) for role, text in said if text.strip()]
    return Chat((*before, Message("user", user), Message("assistant", assistant)), _language(row))


@_one
def alpaca(row: Row) -> Chat:
    """`instruction`, `input` (may be empty), `output`."""
    user = _with_input(fields.text(row, "instruction"), fields.text(row, "input", optional=True))
    return _pair(row, user, fields.text(row, "output"), system=fields.text(row, "system", optional=True))


def _with_input(instruction: str, extra: str, joint: str = "\n") -> str:
    return f"{instruction}{joint}{extra}" if extra else instruction


_NO_INPUT = ("no input", "noinput", "n/a")
_JOINTS = ("\n", "\n\n", " ")


@_one
def alpaca_gpt4(row: Row) -> Chat:
    """Alpaca's keys; an input that says that there is none, or what the instruction says already, is skipped.

    Any other is joined in one of three ways, which the text itself decides.
    """
    instruction, extra = fields.text(row, "instruction"), fields.text(row, "input", optional=True)
    said = extra.lower()
    if any(mark in said for mark in _NO_INPUT) or said in instruction.lower():
        extra = ""
    joint = _JOINTS[_hash(instruction + extra) % len(_JOINTS)]
    return _pair(row, _with_input(instruction, extra, joint), fields.text(row, "output"))


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8"))


@_one
def alpaca_rendered(row: Row) -> Chat:
    """`prompt` that was already rendered with the Alpaca wrapper, and `answer`: the wrapper is taken off again."""
    prompt = fields.text(row, "prompt")
    found = alpaca_unwrap(prompt)
    if found is None:
        raise BadRowError(f"`prompt` is not in the Alpaca wrapper: {fields.short(prompt)}")
    return _pair(row, _with_input(*found), fields.text(row, "answer", "response", "completion"))


@_one
def orca(row: Row) -> Chat:
    """`system_prompt`, `question`, `response`."""
    system = fields.text(row, "system_prompt", optional=True)
    return _pair(row, fields.text(row, "question"), fields.text(row, "response"), system=system)


@_one
def dolphin(row: Row) -> Chat:
    """Alpaca's keys, but `instruction` is the system message and `input` the question."""
    system = fields.text(row, "instruction", optional=True)
    return _pair(row, fields.text(row, "input"), fields.text(row, "output"), system=system)


_CITATION = re.compile(r"\[(?:\d+(?:,\s*\d+)*|[a-zA-Z]|citation needed)\]")


@_one
def dolly(row: Row) -> Chat:
    """`instruction`, `context`, `response`; or `INSTRUCTION`, `RESPONSE` and `CONTEXT` in `METADATA`.

    The context is a message of its own, without citation marks (`[12]`, `[a]`).
    """
    beside = row.get("METADATA")
    holder = beside if isinstance(beside, dict) and "CONTEXT" in beside else row
    context = _CITATION.sub("", fields.text(holder, "context", "CONTEXT", optional=True))
    user, assistant = fields.text(row, "instruction", "INSTRUCTION"), fields.text(row, "response", "RESPONSE")
    return _pair(row, user, assistant, context=context)


_INSTRUCTION_RESPONSE = (("instruction", "response"), ("user", "assistant"))


@_one
def instruction_response(row: Row) -> Chat | LeftOut:
    """`INSTRUCTION` and `RESPONSE`, or `USER` and `ASSISTANT`, in any case; rows with an empty one are left out."""
    beside = row.get("METADATA")
    if isinstance(beside, dict) and beside.get("CONTEXT"):
        raise BadRowError("`METADATA` holds a `CONTEXT`, which this layout would lose; state `layout: dolly`")
    keys = {key.lower(): key for key in row}
    question, answer = next((both for both in _INSTRUCTION_RESPONSE if both[1] in keys), _INSTRUCTION_RESPONSE[0])
    user, assistant = (fields.text(row, keys.get(key, key), optional=key in keys) for key in (question, answer))
    if not user.strip() or not assistant.strip():
        return LeftOut("question or answer empty")
    return _pair(row, user, assistant)


@_one
def pair(row: Row) -> Chat:
    """`prompt` (or `question`) and `answer` (or `response`, `completion`)."""
    return _pair(row, fields.text(row, "prompt", "question"), fields.text(row, "answer", "response", "completion"))


# -- conversations


_Roles = Mapping[str, Speaker]
_SHAREGPT: _Roles = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MESSAGES: _Roles = {"user": "user", "assistant": "assistant", "system": "system", "context": "context"}


def _chat(row: Row, said: Sequence[Message], key: str) -> Chat:
    """Return a conversation in which the right ones speak and somebody answers; an empty system message is left out."""
    if said and said[0].role == "system" and not said[0].text.strip():
        said = said[1:]
    if not any(message.role == "assistant" and message.learned for message in said):
        raise BadRowError("no assistant turn")
    try:
        rounds(said, to_answer=False)
    except LlameroError as error:
        number = str(error.where).removeprefix("message ")
        raise BadRowError(f"{error.problem} (in `{key}.{number}`)") from error
    return Chat(tuple(said), _language(row))


def _list(row: Row, key: str) -> list[Any]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"`{key}` must be a list of turns, is {fields.short(turns)}")
    return turns


@_one
def messages(row: Row) -> Chat:
    """`messages`: a list of `role` and `content`, the form of chat APIs; `loss_weight` 0 or 1 may stand beside."""
    return _chat(row, _turns(_list(row, "messages"), "messages"), "messages")


@_one
def sharegpt(row: Row) -> Chat:
    """`conversations`: a list of `from` and `value`."""
    return _chat(row, _turns(_list(row, "conversations"), "conversations"), "conversations")


def _turns(turns: Iterable[Any], key: str) -> list[Message]:
    """Return turns with a role and a text, in the form of chat APIs or of ShareGPT."""
    return [_turn(turn, f"{key}.{number}") for number, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        hint = "; for a list of plain texts state `layout: dialogue`" if isinstance(turn, str) else ""
        raise BadRowError(f"`{where}` must be an object, is {fields.short(turn)}{hint}")
    sharegpt_form = "from" in turn
    role_key, text_key, roles = ("from", "value", _SHAREGPT) if sharegpt_form else ("role", "content", _MESSAGES)
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise BadRowError(f"`{where}.{role_key}` is {fields.short(role)}; known: {', '.join(roles)}")
    weight = turn.get("loss_weight")
    if weight not in (0, 1, None):  # Parquet has a null where a turn has no such key
        raise BadRowError(f"`{where}.loss_weight` is {fields.short(weight)}; only 0 and 1 are understood")
    return Message(roles[role], _content(turn, text_key, where), learned=weight != 0)


def _content(turn: Row, key: str, where: str) -> str:
    """Return a turn's text; the list form of chat APIs is joined if all its parts are text."""
    value = turn.get(key)
    if isinstance(value, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
            raise BadRowError(f"`{where}.{key}` has parts that are not text")
        return "".join(fields.text(part, "text", "value") for part in value)
    try:
        return fields.text(turn, key)
    except BadRowError as error:
        raise BadRowError(f"{error} (in `{where}`)") from error


_REFERENCE = re.compile(r"\[\s?\d+\s?\]")
_GO_ON = ("...", "Please continue", "Go on", "")


@_one
def sharegpt_clean(row: Row) -> Chat | LeftOut:
    """ShareGPT's keys; what web pages left in the text is taken out, and only whole conversations are kept.

    Those that do not begin with a human, have an empty answer or end with a question are left out, turns of the same
    speaker become one, escapes of Markdown and references are removed.
    """
    turns = [_not_null(turn) for turn in _list(row, "conversations")]
    if isinstance(turns[0], dict) and turns[0].get("from") != "human":
        return LeftOut("no human begins")
    said: list[Message] = []
    for message in _turns(turns, "conversations"):
        text = message.text
        if not text and message.role == "user":
            text = _GO_ON[_hash(said[-1].text if said else "") % len(_GO_ON)]
        text = _REFERENCE.sub("", text.replace(r"\_", "_").replace(r"\*", "*")).strip()
        if not text and message.role == "assistant":
            return LeftOut("empty answer")
        if said and said[-1].role == message.role:
            text = f"{said.pop().text}\n{text}"
        said.append(Message(message.role, text))
    if said[-1].role == "user":
        return LeftOut("ends with a question")
    return _chat(row, said, "conversations")


def _not_null(turn: Any) -> Any:
    return {**turn, "value": ""} if isinstance(turn, dict) and turn.get("value") is None else turn


@_one
def orca_chat(row: Row) -> Chat:
    """`conversation` (or `cluster.samples`): a list of `input` and `output`; `instruction` is the system message."""
    cluster = row.get("cluster")
    holder, key = (cluster, "samples") if isinstance(cluster, dict) else (row, "conversation")
    system = fields.text(row, "instruction", optional=True)
    said = [Message("system", system)] if system else []
    for number, both in enumerate(_list(holder, key)):
        if not isinstance(both, dict):
            raise BadRowError(f"`{key}.{number}` must be an object, is {fields.short(both)}")
        said += [Message("user", _content(both, "input", f"{key}.{number}"))]
        said += [Message("assistant", _content(both, "output", f"{key}.{number}"))]
    return _chat(row, said, key)


_DIALOGUE = ("data", "dialogue", "conversations")


@_one
def dialogue(row: Row) -> Chat:
    """`data` (or `dialogue`, `conversations`): a list of texts, of the user and of the assistant by turns."""
    key = next((key for key in _DIALOGUE if key in row), _DIALOGUE[0])
    texts = {f"{key}.{number}": text for number, text in enumerate(_list(row, key))}
    speakers: tuple[Speaker, Speaker] = ("user", "assistant")
    said = [Message(speakers[number % 2], fields.text(texts, where)) for number, where in enumerate(texts)]
    return _chat(row, said, key)


@_one
def preference(row: Row) -> Chat:
    """A prompt with an answer that was preferred, which is learned, and one that was not, which is not read.

    `prompt` and `chosen`, each a text or messages; `conversations` and `chosen`; or `input.messages` and
    `preferred_output`.
    """
    asked = row.get("input")
    if isinstance(asked, dict):
        before, key = _turns(_list(asked, "messages"), "input.messages"), "preferred_output"
    elif "conversations" in row:
        before, key = _turns(_list(row, "conversations"), "conversations"), "chosen"
    else:
        before, key = _side(row, "prompt", "user") if row.get("prompt") is not None else [], "chosen"
    chosen = _side(row, key, "assistant")
    whole = chosen if any(message.role == "user" for message in chosen) else before + chosen
    said = [Message(message.role, message.text, learned=False) for message in whole[:-1]] + whole[-1:]
    return _chat(row, said, key)


def _side(row: Row, key: str, speaker: Speaker) -> list[Message]:
    """Return messages that stand there as a text, a message or a list of them."""
    value = row.get(key)
    if isinstance(value, dict):
        return [_turn(value, key)]
    return _turns(_list(row, key), key) if isinstance(value, list) else [Message(speaker, fields.text(row, key))]


def oasst_export(row: Row, options: Options) -> Found:
    """A tree of messages, as Open-Assistant exports it."""
    return oasst.threads(row, top_k=options.top_k, synthetic=options.synthetic)


def oasst_flat(row: Row, options: Options) -> Found:
    """A tree that was gathered from a table of messages."""
    if "messages" not in row:
        raise BadRowError("a single message; those of a tree are gathered first")
    return oasst_export(oasst.nested(row), options)


# -- texts, and what rows say beside


@_one
def text(row: Row) -> Document:
    """`text`; `meta` may name its language and the part of the corpus it is of."""
    return Document(fields.text(row, "text"), _language(row), _domain(row))


def _domain(row: Row) -> str:
    """Return the part of a corpus: of a path (`cc/2019-30/…/line4`) its first component, of an address nothing."""
    said = _said(row, "redpajama_set_name", "red_pajama_subset", "subset", "source")
    return "" if "://" in said else said.strip("/").partition("/")[0]


def _language(row: Row) -> str:
    return _said(row, "lang", "language")


def _said(row: Row, *keys: str) -> str:
    """Return what a row, or its `meta`, has under the first of these keys; "" where none is a text."""
    meta = row.get("meta")
    if isinstance(meta, str) and meta.startswith("{"):
        try:
            meta = json.loads(meta)
        except ValueError:  # a note in words
            meta = None
    places = (row, meta) if isinstance(meta, dict) else (row,)
    return next((place[key] for place in places for key in keys if isinstance(place.get(key), str)), "")


def _any_of(*sets: Iterable[str]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(keys) for keys in sets)


_EVERY_CASE = [map(case, both) for both in _INSTRUCTION_RESPONSE for case in (str.lower, str.upper, str.title)]

LAYOUTS: dict[str, Layout] = {
    "messages": Layout(messages, _any_of(["messages"])),
    "sharegpt": Layout(sharegpt, _any_of(["conversations"])),
    "sharegpt-clean": Layout(sharegpt_clean),
    "alpaca": Layout(alpaca, _any_of(["instruction", "output"])),
    "alpaca-gpt4": Layout(alpaca_gpt4),
    "alpaca-rendered": Layout(alpaca_rendered),
    "orca": Layout(orca, _any_of(["question", "response"])),
    "orca-chat": Layout(orca_chat, _any_of(["instruction", "conversation"], ["instruction", "cluster"])),
    "dolphin": Layout(dolphin),
    "dolly": Layout(dolly, _any_of(["instruction", "context", "response"])),
    "instruction-response": Layout(instruction_response, _any_of(*_EVERY_CASE)),
    "pair": Layout(
        pair,
        _any_of(
            ["prompt", "answer"],
            ["prompt", "response"],
            ["prompt", "completion"],
            ["question", "answer"],
        ),
    ),
    "dialogue": Layout(dialogue, _any_of(["data"], ["dialogue"])),
    "preference": Layout(
        preference,
        _any_of(["input", "preferred_output"], ["conversations", "chosen", "rejected"], ["chosen", "rejected"]),
    ),
    "oasst": Layout(oasst_export, _any_of(["message_tree_id", "tree_state", "prompt"])),
    "oasst-flat": Layout(
        oasst_flat, _any_of(["message_tree_id", "message_id", "parent_id", "role", "text"]), gather="trees"
    ),
    "text": Layout(text, _any_of(["text"])),
}
"""Every layout there is. To add one: a function above, a line here, its name in `Layout` of data/config.py (a test
compares the two), a row in the test."""


def detect(row: Row, *, where: str) -> str:
    """Return the layout whose keys a row has; of two, the one that asks for more than all that the other asks for.

    `text` beside the keys of a conversation is a copy of it, and whoever has a chosen and a rejected side means them. A
    prompt in Alpaca's wrapper is taken out of it.

    Raises:
        LlameroError: No layout fits, or several do.
    """
    if {"role", "text"} <= row.keys() and "message_tree_id" not in row:
        raise LlameroError(
            "a single message (`role`, `text`) outside of its conversation",
            where=where,
            fix="give whole trees; Open-Assistant's have `message_tree_id` and `tree_state`",
        )
    fitting = [(name, keys) for name, layout in LAYOUTS.items() for keys in layout.keys if keys <= row.keys()]
    best = list(dict.fromkeys(name for name, keys in fitting if not any(keys < others for _, others in fitting)))
    best = [name for name in best if name != "text"] or best
    best = ["preference"] if "preference" in best else best
    if best == ["pair"] and alpaca_unwrap(str(row.get("prompt"))):
        return "alpaca-rendered"
    if len(best) != 1:
        found = f"fit {' and '.join(best)}" if best else "fit no known layout"
        raise LlameroError(
            f"the keys {fields.names(row)} {found}", where=where, fix=f"state `layout:`, one of {', '.join(LAYOUTS)}"
        )
    return best[0]


def layout_named(name: str) -> Layout:
    """Return a layout by its name."""
    if name not in LAYOUTS:
        raise LlameroError(f"unknown layout `{name}`", fix=did_you_mean(name, LAYOUTS))
    return LAYOUTS[name]
