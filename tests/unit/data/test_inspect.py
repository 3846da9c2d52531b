import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.core import artifact, files
from llamero.core.artifact import Identity
from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Dataset
from llamero.corpus.megatron import Writer
from llamero.data import inspect, stats
from llamero.data.inspect import HEAD, TAIL
from llamero.data.stats import SourceStats
from llamero.text.messages import SCAFFOLD, Role
from llamero.text.render import render
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data/tokenizers"
CHAT = [{"role": "user", "content": "the cat\n"}, {"role": "assistant", "content": "sat on €"}]


def write(directory, split, documents, *, roles=True):
    """Write documents of ids and roles, and return the dataset."""
    directory.mkdir(exist_ok=True)
    with Writer(directory / f"{split}-text", np.uint16) as writer:
        for ids, _ in documents:
            writer.add(ids)
    if roles:
        with Writer(directory / f"{split}-role", np.uint16) as writer:
            for _, spoken in documents:
                writer.add(spoken)
    return Dataset(directory)


def numbered(count):
    """Return documents that differ."""
    return [([number, number + 1], [0, 2]) for number in range(count)]


def sources(**accepted):
    return {"train": {"sources": [{"name": n, "accepted": a, "repeated": 0} for n, a in accepted.items()]}}


def text_of(sample):
    return "".join(piece.text for turn in [*sample.head, *sample.tail] for piece in turn.pieces)


def shown(tokenizer, text):
    ids = tokenizer.encode(text)
    return inspect.show(0, np.asarray(ids), np.full(len(ids), int(Role.TEXT)), tokenizer)


def test_a_chat_is_shown_turn_by_turn_with_what_is_learned(tokenizer):
    said = render(CHAT, "chatml", tokenizer)
    sample = inspect.show(3, np.asarray(said.ids), np.asarray(said.roles), tokenizer)
    user, assistant = sample.head
    assert (user.speaker, assistant.speaker) == ("user", "assistant")
    assert "".join(piece.text for piece in user.pieces if not piece.scaffold) == "the cat↵\n"
    learned = "".join(piece.text for piece in assistant.pieces if piece.learned)
    assert learned == "sat on €<|im_end|>"
    assert user.pieces[0] == inspect.Piece("<|im_start|>", learned=False, scaffold=True, special=True)
    assert (sample.number, sample.tokens, sample.learned) == (3, len(said.ids), sum(said.learned))
    assert (sample.cut, sample.tail) == (0, ())


@given(st.text(max_size=60))
def test_pieces_joined_are_the_text(tokenizer, text):
    assert text_of(shown(tokenizer, text)) == inspect.visible(tokenizer.decode(tokenizer.encode(text)))


def test_bytes_of_one_character_are_one_piece(tokenizer):
    (turn,) = shown(tokenizer, "€🦙é").head
    assert [piece.text for piece in turn.pieces] == ["€", "🦙", "é"]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_published_tokenizers_keep_their_spaces(name):
    if not (SHARED / name).exists():
        pytest.skip(f"no tokenizer at {SHARED / name} (set LLAMERO_SHARED)")
    tokenizer = load_tokenizer(SHARED / name)
    (turn,) = shown(tokenizer, "Hello wide world 🦙").head
    pieces = [piece.text for piece in turn.pieces]
    assert pieces[:3] == ["Hello", " wide", " world"]
    assert "".join(pieces) == "Hello wide world 🦙"


