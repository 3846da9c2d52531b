"""A model's own chat template: whatever Jinja it comes with, with masks found by rendering turn by turn.

The Jinja is asked for the text up to each answer and for the text with it. Where the one does not begin the other,
what is learned would not be what the model is asked later, and the template is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamero.core.errors import LlameroError
from llamero.text.messages import ROLES, SCAFFOLD, Message, rounds
from llamero.text.patterns import split_special
from llamero.text.pieces import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

    from jinja2.parser import Parser

    from llamero.text.tokenizer import Tokenizer

NAMED = "name another template"


@dataclass(frozen=True)
class ModelTemplate:
    """The Jinja of a model.

    Args:
        source: The Jinja itself.
        today: What a template that writes the date is told; None refuses such a template.
    """

    source: str
    today: date | None = None

    def pieces(self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[Piece]:
        """What a conversation is written as."""
        rounds(messages, to_answer=add_generation_prompt)  # refuses what is out of turn
        self._require_plain_tokens(tokenizer)
        write = _Writer(self, tokenizer)
        text = write(messages, add_generation_prompt)
        stretches = _locate(text, messages, write(_marked(messages), add_generation_prompt))
        answers = [
            self._answer(index, messages, stretches, text, write)
            for index, message in enumerate(messages)
            if message.role == "assistant"
        ]
        return _pieces(stretches, answers, messages, tokenizer, text)

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The Jinja as it came."""
        return self.source

    def end_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """The tokens that end an answer: the one that this template writes behind it, and the tokenizer's own."""
        probe = [Message("user", "Hello"), Message("assistant", "Hello")]
        last = [piece for piece in self.pieces(probe, tokenizer, add_generation_prompt=False) if piece.learned][-1]
        return list(dict.fromkeys([last.text, *([] if tokenizer.eos is None else [tokenizer.eos])]))

    def _require_plain_tokens(self, tokenizer: Tokenizer) -> None:
        greedy = [token for token in tokenizer.greedy_tokens if token in self.source]
        if greedy:
            raise LlameroError(
                f"the model's own template is written with {', '.join(greedy)}, which swallow the space around them",
                where="template",
                fix=NAMED,
            )

    def _answer(
        self, index: int, messages: Sequence[Message], stretches: list[_Stretch], text: str, write: _Writer
    ) -> _Answer:
        """Return what is learned of one answer: all that stands behind the prompt, to the token that ends it."""
        prompt = write(messages[:index], True)
        answered = write(messages[: index + 1], False)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise LlameroError(
                "the model's own template writes an answer differently once the conversation goes on, "
                "so no mask would be right",
                where=f"message {index}",
                fix=f"{NAMED}, or split the conversation into one per answer",
            )
        said = next(stretch for stretch in stretches if stretch.message == index)
        if said.start < len(prompt):
            raise LlameroError(
                "the model's own template writes the answer into the prompt",
                where=f"message {index}",
                fix=NAMED,
            )
        rest = split_special(answered[said.stop :], write.special)
        closing = next((n for n, piece in enumerate(rest) if piece in write.special), None)
        if closing is None:
            raise LlameroError(
                "the model's own template writes no special token after an answer, "
                "so the model would never learn to stop",
                where=f"message {index}",
                fix=NAMED,
            )
        return _Answer(len(prompt), said.stop + sum(map(len, rest[: closing + 1])), index)


def written(
    source: str, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool, today: date | None
) -> str:
    """Return what a Jinja writes of a conversation, whoever speaks when: nothing is checked but by the Jinja itself.

    Args:
        source: The Jinja.
        messages: The conversation.
        tokenizer: Whose special tokens it names.
        add_generation_prompt: Open an answer.
        today: What it is told if it writes the date; None refuses that.

    Raises:
        LlameroError: It refuses the conversation, or is no Jinja.
    """
    return _Writer(ModelTemplate(source, today), tokenizer)(messages, add_generation_prompt)


def auto_template(tokenizer: Tokenizer, *, today: date | None = None) -> ModelTemplate:
    """The model's own template.

    Args:
        tokenizer: As loaded with the model.
        today: The date that a template which writes it is given; without one such a template is refused, because
            a dataset made today would differ from one made tomorrow.
    """
    if tokenizer.chat_template is None:
        raise LlameroError(
            "`auto` is the model's own chat template, and this model has none", where="template", fix=NAMED
        )
    return ModelTemplate(tokenizer.chat_template, today)


class _Stretch(NamedTuple):
    """A part of a rendered text: what message number `message` says, or None for what the template wrote."""

    start: int
    stop: int
    message: int | None


class _Answer(NamedTuple):
    """The characters that are learned of message number `message`."""

    start: int
    stop: int
    message: int


