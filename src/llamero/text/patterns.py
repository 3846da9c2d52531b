"""The patterns of a template taken apart: the same parts are filled by rendering and exported as Jinja."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast, get_args

from llamero.text.messages import Speaker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llamero.text.tokenizer import Tokenizer

_SLOT = re.compile(r"\{(\w+)(?:\|(\w+))?\}")


class Part(NamedTuple):
    """A stretch of a pattern: markup, one special token, or the slot for what somebody says.

    Args:
        text: What is written; of a slot, nothing yet.
        special: The text is one special token.
        speaker: Whose words fill the slot; None if this is no slot.
        trim: What a slot takes off the words: "" nothing, "trim" space on both sides, "rtrim" space behind.
        jinja: The same as a Jinja expression.
    """

    text: str
    special: bool
    speaker: Speaker | None
    trim: str
    jinja: str

    def filled(self, said: Mapping[Speaker, str]) -> str:
        """What is written when people say this."""
        if self.speaker is None:
            return self.text
        words = said[self.speaker]
        return {"": words, "trim": words.strip(), "rtrim": words.rstrip()}[self.trim]


def parts(pattern: str, special: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Part, ...]:
    """Return what a pattern is made of, for a tokenizer that has all it needs.

    Args:
        pattern: As `llamero.text.templates` describes.
        special: Tokens that the pattern spells out.
        tokenizer: Names the tokens behind `{bos}` and `{eos}`.
    """
    return _parts(pattern, special, tokenizer.bos, tokenizer.eos, tokenizer.add_bos)


@lru_cache(maxsize=1024)
def _parts(pattern: str, special: tuple[str, ...], bos: str | None, eos: str | None, add_bos: bool) -> tuple[Part, ...]:
    named = {"bos": bos, "eos": eos, "add_bos": bos if add_bos else None}
    found: list[Part] = []
    at = 0
    for slot in _SLOT.finditer(pattern):
        found += _markup(pattern[at : slot.start()], special)
        at = slot.end()
        name, trim = slot.group(1), slot.group(2) or ""
        if name in get_args(Speaker):
            found.append(Part("", False, cast("Speaker", name), trim, name + _JINJA_TRIM[trim]))
            continue
        token = named[name]
        if token is not None:
            found.append(Part(token, True, None, "", f"{name.removeprefix('add_')}_token"))
        elif name != "add_bos":
            raise ValueError(f"pattern {pattern!r}: this tokenizer has no {name}")
    return (*found, *_markup(pattern[at:], special))


_JINJA_TRIM = {"": "", "trim": ".strip()", "rtrim": ".rstrip()"}


def split_special(text: str, special: Sequence[str]) -> list[str]:
    """Return a text cut before and after each special token that it spells; of two that fit, the longer."""
    if not special:
        return [text] if text else []
    longest_first = sorted(special, key=len, reverse=True)
    cuts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [piece for piece in cuts if piece]


def quoted(text: str) -> str:
    """Return a text as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _markup(text: str, special: Sequence[str]) -> Iterator[Part]:
    for piece in split_special(text, special):
        yield Part(piece, piece in special, None, "", quoted(piece))