@pytest.mark.parametrize("character", ["a", "🦙"])
@pytest.mark.parametrize("tokens", [HEAD + TAIL, HEAD + TAIL + 1, HEAD + TAIL + 2, 2000])
def test_of_a_long_sample_the_middle_is_left_out_and_counted(tokenizer, character, tokens):
    ids = tokenizer.encode(character) * (tokens // len(tokenizer.encode(character)) + 1)
    ids = np.asarray(ids[:tokens])
    sample = inspect.show(0, ids, np.full(len(ids), int(Role.TEXT)), tokenizer)
    assert sample.tokens == tokens
    head, tail = (sum(len(turn.pieces) for turn in turns) for turns in (sample.head, sample.tail))
    if tokens == HEAD + TAIL:
        assert (sample.cut, sample.tail) == (0, ())
    elif character == "a":
        assert (head, sample.cut, tail) == (HEAD, tokens - HEAD - TAIL, TAIL)
    else:  # a character that the cut goes through is shown whole
        assert TAIL <= tokens - HEAD - sample.cut < TAIL + 4
        assert all(piece.text == "🦙" for turn in sample.tail for piece in turn.pieces[:-1])


def test_what_acts_or_cannot_be_seen_is_spelled_out():
    assert inspect.visible("a\n\tb") == "a↵\n⇥\tb"
    assert inspect.visible("\x1b[31m\u202e\r\u2028") == "\\u{1b}[31m\\u{202e}\\u{d}\\u{2028}"
    assert inspect.visible("👩\u200d💻 <b>") == "👩\u200d💻 <b>"


def test_somebody_elses_roles_and_tokens_without_a_name_are_shown(tokenizer):
    sample = inspect.show(0, np.asarray([5, 6]), np.asarray([9, 9 + SCAFFOLD]), tokenizer)
    (turn,) = sample.head
    assert turn.speaker == "role 9"
    assert len(turn.pieces) == 2


def test_samples_are_drawn_from_each_source_by_the_seed(tmp_path):
    dataset = write(tmp_path, "train", numbered(60))
    summary = sources(a=20, empty=0, b=40)
    drawn = inspect.draw(dataset, "train", summary, seed=1, count=5)
    assert list(drawn) == ["a", "b"]
    assert all(0 <= number < 20 for number in drawn["a"])
    assert all(20 <= number < 60 for number in drawn["b"])
    assert [len(set(numbers)) for numbers in drawn.values()] == [5, 5]
    assert inspect.draw(dataset, "train", summary, seed=1, count=5) == drawn
    assert inspect.draw(dataset, "train", summary, seed=2, count=5) != drawn


def test_copies_of_a_document_are_shown_once(tmp_path):
    dataset = write(tmp_path, "train", numbered(2) * 3)
    assert len(inspect.draw(dataset, "train", sources(a=6), seed=0, count=5)["a"]) == 2


def test_documents_made_of_several_samples_are_drawn_from_the_whole(tmp_path):
    dataset = write(tmp_path, "train", numbered(3))
    assert list(inspect.draw(dataset, "train", sources(a=20, b=40), seed=0, count=5)) == [inspect.ALL]


def test_another_tokenizers_tokens_are_refused(tmp_path, tokenizer):
    dataset = write(tmp_path, "train", [([9999], [2])])
    with pytest.raises(LlameroError, match="token 9999, the tokenizer has") as error:
        inspect.samples(dataset, "train", {"a": [0]}, tokenizer)
    assert error.value.fix


def test_a_dataset_without_roles_is_plain_text(tmp_path, tokenizer):
    dataset = write(tmp_path, "train", [(tokenizer.encode("the cat"), None)], roles=False)
    (sample,) = inspect.samples(dataset, "train", {"a": [0]}, tokenizer)["a"]
    assert [turn.speaker for turn in sample.head] == ["text"]
    assert sample.learned == sample.tokens


@pytest.mark.parametrize(("roles", "supervised"), [(True, 3), (False, 6)])
def test_a_foreign_dataset_is_counted(tmp_path, roles, supervised):
    dataset = write(tmp_path, "train", numbered(3), roles=roles)
    parts, whole = stats.describe(inspect.statistics(dataset), "train")
    assert [part.name for part in parts] == ["train-text"]
    assert (whole.accepted, whole.tokens, whole.supervised_tokens, whole.longest) == (3, 6, supervised, 2)


def test_what_becomes_of_documents_at_a_length_is_told(tmp_path):
    dataset = write(tmp_path, "train", [([1] * tokens, [2] * tokens) for tokens in (9, 5, 4, 1)])
    assert inspect.at_length(dataset, "train", 4) == (1, 4, 3, (4 + 4 + 3) / 12)
    assert inspect.at_length(dataset, "train", 8) == (0, 0, 2, (8 + 4 + 3) / 16)
    empty = write(tmp_path / "empty", "train", [])
    assert inspect.at_length(empty, "train", 4) == (0, 0, 0, 0.0)


def test_statistics_are_what_their_making_wrote(tmp_path):
    dataset = write(tmp_path, "train", numbered(3))
    part = SourceStats("facts")
    summary = {"mixture": "m", "train": {"sources": [part.to_json()], "total": part.to_json()}}
    files.write_json(tmp_path / "stats.json", summary)
    assert inspect.statistics(dataset) == json.loads(json.dumps(summary))


def test_statistics_of_another_version_are_named():
    with pytest.raises(LlameroError, match="do not say 'left_out'"):
        stats.describe({"train": {"sources": [], "total": {"name": "total"}}}, "train")


def test_the_tokenizer_of_an_artifact_is_found_beside_it(tmp_path, tokenizer_files):
    made = Identity("tokenizer", "tokenizer", {}, {})
    data = Identity("data", "data-m", {}, {"tokenizer": made.digest})
    with artifact.build(tmp_path, data) as build:
        write(build.path, "train", numbered(1))
        build.summary = {"mixture": "m"}
    dataset = Dataset(data.path(tmp_path))
    assert inspect.statistics(dataset) == {"mixture": "m"}
    with pytest.raises(LlameroError, match="is gone"):
        inspect.find_tokenizer(dataset)
    load_tokenizer(tokenizer_files).save(made.path(tmp_path))
    found = inspect.find_tokenizer(dataset)
    assert found is not None
    assert found.digest == load_tokenizer(tokenizer_files).digest
    assert inspect.find_tokenizer(write(tmp_path / "foreign", "train", numbered(1))) is None
