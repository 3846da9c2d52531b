"""The one exception that a user's own input can cause: it says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class LlameroError(Exception):
    """A problem the user can mend.

    Args:
        problem: What is wrong, with the offending value.
        where: File (with line), tensor or key it was found at.
        fix: What to do about it.
    """

    def __init__(self, problem: str, *, where: str | Path | None = None, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{head}\n  fix: {self.fix}" if self.fix else head


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the way out for an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(names)}"
