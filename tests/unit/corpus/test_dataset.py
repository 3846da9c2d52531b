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