class _Writer:
    """Runs a model's Jinja on messages."""

    def __init__(self, template: ModelTemplate, tokenizer: Tokenizer) -> None:
        named = {
            "bos_token": tokenizer.bos,
            "eos_token": tokenizer.eos,
            "unk_token": tokenizer.unk,
            "pad_token": tokenizer.pad,
        }
        self._named = {name: token for name, token in named.items() if token is not None}
        self._today = template.today
        self._compiled = _compiled(template.source)
        self.special = tokenizer.special_tokens

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._compiled.render(
                messages=[{"role": message.role, "content": message.text} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self._strftime_now,
                **self._named,
            )
        except jinja2.TemplateError as error:
            raise LlameroError(
                f"the model's own template refuses this conversation: {error}",
                where=f"message {len(messages) - 1}",
                fix=NAMED,
            ) from error

    def _strftime_now(self, form: str) -> str:
        if self._today is None:
            raise LlameroError(
                "the model's own template writes today's date, so that the same data would give other tokens tomorrow",
                where="template",
                fix=f"{NAMED}, or say which day it is: auto_template(tokenizer, today=…)",
            )
        return self._today.strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which only marks what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Jinja in the environment that `transformers` runs it in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise LlameroError(
            f"the model's own template is no Jinja: {error.message}",
            where=f"chat_template:{error.lineno}",
            fix=NAMED,
        ) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


_MARK = re.compile("\ue000([0-9]+)\ue001")
"""What stands for a message to find its place: a text that no template holds and none changes."""


def _marked(messages: Sequence[Message]) -> list[Message]:
    return [Message(message.role, f"\ue000{index}\ue001") for index, message in enumerate(messages)]


def _locate(text: str, messages: Sequence[Message], marked: str) -> list[_Stretch]:
    """Return where each message stands in a text, from the text of marks in their place.

    Raises:
        LlameroError: A message is missing, repeated, or written differently by more than the space around it.
    """
    markup, found = _MARK.split(marked)[::2], [int(index) for index in _MARK.findall(marked)]
    for index in range(len(messages)):
        if found.count(index) != 1:
            raise _rewritten(messages, index)
    stretches: list[_Stretch] = []
    at = 0
    for index, before, follows in zip(found, markup, markup[1:], strict=False):
        words = messages[index].text
        ways = [words, words.rstrip(), words.lstrip(), words.strip()]
        said = next((way for way in ways if text.startswith(before + way + follows, at)), None)
        if said is None:
            raise _rewritten(messages, index)
        start = at + len(before)
        stretches += [_Stretch(at, start, None), _Stretch(start, start + len(said), index)]
        at = start + len(said)
    if text[at:] != markup[-1]:
        raise LlameroError(
            "the model's own template ends differently for other words",
            where=f"message {len(messages) - 1}",
            fix=NAMED,
        )
    return [*stretches, _Stretch(at, len(text), None)]


def _rewritten(messages: Sequence[Message], index: int) -> LlameroError:
    return LlameroError(
        f"the model's own template does not write this {messages[index].role} message once and as it is",
        where=f"message {index}",
        fix=NAMED,
    )


def _pieces(
    stretches: list[_Stretch],
    answers: list[_Answer],
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    text: str,
) -> list[Piece]:
    """Return a text as pieces: cut at messages, at answers and at special tokens."""
    found: list[Piece] = []
    for number, stretch in enumerate(stretches):
        if stretch.message is not None:
            message = messages[stretch.message]
            learned = message.role == "assistant" and message.learned
            found.append(Piece(text[stretch.start : stretch.stop], ROLES[message.role], learned, False))
            continue
        ahead = stretches[number + 1].message if number + 1 < len(stretches) else None
        role = ROLES["assistant" if ahead is None else messages[ahead].role]
        for start, stop, answer in _cut(stretch, answers):
            for piece in split_special(text[start:stop], tokenizer.special_tokens):
                special = piece in tokenizer.special_tokens
                if answer is None:
                    found.append(Piece(piece, role + SCAFFOLD, False, special))
                else:
                    found.append(Piece(piece, ROLES["assistant"], messages[answer].learned, special))
    return [piece for piece in found if piece.text]


def _cut(stretch: _Stretch, answers: list[_Answer]) -> list[tuple[int, int, int | None]]:
    """Return a stretch of markup cut at the edges of answers: (start, stop, the message it belongs to)."""
    edges = sorted(
        {stretch.start, stretch.stop}
        | {edge for answer in answers for edge in answer[:2] if stretch.start < edge < stretch.stop}
    )
    return [
        (start, stop, next((a.message for a in answers if a.start <= start and stop <= a.stop), None))
        for start, stop in pairwise(edges)
    ]
