"""A conversation, and the two rules that every template shares: who may speak when, and who is who in a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Speaker = Literal["system", "user", "assistant", "context"]


@dataclass(frozen=True)
class Message:
    """What somebody said.

    Args:
        role: Who: `context` is material that the user's next message is about.
        text: What, without any markup.
        learned: Only an assistant's message can be; False keeps it out of the loss.
    """

    role: Speaker
    text: str
    learned: bool = True


class Role(IntEnum):
    """Who said a token, as role files beside tokenized text number it (Megatron)."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2
    CONTEXT = 3
    TEXT = 4
    """Text of no conversation."""


ROLES: dict[Speaker, int] = {
    "system": int(Role.SYSTEM),
    "user": int(Role.USER),
    "assistant": int(Role.ASSISTANT),
    "context": int(Role.CONTEXT),
}
"""The number of each speaker."""

SCAFFOLD = 16
"""Added to the role of tokens that the template wrote and nobody said: headers and separators."""


class Round(NamedTuple):
    """One question with what belongs to it; the first may follow a system message."""

    user: Message
    context: Message | None
    system: Message | None
    assistant: Message | None


def as_messages(conversation: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """Return the messages; mappings are read as `{"role": …, "content": …}`.

    Raises:
        LlameroError: A mapping has other keys, or a role is none of the four.
    """
    messages: list[Message] = []
    for index, message in enumerate(conversation):
        if not isinstance(message, Message):
            if set(message) != {"role", "content"}:
                raise LlameroError(
                    f"a message must have `role` and `content`, this one has {sorted(message)}",
                    where=f"message {index}",
                    fix='write {"role": "user", "content": "…"}',
                )
            if not isinstance(message["content"], str):
                said = type(message["content"]).__name__
                raise LlameroError(f"`content` must be text, is {said}", where=f"message {index}")
            message = Message(cast("Speaker", message["role"]), message["content"])
        if message.role not in get_args(Speaker):
            raise LlameroError(
                f"unknown role {message.role!r}",
                where=f"message {index}",
                fix=did_you_mean(message.role, get_args(Speaker)),
            )
        messages.append(message)
    return messages


def rounds(messages: Sequence[Message], *, to_answer: bool) -> list[Round]:
    """Return the rounds of a conversation: [system] ([context] user assistant)… with the last answer optional.

    Args:
        messages: In the order they were said.
        to_answer: The next to speak must be the assistant.

    Raises:
        LlameroError: Somebody speaks out of turn, or an answer is empty; the message is named by its index.
    """
    _check_turns(messages, to_answer=to_answer)
    found: list[Round] = []
    beside: dict[Speaker, Message] = {}  # what waits for its user message
    for message in messages:
        if message.role == "user":
            found.append(Round(message, beside.get("context"), beside.get("system"), None))
            beside.clear()
        elif message.role == "assistant":
            found[-1] = found[-1]._replace(assistant=message)
        else:
            beside[message.role] = message
    return found


_MAY_FOLLOW = {
    "nobody": ("system", "context", "user"),
    "system": ("context", "user"),
    "context": ("user",),
    "user": ("assistant",),
    "assistant": ("context", "user"),
}


def _out_of_turn(index: int, role: str, previous: str) -> LlameroError:
    if role == "system":
        return LlameroError(
            "a system message that is not the first", where=f"message {index}", fix="move it to the beginning"
        )
    allowed = " or ".join(_MAY_FOLLOW[previous])
    return LlameroError(
        f"{role} speaks after {previous}", where=f"message {index}", fix=f"only {allowed} may follow {previous}"
    )


def _check_turns(messages: Sequence[Message], *, to_answer: bool) -> None:
    if not messages:
        raise LlameroError("the conversation has no messages", where="messages", fix="give at least one user message")
    previous = "nobody"
    for index, message in enumerate(messages):
        if message.role not in _MAY_FOLLOW[previous]:
            raise _out_of_turn(index, message.role, previous)
        if message.role == "assistant" and not message.text.strip():
            raise LlameroError(
                "the assistant says nothing", where=f"message {index}", fix="drop this answer and what follows"
            )
        previous = message.role
    last = f"message {len(messages) - 1}"
    if previous in ("system", "context"):
        raise LlameroError(
            f"the conversation ends with a {previous} message", where=last, fix="let a user message follow"
        )
    if to_answer and previous == "assistant":
        raise LlameroError(
            "there is nothing to answer: the assistant spoke last",
            where=last,
            fix="let a user message follow, or ask for no generation prompt",
        )
