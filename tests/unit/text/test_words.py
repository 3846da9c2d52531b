"""Whole texts are the oracle: the backend encodes them, and no word may make a difference."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from llamero.text import words
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
ATOMS = [
    *" \n\t\r\v\f\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\ufeff",
    *("  ", "\n\n", "\r\n", " \n", "\n ", "\t\n", " \t", "\n\t", "▁", " ▁"),
    *"0129٣Ⅷ½",
    *"aZséßſDω北ก",
    *("'s", "'S", "'ll", "'ſ", "don't", "Hello", "word"),
    *".,!?'\"()[]{}<>#-_*/\\`~^|;:…”«\x00\x7f",
    *("é", "\u0301", "\u0300", "🦙", "🏽", "\u200d", "ﷺ"),
    *("<s>", "</s>", "<|im_end|>", "<0x0A>", "<unk>"),
]
TEXTS = st.lists(st.sampled_from(ATOMS), max_size=12).map("".join)
BYTES = {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}


@pytest.mark.parametrize("splits", [splits for splits, _ in words._PROVED], ids=["lines"] * 3 + ["gpt2", "digits"])
@given(text=TEXTS)
def test_what_is_split_before_merging_is_cut_where_each_cut_alone_changes_nothing(splits, text):
    split = _pre_tokenizer(json.dumps(splits)).pre_tokenize_str
    pattern = next(pattern for proved, pattern in words._PROVED if proved == splits)
    found = pattern.findall(text)
    assert "".join(found) == text
    whole = [part for part, _ in split(text)]
    assert [part for word in found for part, _ in split(word)] == whole
    for match in pattern.finditer(text):
        left, right = text[: match.end()], text[match.end() :]
        assert [part for side in (left, right) for part, _ in split(side)] == whole


@cache
def _pre_tokenizer(splits: str):
    backend = tokenizers.Tokenizer(models.BPE())
    spec = {**json.loads(backend.to_str()), "pre_tokenizer": json.loads(splits)}
    for step in (spec["pre_tokenizer"], *spec["pre_tokenizer"].get("pretokenizers", [])):
        step.setdefault("trim_offsets", True)
    return tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer


def test_white_space_is_what_the_expressions_take_for_it():
    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    kept = pre_tokenizers.Split(Regex(r"\s"), "removed").pre_tokenize_str("".join(every))
    blank = set(every).difference(*(part for part, _ in kept))
    assert {each for each in every if re.match(f"[{words._SPACES}]", each)} == blank


@st.composite
def merged_whole(draw):
    """A random vocabulary that is merged over whole texts."""
    tokens = list("ab.!1\n▁é")
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        merge = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if "".join(merge) not in tokens:
            merges.append(merge)
            tokens.append("".join(merge))
    return sentencepiece_like({token: 257 + n for n, token in enumerate(tokens)}, merges)


def sentencepiece_like(vocab, merges, **options) -> Tokenizer:
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **options}
    backend = tokenizers.Tokenizer(models.BPE(vocab={"<unk>": 0, **BYTES, **vocab}, merges=merges, **model))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer(backend, bos=None, eos=None, unk="<unk>")


@given(tokenizer=merged_whole(), texts=st.lists(st.text("ab.!1\n\t▁ éß", max_size=12), min_size=5, max_size=5))
def test_a_vocabulary_that_is_merged_whole_is_cut_only_where_no_merge_joins(tokenizer, texts):
    assume(tokenizer.words is not None)
    for text in texts:
        for continues in (False, True):
            check(tokenizer, text, continues)


@cache
def tokenizer_named(name) -> Tokenizer:
    if name == "trained":
        return train_bpe(iter(["don't  stop\n\n\tthe 12 cats, said 3!\n"] * 3), vocab_size=275)
    if not SHARED.exists():
        pytest.skip("needs the shared data folder")
    return load_tokenizer(SHARED / "data" / name)


@pytest.mark.parametrize("name", ["trained", "tokenizers/llama2", "tokenizers/llama3", "weights/ref-7m-hf"])
@given(text=TEXTS, continues=st.booleans())
def test_ids_are_those_of_the_whole_text(name, text, continues):
    tokenizer = tokenizer_named(name)
    assert tokenizer.words is not None
    check(tokenizer, text, continues)


def check(tokenizer, text, continues):
    whole = tokenizer.encode_with_spans(text, continues=continues).ids
    assert tokenizer.encode(text, continues=continues) == whole
    assert tokenizer.encode_array(text, continues=continues).tolist() == whole
    assert tokenizer.encode_batch([text] * 2, continues=continues) == [whole] * 2


def test_a_merge_across_a_space_keeps_texts_whole():
    vocab = {"a": 300, "▁": 301, "▁a": 302, "a▁": 303}
    assert sentencepiece_like(vocab, [("▁", "a")]).words is not None
    across = sentencepiece_like(vocab, [("a", "▁")])
    assert across.words is None
    assert across.encode("a a a", continues=True) == [303, 303, 300]
    if SHARED.exists():
        assert tokenizer_named("weights/tinystories-656k-hf").words is None


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False},
        {"dropout": 0.5},
        {"ignore_merges": True},
        {"continuing_subword_prefix": "##"},
        {"end_of_word_suffix": "/"},
    ],
    ids=str,
)
def test_a_model_that_looks_beyond_two_neighbours_keeps_texts_whole(options):
    assert sentencepiece_like({"a": 300, "##a": 301}, [], **options).words is None


def test_what_nothing_is_proved_of_keeps_texts_whole():
    def backend():
        return tokenizers.Tokenizer.from_str(tokenizer_named("trained").backend.to_str())

    plain, normal, added, greedy = backend(), backend(), backend(), backend()
    assert Tokenizer(plain, bos=None, eos=None).words is not None
    normal.normalizer = normalizers.NFC()
    added.add_tokens([AddedToken("said 3", normalized=False)])
    greedy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    for each in (normal, added, greedy, other):
        assert Tokenizer(each, bos=None, eos=None).words is None
    missing = sentencepiece_like({"a": 300}, []).backend.to_str().replace('"<0x41>"', '"<0xAA>X"')
    assert Tokenizer(tokenizers.Tokenizer.from_str(missing), bos=None, eos=None).words is None


def test_the_memory_is_bounded_and_long_words_are_not_kept(monkeypatch):
    monkeypatch.setattr(words, "MOST", 3)
    merged = []

    def merge(word):
        merged.append(word)
        return [len(word)]

    memory = words.Words(re.compile(r" *\w+"), merge, dummy="")
    long = " " + "x" * words.LONGEST
    for _ in range(2):
        memory.encode("a b c" + long, continues=False)
    assert merged == ["a", " b", " c", long, long]
    memory.encode("a d a", continues=False)
    assert merged[5:] == [" d", " a"]
    assert len(memory._known) == 2  # it started anew
