"""The one renderer: a conversation becomes a text, its ids, who said each, and which are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llamero.core.errors import LlameroError
from llamero.text.auto import auto_template
from llamero.text.messages import as_messages
from llamero.text.pieces import Rendered, RenderedArrays, tokenize, tokenize_batch
from llamero.text.templates import template_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.text.messages import Message
    from llamero.text.pieces import Piece
    from llamero.text.tokenizer import Tokenizer


class ChatTemplate(Protocol):
    """What renders: one of `llamero.text.templates.TEMPLATES`, or a model's own (`llamero.text.auto`)."""

    def pieces(self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[Piece]:
        """What a conversation is written as."""
        ...

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The Jinja that writes the same."""
        ...

    def end_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """The tokens that end an answer, the learned one first."""
        ...


def render(
    messages: Sequence[Message | Mapping[str, str]],
    template: str | ChatTemplate,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Return a conversation's text and tokens, with masks made turn by turn.

    The ids of a conversation that ends with a generation prompt are the first ids of the same conversation with
    its answer.

    Args:
        messages: [system] ([context] user assistant)…; the last answer may be missing.
        template: Its name, or itself; `auto` is the model's own.
        tokenizer: Must have the tokens that the template is written with.
        add_generation_prompt: End where the assistant is to speak.

    Raises:
        LlameroError: Somebody speaks out of turn, or template and tokenizer do not go together.
    """
    pieces = resolve(template, tokenizer).pieces(
        as_messages(messages), tokenizer, add_generation_prompt=add_generation_prompt
    )
    return tokenize(pieces, tokenizer)


def render_batch(
    chats: Sequence[Sequence[Message]], template: str | ChatTemplate, tokenizer: Tokenizer
) -> list[RenderedArrays | LlameroError]:
    """Return what `render` returns for each conversation, in arrays; why one cannot be rendered stands in its place.

    Raises:
        LlameroError: Template and tokenizer do not go together.
    """
    resolved = resolve(template, tokenizer)
    resolved.jinja(tokenizer)  # raises where the tokenizer lacks what the template is written with
    made: list[list[Piece] | LlameroError] = []
    for chat in chats:
        try:
            made.append(resolved.pieces(as_messages(chat), tokenizer, add_generation_prompt=False))
        except LlameroError as error:
            made.append(error)
    rendered = iter(tokenize_batch([each for each in made if not isinstance(each, LlameroError)], tokenizer))
    return [each if isinstance(each, LlameroError) else next(rendered) for each in made]


def resolve(template: str | ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a name; a template itself is returned as it is."""
    if not isinstance(template, str):
        return template
    return auto_template(tokenizer) if template == "auto" else template_named(template)


def chat_template(template: str | ChatTemplate, tokenizer: Tokenizer) -> str:
    """Jinja with which other software writes, byte for byte, the text that `render` writes."""
    return resolve(template, tokenizer).jinja(tokenizer)


def generation_config(template: str | ChatTemplate, tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """What generation_config.json must say so that a model stops where its answers end.

    Padding may be the same token as an end: losses are masked by position, never by id.
    """
    ends: list[int] = []
    for token in resolve(template, tokenizer).end_tokens(tokenizer):
        id = tokenizer.id(token)
        assert id is not None, token  # a special token of this tokenizer
        ends.append(id)
    config: dict[str, int | list[int]] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if tokenizer.bos_id is not None:
        config["bos_token_id"] = tokenizer.bos_id
    config["pad_token_id"] = ends[0] if tokenizer.pad_id is None else tokenizer.pad_id
    return config
