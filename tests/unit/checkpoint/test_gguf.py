"""GGUF files against the `gguf` library that llama.cpp's own project keeps: it reads ours, we read its."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.checkpoint.gguf import ALIGNMENT, TYPES, TensorSpec, Value, open_gguf
from llamero.checkpoint.gguf_write import GgufWriter, header, sizes
from llamero.core.errors import LlameroError

gguf = pytest.importorskip("gguf")

REAL = Path("/work/shared/data/weights")

VALUES = {
    "general.architecture": Value("string", "llama"),
    "some.float": Value("float32", 0.5),
    "some.truth": Value("bool", True),
    "some.small": Value("int8", -3),
    "some.large": Value("uint64", 2**63 + 1),
    "some.texts": Value("string", ["a", "", "ä日", "x" * 300]),
    "some.numbers": Value("int32", [1, -2, 3]),
    "some.halves": Value("float32", [0.5, -1.25]),
    "some.nothing": Value("string", []),
}


def tensors(seed=0):
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)

    return {
        "a.weight": (TensorSpec((5, 7), TYPES["F32"]), torch.randn(5, 7, generator=random)),
        "b.weight": (TensorSpec((3,), TYPES["F32"]), torch.randn(3, generator=random)),
        "c.weight": (TensorSpec((2, 9), TYPES["F16"]), torch.randn(2, 9, generator=random).half()),
        "d.weight": (TensorSpec((4, 64), TYPES["BF16"]), torch.randn(4, 64, generator=random).bfloat16()),
        "e.weight": (TensorSpec((3, 512), TYPES["Q4_K"]), numbers(3, 288)),
        "f.weight": (TensorSpec((2, 3, 32), TYPES["Q8_0"]), numbers(2, 3, 34)),
        "g.weight": (TensorSpec((1, 256), TYPES["Q6_K"]), numbers(1, 210)),
    }


def write(directory, content, *, values=VALUES, shard_bytes=None, stem="model"):
    specs = {name: spec for name, (spec, _) in content.items()}
    with GgufWriter(directory, stem, values, specs, shard_bytes=shard_bytes) as writer:
        for name, (_, tensor) in reversed(content.items()):
            writer.add(name, tensor)
    return writer.paths


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_types_are_those_of_the_library():
    theirs = {kind.name: (kind.value, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {kind.name: (kind.number, kind.block, kind.size) for kind in TYPES.values()}
    assert {name: ours[name] for name in theirs if name in ours} == {n: theirs[n] for n in theirs if n in ours}
    assert not ours.keys() - theirs.keys() - {"MXFP4", "NVFP4", "Q1_0"}, "younger than the oldest library"


def test_what_is_written_is_read_and_the_library_reads_it_too(tmp_path):
    content = tensors()
    (path,) = write(tmp_path, content)
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(tmp_path.iterdir()) == [path]
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert dict(ours.values) == VALUES
    for key, value in VALUES.items():
        assert theirs.fields[key].contents() == value.value
    assert [tensor.name for tensor in theirs.tensors] == list(content) == list(ours)
    for tensor in theirs.tensors:
        spec, data = content[tensor.name]
        assert torch.equal(ours[tensor.name], data)
        assert ours.specs[tensor.name] == spec
        assert tensor.tensor_type.name == spec.type.name
        assert tuple(tensor.shape) == spec.shape[::-1]
        assert tensor.data.tobytes() == as_bytes(data)


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.b", 7)
    writer.add_array("a.texts", ["x", "y"])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_bool("a.truth", False)
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("plain", plain)
    coded = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("coded", coded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_gguf(path)
    assert ours.metadata == {
        "general.architecture": "llama", "a.b": 7, "a.texts": ["x", "y"], "a.floats": [0.5, 1.5], "a.truth": False,
    }  # fmt: skip
    assert ours["plain"].tolist() == plain.tolist()
    assert ours["coded"].tolist() == coded.tolist()
    assert ours.specs["coded"] == TensorSpec((2, 32), TYPES["Q8_0"])


def test_a_large_model_is_split_and_read_from_any_part(tmp_path):
    content = tensors()
    paths = write(tmp_path, content, shard_bytes=700)
    assert [path.name for path in paths] == [f"model-{i:05}-of-{len(paths):05}.gguf" for i in range(1, len(paths) + 1)]
    assert len(paths) > 2
    specs = {name: spec for name, (spec, _) in content.items()}
    assert sizes(VALUES, specs, 700) == [path.stat().st_size for path in paths]
    for path in paths:
        ours = open_gguf(path)
        assert ours.paths == tuple(paths)
        assert ours.metadata["some.texts"] == VALUES["some.texts"].value
        assert all(torch.equal(ours[name], data) for name, (_, data) in content.items())
    counted = [gguf.GGUFReader(path).fields["split.tensors.count"].contents() for path in paths]
    assert counted == [len(content)] * len(paths)


def test_the_library_splits_as_we_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama", split_max_tensors=2)
    content = {f"t{i}": np.full((2, 4), i, dtype=np.float32) for i in range(5)}
    for name, data in content.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_gguf(next(iter(sorted(tmp_path.glob("*-00002-of-*.gguf")))))
    assert {name: ours[name].tolist() for name in ours} == {name: data.tolist() for name, data in content.items()}


def test_sizes_are_known_before_writing(tmp_path):
    content = tensors()
    (path,) = write(tmp_path, content)
    assert sizes(VALUES, {name: spec for name, (spec, _) in content.items()}) == [path.stat().st_size]


def test_a_missing_part_is_named(tmp_path):
    paths = write(tmp_path, tensors(), shard_bytes=700)
    paths[1].unlink()
    with pytest.raises(LlameroError, match=paths[1].name):
        open_gguf(paths[0])


def test_parts_of_another_model_are_refused(tmp_path):
    paths = write(tmp_path, tensors(), shard_bytes=700)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(LlameroError, match=r"split\.no"):
        open_gguf(paths[0])


def test_a_part_renamed_to_be_the_whole_is_refused(tmp_path):
    path = write(tmp_path, tensors(), shard_bytes=700)[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(LlameroError, match=r"split\.count"):
        open_gguf(path)


def damaged(tmp_path, data):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GG", "not a GGUF file"),
        (b"ggjt" + bytes(60), "begins with b'ggjt'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(60), "version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(60), "type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(60), "type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 36, 0) + bytes(60), "is of type 36"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 8, 0) + bytes(60), "do not divide"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 9, 33, 8, 0) + bytes(60), "9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2, 0, 3) + bytes(60), "no multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2, 0, 2**40) + bytes(60), "would end at byte"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, data, said):
    with pytest.raises(LlameroError, match=said) as caught:
        open_gguf(damaged(tmp_path, data))
    assert "damaged.gguf" in str(caught.value)


def test_version_2_is_read(tmp_path):
    (path,) = write(tmp_path, tensors())
    data = path.read_bytes()
    older = open_gguf(damaged(tmp_path, data[:4] + struct.pack("<I", 2) + data[8:]))
    assert dict(older.values) == VALUES


@settings(max_examples=40)
@given(cut=st.floats(0, 1))
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path, cut):
    content = tensors()
    specs = {name: spec for name, (spec, _) in content.items()}
    data = header(VALUES, specs) + bytes(sum(-(-spec.nbytes // 32) * 32 for spec in specs.values()))
    # the padding of the last tensor may be missing
    end = int(cut * (len(data) - ALIGNMENT))
    with pytest.raises(LlameroError):
        open_gguf(damaged(tmp_path, data[:end]))


def test_a_key_or_tensor_twice_is_refused(tmp_path):
    key = struct.pack("<Q1sIi", 1, b"k", 5, 1)
    with pytest.raises(LlameroError, match="key `k` stands there twice"):
        open_gguf(damaged(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key + key))
    record = struct.pack("<Q1sIQIQ", 1, b"t", 1, 2, 0, 0)
    with pytest.raises(LlameroError, match="tensor `t` stands there twice"):
        open_gguf(damaged(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + record + record + bytes(90)))


def test_alignment_of_the_metadata_holds(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for name in "ab":
        writer.add_tensor(name, np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_gguf(path)["b"].tolist() == [0, 1, 2]
    odd = path.read_bytes().replace(struct.pack("<II", 4, 128), struct.pack("<II", 4, 100))
    with pytest.raises(LlameroError, match=r"general\.alignment"):
        open_gguf(damaged(tmp_path, odd))


def test_an_unfinished_file_leaves_nothing(tmp_path):
    content = tensors()
    specs = {name: spec for name, (spec, _) in content.items()}
    with pytest.raises(ValueError, match=r"a\.weight"), GgufWriter(tmp_path, "model", VALUES, specs) as writer:
        writer.add("b.weight", content["b.weight"][1])
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_not_announced_so_is_refused(tmp_path):
    with GgufWriter(tmp_path, "model", {}, {"a": TensorSpec((2, 32), TYPES["Q8_0"])}) as writer:
        with pytest.raises(ValueError, match="not announced"):
            writer.add("b", torch.zeros(2, 34, dtype=torch.uint8))
        with pytest.raises(ValueError, match="announced a"):
            writer.add("a", torch.zeros(2, 32, dtype=torch.uint8))
        writer.add("a", torch.zeros(2, 34, dtype=torch.uint8))
        with pytest.raises(ValueError, match="came before"):
            writer.add("a", torch.zeros(2, 34, dtype=torch.uint8))


@pytest.mark.skipif(not REAL.exists(), reason=f"no real files in {REAL}")
@pytest.mark.parametrize("name", ["stories260k/stories260Ktok512.gguf", "random-fixtures/llama-2-tiny-random.gguf"])
def test_real_files_are_read_as_the_library_reads_them(name):
    ours, theirs = open_gguf(REAL / name), gguf.GGUFReader(REAL / name)
    kept = {key: each for key, each in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == {key: each.contents() for key, each in kept.items()}
    for tensor in theirs.tensors:
        assert as_bytes(ours[tensor.name]) == tensor.data.tobytes()
        assert ours.specs[tensor.name].shape == tuple(tensor.shape[::-1])
