"""llama.cpp's importance matrices, against files written by hand and by the `gguf` library."""

import struct

import numpy as np
import pytest
import torch

from llamero.checkpoint.imatrix import Imatrix, read_imatrix, write_imatrix
from llamero.core.errors import LlameroError

gguf = pytest.importorskip("gguf")

MEANS = {"blk.0.attn_q.weight": torch.tensor([0.5, 2.0, 0.0]), "output.weight": torch.tensor([1.0, 4.0])}


def same(found, means=MEANS):
    assert found.mean_square.keys() == means.keys()
    for name, values in means.items():
        torch.testing.assert_close(found.mean_square[name], values)


def legacy(entries, *, calls=3, tail=b""):
    """As tools/imatrix wrote until 2025: sums over calls of the mean square of a call."""
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += (np.array([float(value) for value in values], dtype=np.float32) * np.float32(calls)).tobytes()
    return data + tail


def test_the_old_form_is_read(tmp_path):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy(MEANS, tail=struct.pack("<ii", 7, 4) + b"wiki"))
    found = read_imatrix(path)
    same(found)
    assert (found.chunks, found.datasets) == (7, ("wiki",))
    path.write_bytes(legacy(MEANS))
    same(read_imatrix(path))


def test_the_new_form_is_read(tmp_path):
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in MEANS.items():
        writer.add_tensor(f"{name}.in_sum2", values.numpy()[None] * np.float32(40))
        writer.add_tensor(f"{name}.counts", np.array([[40]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(path)
    same(found)
    assert (found.chunks, found.chunk_tokens, found.datasets) == (5, 512, ("a.txt", "b.txt"))


@pytest.mark.parametrize("name", ["imatrix.dat", "imatrix.gguf"])
def test_what_is_written_is_read(tmp_path, name):
    path = tmp_path / name
    write_imatrix(path, Imatrix(MEANS, 11, 128, ("text",)))
    found = read_imatrix(path)
    same(found)
    assert (found.chunks, found.datasets) == (11, ("text",))
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_form_is_written_as_it_was(tmp_path):
    write_imatrix(tmp_path / "imatrix.dat", Imatrix(MEANS, 3, 0))
    assert (tmp_path / "imatrix.dat").read_bytes() == legacy(MEANS, tail=struct.pack("<ii", 3, 0))


def test_the_new_form_is_written_for_the_library(tmp_path):
    write_imatrix(tmp_path / "imatrix.gguf", Imatrix(MEANS, 3, 8))
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, values in MEANS.items():
        assert np.allclose(tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"], values.numpy())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a whole"),
        (struct.pack("<i", 0), "0 entries"),
        (legacy(MEANS)[:-3], "not a whole"),
        (struct.pack("<ii", 1, 2**30), "not a whole"),
        (struct.pack("<ii", 1, -5), "not a whole"),
        (legacy({"a": [1.0, float("nan")]}), "not finite"),
        (legacy({"a": [1.0, -2.0]}), "negative"),
    ],
)
def test_damaged_files_are_named(tmp_path, data, said):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(LlameroError, match=said) as caught:
        read_imatrix(path)
    assert "imatrix.dat" in str(caught.value)


def test_a_model_is_no_importance_matrix(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LlameroError, match="of the type `model`"):
        read_imatrix(path)
    with pytest.raises(LlameroError, match="missing"):
        read_imatrix(tmp_path / "none.dat")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.in_sum2": [[1, 1]]}, "no counts"),
        ({"a.in_sum2": [[1, 1], [1, 1]], "a.counts": [[1], [1]]}, "2 experts"),
        ({"a.in_sum2": [[1, 1]], "a.counts": [[0]]}, "never seen"),
        ({"a": [[1, 1]]}, "no importances"),
    ],
)
def test_sums_without_sense_are_named(tmp_path, tensors, said):
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LlameroError, match=said):
        read_imatrix(path)
