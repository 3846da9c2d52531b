"""The base of every config: nothing unknown, nothing changed after reading, every field documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Strict(BaseModel):
    """A config that refuses unknown keys and cannot be changed; docstrings under fields are its manual."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def parse(kind: Any, keys: Mapping[str, object]) -> Any:
    """Return the config that a command line describes.

    Args:
        kind: A config class, or a union of some.
        keys: Its fields.

    Raises:
        LlameroError: Naming the first key that does not fit.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(keys))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise LlameroError(f"`{place}` is not an option of this") from error
        text = first["msg"].removeprefix("Value error, ")
        if not place:  # of the whole, not of one key
            raise LlameroError(text) from error
        raise LlameroError(f"{place}: {text[:1].lower()}{text[1:]} (got {first['input']!r})") from error
