"""Words and passages as numbers are those of a plain loop, wherever they are computed."""

import hashlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.corpus import overlap

TEXTS = st.text(st.characters() | st.sampled_from("aAbB .,'’ﬁ½ĳ漢字かคे́\u200d\xa0\n"), max_size=30)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't   STOP: it's 5.0 o_clock!", ["don", "t", "stop", "it", "s", "5", "0", "o", "clock"]),
        ("‘Straße’ — ＦＵＬＬ ﬁne", ["strasse", "full", "fine"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("什么是AI？", ["什", "么", "是", "ai"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("\ud800 half", ["half"]),
        ("?!…", []),
    ],
)
def test_words_are_compared_without_case_punctuation_and_width(text, words):
    assert overlap.split(text) == words


@given(TEXTS)
def test_the_same_text_normalised_first_has_the_same_words(text):
    assert overlap.split(unicodedata.normalize("NFKC", text)) == overlap.split(text)


@given(TEXTS)
def test_every_word_stands_where_its_span_says(text):
    spans = overlap.spans(text)
    assert len(spans) == len(overlap.split(text))
    for word, (start, stop) in zip(overlap.split(text), spans, strict=True):
        assert word in overlap.split(text[start:stop])


@given(st.lists(TEXTS, max_size=5), st.sets(st.integers(1, 6), min_size=1))
def test_equal_passages_and_only_they_have_equal_numbers(texts, lengths):
    words = overlap.words(texts)
    assert words.counts.tolist() == [len(overlap.split(text)) for text in texts]
    flat = [word for text in texts for word in overlap.split(text)]
    found = dict(overlap.passages(words.numbers, sorted(lengths)))
    for length in lengths:
        plain = [tuple(flat[at : at + length]) for at in range(len(flat) - length + 1)]
        numbers = found[length].tolist() if length in found else []
        assert len(numbers) == len(plain)
        assert len(set(zip(numbers, plain, strict=True))) == len(set(numbers)) == len(set(plain))


def test_numbers_are_the_same_in_every_process():
    code = "from llamero.corpus import overlap; print(overlap.words(['Two  words']).numbers.tolist())"
    ran = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert ran[0] == ran[1] == f"{overlap.words(['two words']).numbers.tolist()}\n".encode()
    assert overlap.words(["two"]).numbers.tolist() == [
        int.from_bytes(hashlib.blake2b(b"two", digest_size=8).digest(), "little")
    ]


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(overlap, "_MOST_REMEMBERED", 3)
    texts = [f"word{number}" for number in range(10)]
    assert np.array_equal(overlap.words(texts).numbers, overlap.words(texts).numbers)
