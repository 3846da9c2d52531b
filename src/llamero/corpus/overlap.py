"""Words of texts as numbers, and passages of n words as numbers: what texts are compared by.

Words are compared without case, punctuation and width (Unicode NFKC); of scripts that put no spaces between words every
character counts as a word. The numbers are 64-bit hashes (BLAKE2b of a word, polynomials of words for a passage): the
same in every process and on every machine.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Thai and Lao, Burmese, Khmer, kana, Han."""
_ASCII = bytes(code if code > 127 else ord(chr(code).lower()) if chr(code).isalnum() else 32 for code in range(256))
"""Bytes of UTF-8: letters in lower case, punctuation as spaces, what is not ASCII as it is."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, without a pattern in its bits: makes one number of several, in their order."""
_MOST_REMEMBERED = 1 << 20


class Words(NamedTuple):
    """The words of several texts, one after the other."""

    numbers: NDArray[np.uint64]
    """A number for each word."""
    starts: NDArray[np.int64]
    """Where the words of each text begin; one more than there are texts."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return how many words each text has."""
        return np.diff(self.starts)


class _Numbers(dict[str, int]):
    """The number of every word seen."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_REMEMBERED:
            self.clear()
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = self[word] = int.from_bytes(digest, "little")
        return number


class _Plain(dict[int, str]):
    """Every character that is not ASCII as it is compared: punctuation as a space, spaces around one that is a word."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if _NO_SPACES.match(character):
            plain = f" {character} "
        else:
            plain = character if character.isalnum() or unicodedata.category(character)[0] == "M" else " "
        self[code] = plain
        return plain


_numbers = _Numbers()
_plain = _Plain()


def split(text: str) -> list[str]:
    """Return the words of a text as they are compared."""
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _FOREIGN.sub(lambda run: run.group().translate(_plain), folded)
    return text.encode("utf-8", "surrogatepass").translate(_ASCII).decode("utf-8", "surrogatepass").split()


def spans(text: str) -> list[tuple[int, int]]:
    """Return where each word of `split(text)` stands: from character to character, with what touches it."""
    return [piece.span() for piece in re.finditer(r"\S+", text) for _ in split(piece.group())]


def words(texts: Sequence[str]) -> Words:
    """Return the words of texts as numbers."""
    lists = [split(text) for text in texts]
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(found) for found in lists], out=starts[1:])
    flat = map(_numbers.__getitem__, chain.from_iterable(lists))
    return Words(np.fromiter(flat, np.uint64, int(starts[-1])), starts)


def passages(numbers: NDArray[np.uint64], lengths: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield the passages of each length of `lengths`, the shortest first: at place i that of words i to i + length.

    They run on over the ends of texts: whoever counts a passage looks where it begins and ends.
    """
    found, length = numbers, 1
    while found.size and length <= max(lengths, default=0):
        if length in lengths:
            yield length, found
        found, length = found[:-1] * FACTOR + numbers[length:], length + 1
