"""Numbers, tables and code blocks as Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NOTHING = "–"
"""A cell of what was not measured or does not apply."""


def size(num_bytes: int) -> str:
    """Return a size in GB of 10^9 bytes, or in MB if it is small."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def count(number: float) -> str:
    """Return a number with its thousands apart."""
    return f"{number:,.0f}"


def parameters(number: int) -> str:
    """Return a number of parameters as people say it: 0.90 M, 68.98 B."""
    if number < 100_000:
        return count(number)
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def plural(number: int, noun: str) -> str:
    """Return `1 stage`, `2 stages`."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return a table; the first `left` columns are aligned left, the others right."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [header, rule, *rows])


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def fence(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any in the text; a newline at the end is an empty line."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"
