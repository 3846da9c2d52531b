import json

import numpy as np
import pytest

from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Dataset
from llamero.corpus.megatron import Writer


def write(directory, stem, *documents):
    with Writer(directory / stem, np.uint16) as writer:
        for document in documents:
            writer.add(document)


@pytest.mark.parametrize("prefix", ["", "oasst_top1-", "llama3.1-chat-"])
def test_a_dataset_is_found_under_any_prefix(tmp_path, prefix):
    write(tmp_path, f"{prefix}train-text", [1, 2, 3], [4])
    write(tmp_path, f"{prefix}train-role", [0, 1, 2], [2])
    write(tmp_path, f"{prefix}val-text", [5])
    write(tmp_path, f"{prefix}val-role", [1])
    dataset = Dataset(tmp_path)
    assert dataset.splits == ("train", "val")
    assert [document.tolist() for document in dataset.tokens("train")] == [[1, 2, 3], [4]]
    roles = dataset.roles("train")
    assert roles is not None
    assert [document.tolist() for document in roles] == [[0, 1, 2], [2]]
    assert dataset.stem("val", "role") == tmp_path / f"{prefix}val-role"


@pytest.mark.parametrize("name", ["train-text", "x-train-text", "wiki_text_document"])
def test_a_foreign_pair_without_roles_opens_as_training_data(tmp_path, name):
    write(tmp_path, name, [1, 2])
    dataset = Dataset(tmp_path)
    assert dataset.splits == ("train",)
    assert len(dataset.tokens("train")) == 1
    assert dataset.roles("train") is None


def test_a_split_that_is_not_there_is_named(tmp_path):
    write(tmp_path, "train-text", [1])
    with pytest.raises(LlameroError, match="no split `val`") as error:
        Dataset(tmp_path).tokens("val")
    assert error.value.fix == "this dataset has: train"


@pytest.mark.parametrize("stems", [("a-train-text", "b-val-text"), ("wiki", "books"), ("train-text", "a-train-text")])
def test_two_datasets_in_one_directory_are_refused(tmp_path, stems):
    for stem in stems:
        write(tmp_path, stem, [1])
    with pytest.raises(LlameroError, match="several datasets") as error:
        Dataset(tmp_path)
    assert all(stem in error.value.problem for stem in stems)


@pytest.mark.parametrize("stems", [(), ("train-role",)])
def test_a_directory_without_tokens_is_refused(tmp_path, stems):
    for stem in stems:
        write(tmp_path, stem, [1])
    with pytest.raises(LlameroError, match="no tokenized dataset"):
        Dataset(tmp_path)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LlameroError, match="no such directory"):
        Dataset(tmp_path / "none")


@pytest.mark.parametrize("roles", [([0, 1],), ([0], [1, 1]), ([0, 1], [1], [2])])
def test_roles_of_other_documents_are_refused(tmp_path, roles):
    write(tmp_path, "train-text", [1, 2], [3])
    write(tmp_path, "train-role", *roles)
    with pytest.raises(LlameroError, match="not of one dataset"):
        Dataset(tmp_path).roles("train")


def counted(directory, **splits):
    said = {
        split: {"sources": [{"name": name, "accepted": a, "repeated": r} for name, a, r in parts]}
        for split, parts in splits.items()
    }
    (directory / "stats.json").write_text(json.dumps(said))


def test_documents_stand_one_source_after_the_other(tmp_path):
    write(tmp_path, "train-text", [1], [2], [3], [4], [5])
    write(tmp_path, "val-text", [1])
    parts = [("chat", 1, 1), ("empty", 0, 0), ("books", 2, 0), ("chat", 1, 0)]
    counted(tmp_path, train=parts, val=[("chat", 0, 0), ("books", 1, 0)])
    sources = Dataset(tmp_path).sources("train")
    assert sources is not None
    assert sources.names == ("chat", "empty", "books", "chat 2")
    assert sources.of(np.array([4, 0, 1, 2, 3])).tolist() == [3, 0, 0, 2, 2]
    held = Dataset(tmp_path).sources("val")
    assert held is not None
    assert held.of(np.array([0])).tolist() == [1]


def test_a_dataset_without_statistics_has_no_known_sources(tmp_path):
    write(tmp_path, "train-text", [1])
    assert Dataset(tmp_path).sources("train") is None


def test_statistics_of_another_dataset_are_refused(tmp_path):
    write(tmp_path, "train-text", [1], [2])
    counted(tmp_path, train=[("chat", 3, 0)])
    with pytest.raises(LlameroError, match=r"2 documents, stats\.json counts 3"):
        Dataset(tmp_path).sources("train")
