"""Near-duplicates are those that comparing every pair finds, within what a signature can tell."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.corpus import overlap
from llamero.corpus.samples import Chat, Document
from llamero.data import duplicates
from llamero.data.duplicates import find, report, rows_of_a_band, signature, similarity, texts_of
from llamero.text.messages import Message


def passages(text):
    words = overlap.split(text)
    return {tuple(words[at : at + 5]) for at in range(max(len(words) - 4, 1))}


def jaccard(one, other):
    return len(passages(one) & passages(other)) / len(passages(one) | passages(other))


def sentence(chance, words):
    return [f"w{chance.randrange(5000)}" for _ in range(words)]


def changed(chance, words, times):
    """Return the words with so many of them exchanged."""
    out = list(words)
    for at in chance.sample(range(len(out)), times):
        out[at] = f"new{chance.randrange(10**9)}"
    return out


@pytest.fixture(scope="module")
def pairs():
    """Return texts and their changed copies, with exact similarities from 0.2 to 1."""
    chance = random.Random(5)
    texts = [sentence(chance, chance.randrange(60, 400)) for _ in range(600)]
    copies = [changed(chance, words, chance.randrange(len(words) // 6)) for words in texts]
    return [" ".join(words) for words in texts], [" ".join(words) for words in copies]


def test_signatures_agree_in_as_many_places_as_texts_share_passages(pairs):
    texts, copies = pairs
    exact = np.array([jaccard(*pair) for pair in zip(texts, copies, strict=True)])
    places = np.arange(len(texts))
    estimate = similarity(np.vstack([signature(texts), signature(copies)]), places, places + len(texts))
    assert exact.min() < 0.4
    assert abs(np.mean(estimate - exact)) < 0.005  # no bias
    assert np.std(estimate - exact) < 0.045
    assert np.all(estimate[exact == 1] == 1)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_copies_above_the_threshold_are_found_and_those_below_are_not(pairs, threshold):
    texts, copies = pairs
    exact = np.array([jaccard(*pair) for pair in zip(texts, copies, strict=True)])
    found = find(np.vstack([signature(texts), signature(copies)]), threshold=threshold)
    assert np.all(found[: len(texts)] == -1)
    found = found[len(texts) :]
    assert np.all((found == np.arange(len(texts))) | (found == -1))
    above, below = exact >= threshold + 0.1, exact < threshold - 0.1
    assert above.sum() > 30
    assert below.sum() > 30
    assert np.mean(found[above] >= 0) >= 0.99
    assert np.mean(found[below] >= 0) <= 0.01


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_bring_pairs_at_the_threshold_together(threshold):
    rows = rows_of_a_band(threshold)
    assert (1 - threshold**rows) ** (duplicates.PLACES // rows) <= 0.01


def test_a_band_is_all_places_where_only_equals_count():
    assert rows_of_a_band(1.0) == duplicates.PLACES
    assert rows_of_a_band(0.01) == 1


# -- equal texts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab ?é漢", max_size=12), max_size=12), st.sampled_from([0.05, 0.8, 1.0]))
def test_texts_equal_word_for_word_are_always_found(texts, threshold):
    found = find(signature(texts), threshold=threshold)
    for number, text in enumerate(texts):
        same = [other for other in texts[:number] if overlap.split(other) == overlap.split(text)]
        if any(overlap.split(text) or other.strip() == text.strip() for other in same):
            assert found[number] >= 0


def test_texts_without_words_are_told_by_their_characters():
    assert find(signature(["???", "!!", " ???\n", ""]), threshold=0.8).tolist() == [-1, -1, 0, -1]


def test_short_texts_are_one_passage():
    texts = ["Yes, I do.", "yes i do", "do I yes", "Yes, I do!", "yes i do so"]
    assert find(signature(texts), threshold=0.8).tolist() == [-1, 0, -1, 0, -1]


def test_nothing_is_a_duplicate_of_nothing():
    assert signature([]).shape == (0, duplicates.PLACES)
    assert find(signature([]), threshold=0.8).tolist() == []


# -- which one stays ---------------------------------------------------------------------------------------------------


def by_every_pair(signatures, threshold):
    """Return which samples stay, comparing each with all earlier ones that stay and that it shares a band with."""
    rows = rows_of_a_band(threshold)
    stays: list[int] = []
    for number, its in enumerate(signatures):
        for earlier in stays:
            equal = its == signatures[earlier]
            meet = any(equal[start : start + rows].all() for start in range(0, duplicates.PLACES - rows + 1, rows))
            if meet and equal.mean() >= threshold:
                break
        else:
            stays.append(number)
    return stays


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.4, 0.6, 0.8]))
def test_what_stays_is_what_comparing_every_pair_leaves(seed, threshold):
    chance = np.random.default_rng(seed)
    rows = [chance.integers(0, 1 << 32, duplicates.PLACES, np.uint32)]
    for _ in range(40):  # chains: each is a change of an earlier one
        row = rows[chance.integers(len(rows))].copy()
        row[chance.random(duplicates.PLACES) < chance.choice([0, 0.15, 0.3, 0.6])] = chance.integers(1 << 32)
        rows.append(row)
    signatures = np.array([rows[at] for at in chance.permutation(len(rows))])
    found = find(signatures, threshold=threshold)
    out = np.flatnonzero(found >= 0)
    assert np.flatnonzero(found < 0).tolist() == by_every_pair(signatures, threshold)
    assert np.all(found[out] < out)
    assert np.all(found[found[out]] == -1)
    assert np.all(similarity(signatures, out, found[out]) >= threshold)


def test_resembling_is_not_handed_on():
    words = [f"w{number}" for number in range(120)]
    chain = [" ".join(words[start : start + 100]) for start in (0, 8, 16)]
    assert find(signature(chain), threshold=0.8).tolist() == [-1, 0, -1]


# -- anywhere, in any portions -----------------------------------------------------------------------------------------


def test_signatures_do_not_depend_on_the_portions(pairs, monkeypatch):
    texts = [*pairs[0][:50], "", "short", *pairs[1][:50]]
    whole = signature(texts)
    assert np.array_equal(np.vstack([signature(texts[:7]), signature(texts[7:])]), whole)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 100)
    assert np.array_equal(signature(texts), whole)


def test_signatures_are_the_same_in_every_process():
    code = "from llamero.data.duplicates import signature; print(signature(['one two three four five six'])[0, :3])"
    ran = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert ran[0] == ran[1] == f"{signature(['one two three four five six'])[0, :3]}\n".encode()


def test_signatures_may_lie_on_disk(pairs, tmp_path, monkeypatch):
    signatures = signature([*pairs[0], *pairs[1]])
    np.save(tmp_path / "signatures.npy", signatures)
    mapped = np.load(tmp_path / "signatures.npy", mmap_mode="r")
    expected = find(signatures, threshold=0.8)
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    assert np.array_equal(find(mapped, threshold=0.8), expected)


# -- what is compared and reported -------------------------------------------------------------------------------------


def test_a_system_message_that_many_samples_share_is_not_compared():
    chat = Chat((Message("system", "You are kind."), Message("user", "a"), Message("assistant", "b")))
    assert texts_of(chat) == "a\nb"
    assert texts_of(Document("c")) == "c"


def test_a_report_counts_within_and_across_sources():
    places = ["a:1", "a:2", "b:1", "b:2", *(f"b:{number}" for number in range(3, 12))]
    signatures = signature(["one", "One!", "one", "two", *["two"] * 9])
    found = find(signatures, threshold=0.8)
    said = report(
        signatures,
        found,
        source=lambda number: places[number].split(":")[0],
        where=lambda number: places[number],
        threshold=0.8,
        dropped=True,
    )
    assert (said.samples, said.within, said.across) == (13, 10, 1)
    said = said.to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["pairs"] == [
        {"source": "a", "same_as": "a", "samples": 1},
        {"source": "b", "same_as": "a", "samples": 1},
        {"source": "b", "same_as": "b", "samples": 9},
    ]
    assert said["examples"][0] == {"sample": "a:2", "same_as": "a:1", "similarity": 1.0}
    assert len(said["examples"]) == 2 + 5
