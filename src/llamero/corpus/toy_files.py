"""Files of the toy world in every layout that people share data in: stand-ins for data that is not here.

What is written is what corpus/layouts.py reads: a test takes each layout there and back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from llamero.core.files import write_atomically
from llamero.corpus import oasst, toy_world
from llamero.text.system_messages import ALPACA

if TYPE_CHECKING:
    from pathlib import Path

SYSTEM = "You answer in one short sentence."
"""System message of every second row, in layouts that have one."""


@dataclass(frozen=True)
class ToyFile:
    """A file to write.

    Args:
        path: Where, relative to the recipe.
        layout: Of its rows, one of `LAYOUTS` in corpus/layouts.py.
        rows: How many; of message trees, how many trees.
        seed: Which world.
        languages: What its rows say that they are written in, by turns. All of them are English.
    """

    path: str
    layout: str
    rows: int
    seed: int
    languages: tuple[str, ...] = ("en",)

    def write(self, root: Path) -> None:
        """Write it, unless it stands there already; several processes may do so at once.

        Args:
            root: Directory that the path starts from.
        """
        path = root / self.path
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in toy_rows(self))
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, shared=True)


@dataclass(frozen=True)
class Talk:
    """What a row is made of."""

    number: int
    system: str
    """May be empty."""
    rounds: Sequence[tuple[str, str]]
    """Two questions with their answers."""
    language: str

    @property
    def first(self) -> tuple[str, str]:
        """Return the first question and its answer."""
        return self.rounds[0]

    @property
    def parted(self) -> tuple[str, str, str]:
        """Return the first question, what it is about (the lines before it, mostly none), and its answer."""
        question, answer = self.first
        context, _, asked = question.rpartition("\n")
        return asked, context, answer

    @property
    def said(self) -> list[tuple[str, str]]:
        """Return speaker and text of every message."""
        turns = [turn for asked, answer in self.rounds for turn in (("user", asked), ("assistant", answer))]
        return [("system", self.system), *turns] if self.system else turns


def toy_rows(file: ToyFile) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file."""
    world = toy_world.world(file.seed)
    if file.layout == "text":
        for text, language in zip(toy_world.documents(world, file.rows), cycle(file.languages), strict=False):
            yield {"text": text, "language": language}
        return
    write = _WRITERS[file.layout]
    chats = toy_world.conversations(world, 2 * file.rows)
    rounds = ((chat[0]["content"], chat[1]["content"]) for chat in chats)
    for number, language in enumerate(islice(cycle(file.languages), file.rows)):
        yield from write(Talk(number, SYSTEM if number % 2 else "", (next(rounds), next(rounds)), language))


def _one(row: Callable[[Talk], Mapping[str, Any]]) -> Callable[[Talk], list[Mapping[str, Any]]]:
    """Return what writes one row of a talk, with its language."""
    return lambda talk: [{**row(talk), "language": talk.language}]


def _alpaca(talk: Talk) -> Mapping[str, Any]:
    asked, context, answer = talk.parted
    return {"instruction": asked, "input": context, "output": answer}


def _dolly(talk: Talk) -> Mapping[str, Any]:
    asked, context, answer = talk.parted
    return {"instruction": asked, "context": context, "response": answer}


def _pair(question: str, answer: str) -> Callable[[Talk], Mapping[str, Any]]:
    return lambda talk: dict(zip((question, answer), talk.first, strict=True))


def _wrapped(talk: Talk) -> Mapping[str, Any]:
    asked, answer = talk.first
    return {"prompt": f"{ALPACA}\n\n### Instruction:\n{asked}\n\n### Response:", "answer": answer}


def _system_pair(system: str, question: str, answer: str) -> Callable[[Talk], Mapping[str, Any]]:
    return lambda talk: {system: talk.system, question: talk.first[0], answer: talk.first[1]}


def _orca_chat(talk: Talk) -> Mapping[str, Any]:
    rounds = [{"input": asked, "output": answer} for asked, answer in talk.rounds]
    return {"instruction": talk.system, "conversation": rounds}


def _messages(talk: Talk) -> Mapping[str, Any]:
    return {"messages": [{"role": who, "content": text} for who, text in talk.said]}


def _sharegpt(talk: Talk) -> Mapping[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[who], "value": text} for who, text in talk.said]}


def _sharegpt_clean(talk: Talk) -> Mapping[str, Any]:
    """Write no system message: this layout leaves out what no human begins."""
    return {"conversations": [turn for turn in _sharegpt(talk)["conversations"] if turn["from"] != "system"]}


def _preference(talk: Talk) -> Mapping[str, Any]:
    asked, answer = talk.first
    return {"prompt": asked, "chosen": answer, "rejected": "I do not know."}


def _message(talk: Talk, name: str, role: str, text: str, **more: object) -> dict[str, Any]:
    return {"message_id": f"{talk.number}{name}", "role": role, "text": text, "lang": talk.language, **more}


def _table(talk: Talk) -> list[Mapping[str, Any]]:
    """Write a tree as a table: two rounds, and beside the first answer one that was ranked lower."""
    (first, answer), (second, last) = talk.rounds
    place = {"message_tree_id": f"{talk.number}a", "tree_state": oasst.READY, "review_result": True}
    messages = [
        _message(talk, "a", "prompter", first, parent_id=None, **place),
        _message(talk, "b", "assistant", answer, parent_id=f"{talk.number}a", rank=0, **place),
        _message(talk, "c", "assistant", "I do not know.", parent_id=f"{talk.number}a", rank=1, **place),
        _message(talk, "d", "prompter", second, parent_id=f"{talk.number}b", **place),
        _message(talk, "e", "assistant", last, parent_id=f"{talk.number}d", **place),
    ]
    return [*messages]


def _tree(talk: Talk) -> list[Mapping[str, Any]]:
    table = _table(talk)
    tree = oasst.nested({"tree_state": oasst.READY, "messages": table})
    return [{"message_tree_id": table[0]["message_tree_id"], **tree}]


_WRITERS: Mapping[str, Callable[[Talk], Sequence[Mapping[str, Any]]]] = {
    "messages": _one(_messages),
    "sharegpt": _one(_sharegpt),
    "sharegpt-clean": _one(_sharegpt_clean),
    "alpaca": _one(_alpaca),
    "alpaca-gpt4": _one(_alpaca),
    "alpaca-rendered": _one(_wrapped),
    "orca": _one(_system_pair("system_prompt", "question", "response")),
    "orca-chat": _one(_orca_chat),
    "dolphin": _one(_system_pair("instruction", "input", "output")),
    "dolly": _one(_dolly),
    "instruction-response": _one(_pair("INSTRUCTION", "RESPONSE")),
    "pair": _one(_pair("prompt", "answer")),
    "dialogue": _one(lambda talk: {"data": [text for both in talk.rounds for text in both]}),
    "preference": _one(_preference),
    "oasst": _tree,
    "oasst-flat": _table,
}
"""Every layout but `text`. To add one: a function above, a line here."""
