"""Fields of a row: the text under a key, or what is wrong there."""

from __future__ import annotations

from typing import Any

from llamero.corpus.samples import BadRowError, Row


def text(row: Row, *keys: str, optional: bool = False) -> str:
    """Return the text under the first of `keys` that the row has; "" for an optional one that it has not.

    Raises:
        BadRowError: There is none, or it is no text, or holds half a character.
    """
    found = [key for key in keys if row.get(key) is not None]
    if not found:
        if optional:
            return ""
        what = "null" if keys[0] in row else "missing"
        raise BadRowError(f"`{keys[0]}` is {what}; the row has {names(row)}")
    key, value = found[0], row[found[0]]
    if not isinstance(value, str):
        raise BadRowError(f"`{key}` must be text, is {short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"`{key}` holds half a character (lone surrogate) at {error.start}") from error
    return value


def short(value: Any) -> str:
    """Return the type and the beginning of a value, for messages."""
    said = repr(value)
    return f"{type(value).__name__} {said[:60]}{'…' if len(said) > 60 else ''}"


def names(row: Row) -> str:
    """Return the keys of a row, for messages."""
    return printable(", ".join(list(row)[:20]) + (" …" if len(row) > 20 else "")) or "no keys"


def printable(value: object) -> str:
    """Return a value as text that can be printed, half characters written as escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
