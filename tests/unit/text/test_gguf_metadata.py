"""Tokenizers written into GGUF metadata: against the fields of real files, and read back."""

import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from llamero.core.errors import LlameroError
from llamero.core.gguf import read_header
from llamero.text.gguf_metadata import PROBES, to_metadata
from llamero.text.gguf_vocabulary import PRE, from_metadata
from llamero.text.sentencepiece_bpe import scores_of
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"no real files in {SHARED}")


def plain(written):
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in written.values.items()}


def again(written):
    metadata = {key: value.value for key, value in written.values.items()}
    return Tokenizer(**from_metadata(metadata, where="model.gguf")._asdict())


@needs_data
@pytest.mark.parametrize("scored", [True, False], ids=["scores of the file", "scores of the merges"])
def test_llama_2_is_written_as_in_a_real_file(scored):
    path = SHARED / "tokenizers/llama2/tokenizer.model"
    written = to_metadata(load_tokenizer(path), vocab_size=32000, scores=scores_of(path) if scored else None)
    real = read_header(SHARED / "weights/random-fixtures/llama-2-tiny-random.gguf").metadata
    ours = plain(written)
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert ours[key] == real[f"tokenizer.ggml.{key}"], key
    mine, recorded = np.array(ours["scores"]), np.array(real["tokenizer.ggml.scores"])
    if scored:
        assert np.array_equal(mine, recorded)
    merged = np.array(
        [len(text) > 1 and kind == 1 for text, kind in zip(ours["tokens"], ours["token_type"], strict=True)]
    )
    ours_first, theirs_first = (np.argsort(-scores[merged], kind="stable") for scores in (mine, recorded))
    assert np.array_equal(ours_first, theirs_first)
    assert (ours["add_bos_token"], ours["add_eos_token"], ours["add_space_prefix"]) == (True, False, True)
    assert written.notes == ()


@needs_data
def test_a_file_read_and_written_is_the_same():
    real = read_header(SHARED / "weights/stories260k/stories260Ktok512.gguf").metadata
    tokenizer = Tokenizer(**from_metadata(real, where="stories")._asdict())
    scores = dict(zip(real["tokenizer.ggml.tokens"], real["tokenizer.ggml.scores"], strict=True))
    ours = plain(to_metadata(tokenizer, vocab_size=512, scores=scores))
    for key in ("model", "tokens", "token_type", "scores", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert ours[key] == real[f"tokenizer.ggml.{key}"], key
    assert "padding_token_id" not in ours


@needs_data
@pytest.mark.parametrize("name", ["ref-7m-hf", "tinystories-656k-hf"])
def test_trained_models_give_the_same_ids(name):
    tokenizer = load_tokenizer(SHARED / "weights" / name)
    written = to_metadata(tokenizer, vocab_size=len(tokenizer))
    text = (SHARED / "longtext/wikitext2/valid.txt").read_text()[:20_000]
    assert again(written).encode(text) == tokenizer.encode(text)
    assert again(written).add_bos == tokenizer.add_bos


@pytest.mark.slow
@needs_data
def test_llama_3_is_written_and_read():
    tokenizer = load_tokenizer(SHARED / "tokenizers/llama3/tokenizer.model")
    written = to_metadata(tokenizer, vocab_size=128256, ends=(128001, 128009))
    ours = plain(written)
    assert (ours["pre"], ours["model"], ours["eot_token_id"]) == ("llama-bpe", "gpt2", 128009)
    assert len(ours["merges"]) == 280_147
    assert all(again(written).encode(text) == tokenizer.encode(text) for text in PROBES)


@pytest.fixture(scope="module")
def small():
    return train_bpe(iter(["some words and 123 numbers, some more words"] * 4), vocab_size=280)


@pytest.mark.parametrize("name", PRE)
def test_every_known_split_is_found_by_its_expression(small, name):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.pre_tokenizer = PRE[name].split
    backend.model.ignore_merges = PRE[name].ignore_merges
    written = to_metadata(Tokenizer(backend, bos="<s>", eos="</s>", unk="<unk>"), vocab_size=280)
    found = PRE[plain(written)["pre"]]
    assert (str(found.split), found.ignore_merges) == (str(PRE[name].split), PRE[name].ignore_merges)
    assert written.notes == ()


def test_an_unknown_split_is_an_error_with_the_expression(small):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    bytes_too = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[aeiou]+"), "isolated"), bytes_too])
    with pytest.raises(LlameroError, match=r"\[aeiou\]\+") as caught:
        to_metadata(Tokenizer(backend, bos=None, eos=None), vocab_size=280)
    assert "llama-bpe" in str(caught.value.fix)


def test_whole_parts_that_readers_take_otherwise_are_said(small):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.pre_tokenizer = PRE["tekken"].split
    written = to_metadata(Tokenizer(backend, bos=None, eos=None), vocab_size=280)
    assert plain(written)["pre"] == "tekken"
    assert ["before any merge" in note for note in written.notes] == [True]


def test_a_normalizer_that_changes_ids_is_refused(small):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.normalizer = normalizers.NFC()
    with pytest.raises(LlameroError, match="cannot hold this tokenizer"):
        to_metadata(Tokenizer(backend, bos=None, eos=None), vocab_size=280)


def test_ids_without_a_token_get_names_that_no_text_has(small):
    ours = plain(to_metadata(small, vocab_size=283))
    assert ours["tokens"][280:] == ["[PAD280]", "[PAD281]", "[PAD282]"]
    assert ours["token_type"][280:] == [5, 5, 5]


def test_a_tokenizer_larger_than_the_model_is_refused(small):
    with pytest.raises(LlameroError, match="280 ids, the model's vocabulary 279"):
        to_metadata(small, vocab_size=279)


def test_ends_beyond_three_are_said(small):
    written = to_metadata(small, vocab_size=280, ends=(2, 5, 6, 7))
    assert (plain(written)["eot_token_id"], plain(written)["eom_token_id"]) == (5, 6)
    assert ["[7]" in note for note in written.notes] == [True]


def test_other_kinds_are_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(LlameroError, match="WordLevel"):
        to_metadata(Tokenizer(backend, bos=None, eos=None), vocab_size=2)
