"""The base of every config: nothing unknown, nothing changed after reading, every field documented."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A config that refuses unknown keys and cannot be changed; docstrings under fields are its manual."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
