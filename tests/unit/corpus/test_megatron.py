import struct
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus import megatron

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}
"""Megatron's number of a dtype by its `struct` letter."""
DTYPES = {"B": np.uint8, "b": np.int8, "h": np.int16, "i": np.int32, "q": np.int64, "H": np.uint16}


def by_hand(documents, letter):
    """What Megatron-Core writes for a corpus whose documents are one sequence each, byte by byte."""
    size = struct.calcsize("<" + letter)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[letter])
    idx += struct.pack("<QQ", len(documents), len(documents) + 1)
    idx += b"".join(struct.pack("<i", len(document)) for document in documents)
    offset = 0
    for document in documents:
        idx += struct.pack("<q", offset)
        offset += size * len(document)
    idx += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    return idx, b"".join(struct.pack("<" + letter, token) for document in documents for token in document)


def write(stem, documents, dtype=np.uint16):
    with megatron.Writer(stem, dtype) as writer:
        for document in documents:
            writer.add(document)
    return stem


@pytest.mark.parametrize("letter", CODES)
@pytest.mark.parametrize("documents", [[], [[]], [[1, 2, 3], [], [4], [5, 100]]], ids=["none", "empty", "four"])
def test_the_files_are_megatrons_byte_for_byte(tmp_path, letter, documents):
    stem = write(tmp_path / "text", documents, DTYPES[letter])
    assert ((tmp_path / "text.idx").read_bytes(), (tmp_path / "text.bin").read_bytes()) == by_hand(documents, letter)
    assert [document.tolist() for document in megatron.Reader(stem)] == documents


@settings(max_examples=25)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20))
def test_what_another_writer_wrote_is_read(tmp_path_factory, documents):
    stem = tmp_path_factory.mktemp("hand") / "text"
    idx, data = by_hand(documents, "H")
    stem.with_suffix(".idx").write_bytes(idx)
    stem.with_suffix(".bin").write_bytes(data)
    reader = megatron.Reader(stem)
    assert len(reader) == len(documents)
    assert [document.tolist() for document in reader] == documents


def test_the_2023_writers_single_boundary_is_read_too(tmp_path):
    idx, data = by_hand([[1, 2], [3]], "H")
    idx = idx[:18] + struct.pack("<QQ", 2, 1) + idx[34:58] + struct.pack("<q", 0)
    (tmp_path / "old.idx").write_bytes(idx)
    (tmp_path / "old.bin").write_bytes(data)
    assert [document.tolist() for document in megatron.Reader(tmp_path / "old")] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("size", "dtype"), [(32007, np.uint16), (65499, np.uint16), (65500, np.int32), (128256, np.int32)]
)
def test_the_dtype_follows_megatrons_rule(size, dtype):
    assert megatron.token_dtype(size) is dtype


@pytest.mark.parametrize("values", [[65536], [-1, 3]])
def test_a_number_that_does_not_fit_is_refused(tmp_path, values):
    with pytest.raises(ValueError, match="does not fit"), megatron.Writer(tmp_path / "text", np.uint16) as writer:
        writer.add(values)


def test_a_failed_writing_leaves_no_index(tmp_path):
    def fail():
        with megatron.Writer(tmp_path / "text", np.uint16) as writer:
            writer.add([1, 2])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(LlameroError, match="missing"):
        megatron.Reader(tmp_path / "text")


def test_a_dot_in_the_name_is_part_of_it(tmp_path):
    write(tmp_path / "llama3.1-train-text", [[1]])
    write(tmp_path / "llama3.1-train-role", [[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"llama3.1-train-{what}.{kind}" for what in ("role", "text") for kind in ("bin", "idx")
    ]
    assert megatron.Reader(tmp_path / "llama3.1-train-role")[0].tolist() == [2]


def test_documents_are_views_of_the_file_on_disk(tmp_path):
    document = megatron.Reader(write(tmp_path / "text", [[1, 2, 3]]))[0]
    assert isinstance(document, np.memmap)
    assert not document.flags.writeable


def patched(raw, at, value):
    return raw[:at] + value + raw[at + len(value) :]


@pytest.mark.parametrize(
    ("suffix", "damage", "says"),
    [
        (".idx", lambda raw: raw[:20], "wrong first bytes"),
        (".idx", lambda raw: b"", "wrong first bytes"),
        (".idx", lambda raw: b"X" + raw[1:], "wrong first bytes"),
        (".idx", lambda raw: patched(raw, 9, struct.pack("<Q", 2)), "version 2"),
        (".idx", lambda raw: patched(raw, 17, b"\x07"), "dtype 7"),
        (".idx", lambda raw: raw[:-1], "broken Megatron index"),
        (".idx", lambda raw: patched(raw, 18, struct.pack("<Q", 1 << 60)), "broken Megatron index"),
        (".idx", lambda raw: patched(raw, 34, struct.pack("<i", 4)), "promises 12 bytes, the file has 10"),
        (".idx", lambda raw: patched(raw, 34, struct.pack("<ii", 6, -1)), "outside the data"),
        (".idx", lambda raw: patched(raw, 42, struct.pack("<q", 8)), "outside the data"),
        (".bin", lambda raw: raw[:-1], "promises 10 bytes, the file has 9"),
        (".bin", lambda raw: raw + b"\0\0", "promises 10 bytes, the file has 12"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, suffix, damage, says):
    stem = write(tmp_path / "text", [[1, 2, 3], [4, 5]])
    path = stem.with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LlameroError, match=says) as told:
        megatron.Reader(stem)
    assert told.value.where is not None
    assert told.value.where.startswith(str(stem))


@settings(max_examples=25)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=12),
    at=st.integers(0, 12),
    lost=st.booleans(),
)
def test_a_writer_goes_on_where_another_was_cut_off(tmp_path_factory, documents, at, lost):
    whole = write(tmp_path_factory.mktemp("whole") / "text", documents)
    stem = tmp_path_factory.mktemp("cut") / "text"
    first = megatron.Writer(stem, np.uint16)
    for document in documents[:at]:
        first.add(document)
    position = first.checkpoint()
    for document in documents[at:] if lost else []:
        first.add(document)
    first.__exit__(KeyboardInterrupt, None, None)  # cut off
    with megatron.Writer(stem, np.uint16, start=position) as second:
        rest = documents[at:]
        second.add_many(np.asarray([*chain(*rest)], dtype=np.int64), [len(document) for document in rest])
    for suffix in (".bin", ".idx"):
        assert stem.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert not stem.with_suffix(".lengths").exists()


def test_going_on_from_files_that_are_gone_is_refused(tmp_path):
    with pytest.raises(LlameroError, match="8 bytes of it were written before"):
        megatron.Writer(tmp_path / "text", np.uint16, start=megatron.Position(2, 4))


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="3 tokens, the lengths add up to 2"),
        megatron.Writer(tmp_path / "text", np.uint16) as writer,
    ):
        writer.add_many(np.arange(3), [1, 1])


def test_indices_longer_than_a_block_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_BLOCK", 2)
    documents = [[1, 2], [], [3], [4, 5, 6], [7]]
    stem = write(tmp_path / "text", documents)
    assert (stem.with_suffix(".idx").read_bytes(), stem.with_suffix(".bin").read_bytes()) == by_hand(documents, "H")
