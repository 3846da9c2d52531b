"""Alpaca rows that come already wrapped, taken out of their wrapper."""

from __future__ import annotations

import re

from llamero.text.system_messages import ALPACA, ALPACA_WITH_INPUT

_ALONE = re.compile(re.escape(ALPACA) + r"\n\n### Instruction:\n(?P<instruction>.*)\n\n### Response:\n?", re.DOTALL)
_WITH_INPUT = re.compile(
    re.escape(ALPACA_WITH_INPUT)
    + r"\n\n### Instruction:\n(?P<instruction>.*?)\n\n### Input:\n(?P<input>.*)\n\n### Response:\n?",
    re.DOTALL,
)


def alpaca_unwrap(text: str) -> tuple[str, str] | None:
    """Return (instruction, input) of a text in the standard Alpaca wrapper; None if it is not exactly that."""
    alone = _ALONE.fullmatch(text)
    if alone is not None:
        return alone["instruction"], ""
    wrapped = _WITH_INPUT.fullmatch(text)
    return None if wrapped is None else (wrapped["instruction"], wrapped["input"])
