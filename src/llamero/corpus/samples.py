"""What a row of a data set becomes: a conversation or a plain text, or a reason why it is neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamero.text.messages import Message

Row = Mapping[str, Any]
"""A JSON object."""


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    messages: tuple[Message, ...]
    language: str = ""
    """Code such as `en`, where the row names one."""


@dataclass(frozen=True)
class Document:
    """Plain text, learned whole."""

    text: str
    language: str = ""
    """Code such as `en`, where the row names one."""
    domain: str = ""
    """Part of a corpus that it is of (`RedPajamaC4` and so on), where the row names one."""


Sample = Chat | Document


@dataclass(frozen=True)
class LeftOut:
    """What a rule of a layout keeps out, a reply ranked too low for example: counted, never an error."""

    reason: str


class BadRowError(ValueError):
    """A row that does not fit its layout; says which key and value."""
