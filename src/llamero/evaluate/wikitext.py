"""Perplexity per word, as lm-evaluation-harness measures it on WikiText: page by page, text as people write it.

A page is detokenized, then scored in windows that do not overlap: each token once, the first after a token that stands
for the beginning. Words and bytes are those of the page as it was (lm_eval/tasks/wikitext, version 2).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llamero.text.tokenizer import Tokenizer

Compat = Literal["lm-eval", "leaderboard-2023"]

REPLACED: tuple[tuple[str, str], ...] = (
    ("s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),  # a sed expression that was taken over with its slashes: it never matches
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (r" \. ", ". "),
    (" ! ", "! "),
    (r" \? ", "? "),
    (" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
"""Patterns that undo WikiText's tokenization, in order, and what stands for each."""

_REPLACED = tuple((re.compile(pattern), text) for pattern, text in REPLACED)


def detokenized(page: str) -> str:
    """Return a page of WikiText with punctuation, brackets and headings as people write them."""
    for pattern, text in _REPLACED:
        page = pattern.sub(text, page)
    return page


def pages(path: Path) -> list[str]:
    """Return the pages of a file.

    Args:
        path: The raw text of WikiText, in which a heading of the first level (` = Title = `) begins a page, or JSONL
            with a page in the field `page` of each line.

    Raises:
        LlameroError: The file is missing, is not UTF-8, or holds no page.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LlameroError("text to measure on is missing", where=path) from error
    except UnicodeDecodeError as error:
        raise LlameroError(f"not UTF-8: {error.reason}", where=path) from error
    found = list(_rows(text, path) if path.suffix == ".jsonl" else _cut(text))
    if not found:
        raise LlameroError("there is no page in it", where=path, fix="give WikiText's raw text (wiki.test.raw)")
    return found


def _rows(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)["page"]
        except (ValueError, KeyError, TypeError) as error:
            raise LlameroError("not a JSON object with a `page`", where=f"{path}:{number}") from error


def _cut(text: str) -> Iterator[str]:
    """Yield the stretches that begin with a heading of the first level; blank ones are none."""
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _begins(line)]
    for start, stop in pairwise(dict.fromkeys([0, *starts, len(lines)])):
        page = "\n".join(lines[start:stop])
        if page.strip():
            yield page


def _begins(line: str) -> bool:
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


class Beginning(NamedTuple):
    """How the text of a page begins, of which two rules are about."""

    prefix: int
    """The token before the first one."""
    scored: tuple[int, ...]
    """Tokens that the page begins with and that are scored like its own."""
    words: str
    """The rule, for the report."""


def beginning(tokenizer: Tokenizer, compat: Compat) -> Beginning:
    """Return how a harness begins a page.

    That of 2023 puts the end-of-text token before it, and nothing else. Today's puts BOS before it, where there is
    one; and where the tokenizer begins texts with BOS it does so here too, so that BOS is scored after BOS.

    Raises:
        LlameroError: The tokenizer has no such token.
    """
    if compat == "leaderboard-2023":
        if tokenizer.eos_id is None:
            raise LlameroError("the tokenizer has no end-of-text token, with which the protocol of 2023 begins a page")
        return Beginning(tokenizer.eos_id, (), "EOS before each page, no BOS")
    prefix, name = (tokenizer.bos_id, "BOS") if tokenizer.bos_id is not None else (tokenizer.eos_id, "EOS")
    if prefix is None:
        raise LlameroError("the tokenizer has neither BOS nor EOS, with which the protocol begins a page")
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return Beginning(prefix, (tokenizer.bos_id,), "BOS before each page, and once more as its first scored token")
    return Beginning(prefix, (), f"{name} before each page")


def rolling(ids: Sequence[int], prefix: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, continuation) pairs in which every token of a text is predicted once.

    Windows hold `max_length` tokens; each goes on where the last one ended, after one token of context. Only the last
    one has as much context as fits.

    Args:
        ids: The text.
        prefix: The token before its first.
        max_length: Tokens that the model sees at a time.
    """
    whole = [prefix, *ids]
    found: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(ids), max_length):
        stop = min(start + max_length, len(ids))
        first = max(0, stop - max_length)  # of what the model sees, in `whole`
        found.append((whole[first : start + 1], list(ids[start:stop])))
    return found


@dataclass(frozen=True)
class PerWord:
    """How surprised a model is by pages."""

    log_likelihood: float
    """Sum over all tokens, in nats."""
    words: int
    """Of the pages as they were, cut at white space."""
    bytes: int
    """Of the pages as they were, in UTF-8."""
    tokens: int
    """That were scored."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return perplexity per word and per byte, and bits per byte."""
        return {
            "word_perplexity": _exp(-self.log_likelihood / self.words),
            "byte_perplexity": _exp(-self.log_likelihood / self.bytes),
            "bits_per_byte": -self.log_likelihood / self.bytes / math.log(2),
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def words(page: str) -> int:
    """Return the words of a page, counted as the harness does: an empty one at either end counts too."""
    return len(re.split(r"\s+", page))
