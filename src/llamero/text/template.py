"""A chat template as data: it fills itself in, and writes itself as the Jinja that other software runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError
from llamero.text.jinja_shell import SHELL, concatenation
from llamero.text.messages import ROLES, SCAFFOLD, Message, rounds
from llamero.text.patterns import Part, parts
from llamero.text.pieces import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llamero.text.messages import Round, Speaker
    from llamero.text.tokenizer import Tokenizer

Turns = tuple[str, ...]
"""One pattern for each turn: a turn's tokens, markup and all, count as its speaker's."""


@dataclass(frozen=True)
class Opening:
    """What leads up to an answer, by what there is besides the user's message."""

    user: Turns
    context: Turns
    system: Turns
    system_context: Turns

    def turns(self, *, system: bool, context: bool) -> Turns:
        """The turns for what there is."""
        if system:
            return self.system_context if context else self.system
        return self.context if context else self.user


@dataclass(frozen=True)
class Template:
    """A way to write a conversation as one text; `llamero.text.templates` explains the patterns.

    Args:
        name: What a recipe calls it.
        first: What leads up to the first answer.
        later_user: What leads up to a later answer.
        later_context: The same with a context.
        prompt: After which the assistant speaks.
        answer: What the assistant says, up to and with the token that ends its turn: all of it is learned.
        after: Written after each answer, and not learned.
        special: Tokens that the tokenizer must have.
        ends: Any of these tokens ends an answer.
        stop: Text that an answer never holds: a model that writes it has run on into the next turn.
    """

    name: str
    first: Opening
    later_user: Turns
    later_context: Turns
    prompt: str
    answer: str
    after: str = ""
    special: tuple[str, ...] = ()
    ends: tuple[str, ...] = ("{eos}",)
    stop: tuple[str, ...] = ()

    def pieces(self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[Piece]:
        """What a conversation is written as."""
        self.require_tokens(tokenizer)
        found: list[Piece] = []
        for number, turn in enumerate(rounds(messages, to_answer=add_generation_prompt)):
            for pattern in self._opening(turn, first=number == 0):
                found += _turn(self._parts(pattern, tokenizer), turn)
            if turn.assistant is not None or add_generation_prompt:
                found += _scaffold(self._parts(self.prompt, tokenizer))
            if turn.assistant is not None:
                found += _answer(self._parts(self.answer, tokenizer), turn.assistant)
                found += _scaffold(self._parts(self.after, tokenizer))
        return found

    def end_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """The tokens that end an answer, the learned one first."""
        self.require_tokens(tokenizer)
        return list(dict.fromkeys(part.text for end in self.ends for part in self._parts(end, tokenizer)))

    def require_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise if the tokenizer lacks a token that this template is written with."""
        missing = [token for token in self.special if token not in tokenizer.special_tokens]
        if missing:
            raise LlameroError(
                f"template {self.name!r} needs {', '.join(missing)}, which the tokenizer does not have",
                where="template",
                fix=f"add to `data.extra_tokens`: {', '.join(missing)}",
            )
        for part, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
            if token is None and any(f"{{{part}}}" in pattern for pattern in self._patterns()):
                raise LlameroError(
                    f"template {self.name!r} is written with the tokenizer's {part} token, and it names none",
                    where="template",
                    fix=f"set `{part}_token` in the tokenizer_config.json of the base model",
                )

    def jinja(self, tokenizer: Tokenizer) -> str:
        """Jinja that writes, in `transformers` and whatever else runs it, what `pieces` writes.

        It refuses what `pieces` refuses, but for an empty answer.
        """
        self.require_tokens(tokenizer)

        def write(*patterns: str) -> str:
            return concatenation(part.jinja for pattern in patterns for part in self._parts(pattern, tokenizer))

        return SHELL.substitute(
            first_user=write(*self.first.user),
            first_context=write(*self.first.context),
            first_system=write(*self.first.system),
            first_system_context=write(*self.first.system_context),
            later_user=write(*self.later_user),
            later_context=write(*self.later_context),
            answer=write(self.prompt, self.answer, self.after),
            prompt=write(self.prompt),
        )

    def _opening(self, turn: Round, *, first: bool) -> Turns:
        if first:
            return self.first.turns(system=turn.system is not None, context=turn.context is not None)
        return self.later_user if turn.context is None else self.later_context

    def _parts(self, pattern: str, tokenizer: Tokenizer) -> tuple[Part, ...]:
        return parts(pattern, self.special, tokenizer)

    def _patterns(self) -> list[str]:
        first = self.first.user + self.first.context + self.first.system + self.first.system_context
        return [*first, *self.later_user, *self.later_context, self.prompt, self.answer, self.after, *self.ends]


def _turn(pattern: Sequence[Part], turn: Round) -> Iterator[Piece]:
    """Yield a turn before an answer; markup counts as of whom it announces, else of whom it closes."""
    messages = [message for message in (turn.system, turn.context, turn.user) if message is not None]
    said: dict[Speaker, str] = {message.role: message.text for message in messages}
    speakers: list[Speaker | None] = [part.speaker for part in pattern]
    for index, part in enumerate(pattern):
        if part.speaker is None:
            role = ROLES[_nearest(speakers, index)] + SCAFFOLD
            yield Piece(part.text, role, False, part.special)
        else:
            yield Piece(part.filled(said), ROLES[part.speaker], False, False)


def _nearest(speakers: Sequence[Speaker | None], index: int) -> Speaker:
    """Who speaks next, else who spoke last; a preamble without either is the system's."""
    for speaker in (*speakers[index:], *reversed(speakers[:index])):
        if speaker is not None:
            return speaker
    return "system"


def _answer(pattern: Sequence[Part], message: Message) -> Iterator[Piece]:
    for part in pattern:
        yield Piece(part.filled({"assistant": message.text}), ROLES["assistant"], message.learned, part.special)


def _scaffold(pattern: Sequence[Part]) -> Iterator[Piece]:
    for part in pattern:
        yield Piece(part.text, ROLES["assistant"] + SCAFFOLD, False, part.special)
