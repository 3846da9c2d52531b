"""Word by word: ids of a text from the ids of its words, where no token can reach from one word into the next.

Most words of a corpus come again and again, so that looking them up is several times faster than merging them anew.
Which places no token reaches across is proved from the tokenizer itself, never guessed from its name: a vocabulary
merged over whole texts (Llama, Llama 2) is asked for merges across, and of expressions that split a text before it is
merged (GPT-2, GPT-4, Llama 3) only those are taken that stand below, with the reason why it holds for them.
"""

from __future__ import annotations

import json
import re
import string
from array import array
from typing import TYPE_CHECKING, Any

from llamero.text.tiktoken_bpe import LLAMA3_SPLIT, ONE_DIGIT_SPLIT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import tokenizers

LONGEST = 32
"""Characters of a word that is remembered."""
MOST = 1 << 18
"""Words that are remembered; beyond them the memory starts anew."""

_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's white space: `\\s` of the expressions below. Python's own `\\s` has four more."""
_IN_LINE = _SPACES.replace(r"\t-\r", r"\t\v\f")
"""The same without ends of lines."""
_NAME = r"[!-@\[-`{-~]*+[A-Za-z]++(?![^\x00-\x7f])"
"""ASCII letters and the signs before them. Behind a letter, the expressions below go on with nothing but letters; only
what is beyond ASCII would need a closer look."""

_SPLITS_LINES = re.compile(
    rf"[{_IN_LINE}]?+{_NAME}|[{_IN_LINE}]?[^{_SPACES}]+(?:(?<![A-Za-z0-9])[{_SPACES}]*[\r\n]+)?"
    rf"|[{_SPACES}]*[\r\n]+|[{_SPACES}]+(?![^{_SPACES}])"
)
"""For expressions with `\\s*[\\r\\n]+`. No match has white space behind a visible character, but for ends of lines
behind signs: these stay with the signs. Else white space is cut behind its last end of line and before its last
character."""

_SPLITS_SPACES = re.compile(rf"[{_SPACES}]?+{_NAME}|[{_SPACES}]?[^{_SPACES}]+|[{_SPACES}]+(?![^{_SPACES}])")
"""For GPT-2's expression: no match has white space behind a visible character, and a run of white space is cut before
its last character, though not behind it: all of a run at the end of a text is one match."""

_SPLITS_DIGITS = re.compile(rf"[{_SPACES}]*(?:{_NAME}|[^{_SPACES}]+)|[{_SPACES}]+")
"""For GPT-2's where digits are split off before: there a run of white space before a digit is not cut."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}  # 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
_GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


_PROVED: list[tuple[dict[str, Any], re.Pattern[str]]] = [
    *((_sequence(_split(each), _BYTES), _SPLITS_LINES) for each in (LLAMA3_SPLIT, _GPT4, ONE_DIGIT_SPLIT)),
    (_GPT2, _SPLITS_SPACES),
    (_sequence({"type": "Digits", "individual_digits": True}, _GPT2), _SPLITS_DIGITS),
]
"""What splits a text before it is merged, and the words that it never joins or changes by what stands beside them.
To add one: the argument, a line here, and its name in the test that compares with the whole text."""

_BLANK = re.compile(rf"[{_SPACES}▁]").match


class Words:
    """A text's ids, from those of its words; the same as of the whole text.

    Args:
        pattern: Finds words: every text is nothing but matches, and no token reaches from one into the next.
        merge: Ids of a word.
        dummy: Written before a text that does not go on where another ended.
    """

    def __init__(self, pattern: re.Pattern[str], merge: Callable[[str], Sequence[int]], *, dummy: str) -> None:
        self.dummy = dummy
        self._pattern = pattern
        self._find = pattern.findall
        self._known = _Known(merge)

    def encode(self, text: str, *, continues: bool) -> bytes:
        """Ids of a text as int32, packed; `continues` as in `Tokenizer.encode`."""
        if self.dummy and text and not continues:
            text = self.dummy + text
        return b"".join(map(self._known.__getitem__, self._find(text)))

    def around(self, text: str, at: int, *, since: int) -> tuple[int, int]:
        """The stretch around a place that a token may reach across; empty where none does.

        Args:
            text: The whole.
            at: The place: before this character.
            since: A place before it that no token reaches across.
        """
        start = text.rfind(" ", since, at + 1)
        while start > since and _BLANK(text[start - 1]):
            start = text.rfind(" ", since, start)
        start = max(start, since)  # no word of any kind reaches from what is visible into a space
        while start < at:
            word = self._pattern.match(text, start)
            assert word is not None  # words are all there is
            if word.end() > at:
                return start, word.end()
            start = word.end()
        return at, at


class _Known(dict[str, bytes]):
    """Words and their ids; what is missing is merged, and remembered unless it is long."""

    def __init__(self, merge: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self._merge = merge

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._merge(word)).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = ids
        return ids


def words_of(backend: tokenizers.Tokenizer) -> Words | None:
    """The words of a tokenizer, None where no proof covers it; special tokens that are spelled out are words, too."""
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model["dropout"] or not all(token["special"] for token in spec["added_tokens"]):
        return None
    merge, split = backend.model.tokenize, backend.pre_tokenizer
    if split is None:
        pattern = _merged_whole(spec)
        return pattern and Words(pattern, lambda word: [token.id for token in merge(word.replace(" ", "▁"))], dummy=" ")
    splits = _without_trim(spec["pre_tokenizer"])
    pattern = next((pattern for proved, pattern in _PROVED if proved == splits), None)
    if pattern is None or spec["normalizer"] is not None:
        return None
    parts = split.pre_tokenize_str
    return Words(pattern, lambda word: [token.id for part, _ in parts(word) for token in merge(part)], dummy="")


def _without_trim(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step without what decides spans only."""
    kept = {key: value for key, value in step.items() if key != "trim_offsets"}
    if "pretokenizers" in kept:
        kept["pretokenizers"] = [_without_trim(each) for each in kept["pretokenizers"]]
    return kept


_PREPEND = {"type": "Prepend", "prepend": "▁"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _merged_whole(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Return the words of a vocabulary that is merged over whole texts, None where a merge joins two words.

    Two neighbours are joined only by a merge whose left part ends with the one and whose right part begins with the
    other. A character without a token becomes bytes, which no merge takes.
    """
    model = spec["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    plain = (
        spec["normalizer"] == {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
        and not (model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and model["byte_fallback"]
        and byte_tokens <= model["vocab"].keys()
        and byte_tokens.isdisjoint(part for merge in merges for part in merge)
    )
    pairs = {(left[-1], right[0]) for left, right in merges}
    if not plain or any(right == "▁" != left for left, right in pairs):
        return None
    joined = {character for pair in pairs for character in pair}
    alone = "".join(each for each in map(chr, range(128)) if each not in joined and each != " " and not each.isalpha())
    letters = string.ascii_letters
    signs = "".join(
        each
        for each in string.punctuation
        if each not in alone and not any((each, a) in pairs or (a, each) in pairs for a in letters)
    )
    apart, sign = re.escape(alone), re.escape(signs)
    return re.compile(
        rf"[ ▁]*+(?:[A-Za-z]++(?![^ ▁{apart}{sign}])|{_any_of(signs)}++(?![^ ▁{apart}A-Za-z])|[^ ▁{apart}]+)"
        rf"|{_any_of(alone)}+|[ ▁]+"
    )


def _any_of(characters: str) -> str:
    """Return an expression for one of these characters."""
    return f"[{re.escape(characters)}]" if characters else "(?!)"
