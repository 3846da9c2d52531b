import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus import rows
from llamero.corpus.rows import Raw

GOOD = {"text": "é\u2028x"}


def found(path):
    return [(row.where.removeprefix(str(path)), row.row, row.problem) for row in rows.rows(path)]


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def tarred(members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
                continue
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", json.dumps(GOOD).encode() + b"\n\n" + json.dumps(GOOD, ensure_ascii=False).encode() + b"\r\n"),
        ("a.ndjson", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n \n" + json.dumps(GOOD).encode()),
        ("a.json", b"\n" + json.dumps([GOOD, GOOD], indent=0).encode()),
        ("a.json", b"\xef\xbb\xbf [" + json.dumps(GOOD).encode() + b"\n\n,\n" + json.dumps(GOOD).encode() + b" ]\n"),
        ("a.json", b"\n" + json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()),
    ],
    ids=["jsonl", "ndjson", "list", "list with spaces", "lines in .json"],
)
@pytest.mark.parametrize("compression", COMPRESS)
def test_json_is_read_with_the_line_of_every_row(tmp_path, name, data, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](data))
    read = found(path)
    assert [row for _, row, _ in read] == [GOOD, GOOD]
    for where, row, _ in read:
        line = data.decode("utf-8-sig").split("\n")[int(where[1:]) - 1]
        assert line.lstrip(" [").startswith(("{", "\ufeff{"))
        assert row == GOOD


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1), st.booleans(), st.integers(1, 7))
def test_a_list_is_read_the_same_however_its_blocks_fall(tmp_path_factory, elements, ascii_only, block):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(elements, ensure_ascii=ascii_only, indent=1), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "_BLOCK", block)
        assert [row for _, row, _ in found(path)] == elements


@given(st.lists(st.text(alphabet="<|endoftx>é\n"), min_size=1, max_size=4), st.integers(1, 20))
def test_text_is_divided_the_same_however_its_blocks_fall(tmp_path_factory, parts, block):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = rows.MARK.join(parts)
    path.write_bytes(text.encode())
    expected = [part.strip("\n") for part in text.split(rows.MARK) if part.strip()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "_BLOCK", block)
        assert [row and row["text"] for _, row, _ in found(path)] == (expected or [None])


TABLE = [{"messages": [{"role": "user", "content": "U"}]}, {"messages": [{"role": "user", "content": "V"}]}]


def parquet(table):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), sink)
    return sink.getvalue()


@pytest.mark.parametrize("compression", COMPRESS)
def test_parquet_is_read_by_row(tmp_path, compression):
    path = tmp_path / ("a.parquet" + compression)
    path.write_bytes(COMPRESS[compression](parquet(TABLE)))
    assert found(path) == [(":row 1", TABLE[0], ""), (":row 2", TABLE[1], "")]


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_is_one_document_but_for_its_marks(tmp_path, compression):
    path = tmp_path / ("a.txt" + compression)
    data = b"\xef\xbb\xbfOne.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>\n"
    path.write_bytes(COMPRESS[compression](data))
    assert found(path) == [
        (":document 1", {"text": "One.\n\nStill one."}, ""),
        (":document 2", {"text": "Two."}, ""),
    ]


LINES = json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"], ids=["plain", "gzip", "gzip by its short name", "zstd"]
)
def test_the_files_of_an_archive_are_read_in_its_order(tmp_path, name):
    compress = COMPRESS[".zst" if name.endswith("zst") else ".gz" if name != "a.tar" else ""]
    path = tmp_path / name
    members = {
        "./data": None,
        "./data/b.jsonl": LINES,
        "README.md": b"no data",
        "./data/._b.jsonl": b"what some systems leave behind",
        "data/a.jsonl.gz": gzip.compress(LINES),
        "c.json.zst": zstd(b"[" + LINES.replace(b"\n", b",") + b"]"),
        "d.parquet": parquet(TABLE),
        "e.tar": tarred({"f.txt": b"Inside."}),
    }
    path.write_bytes(compress(tarred(members)))
    assert found(path) == [
        ("/data/b.jsonl:1", GOOD, ""),
        ("/data/b.jsonl:2", GOOD, ""),
        ("/data/a.jsonl.gz:1", GOOD, ""),
        ("/data/a.jsonl.gz:2", GOOD, ""),
        ("/c.json.zst:1", GOOD, ""),
        ("/c.json.zst:1", GOOD, ""),
        ("/d.parquet:row 1", TABLE[0], ""),
        ("/d.parquet:row 2", TABLE[1], ""),
        ("/e.tar/f.txt:document 1", {"text": "Inside."}, ""),
    ]


def test_a_directory_is_read_file_by_file_in_the_order_of_paths(tmp_path):
    for name in ("b.jsonl", "a-b/c.jsonl", "a/b/c.jsonl", "a/a.jsonl", ".cache/x.jsonl", "a/.x.jsonl", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    texts = [row.row and row.row["text"] for row in rows.rows(tmp_path)]
    assert texts == ["a/a.jsonl", "a/b/c.jsonl", "a-b/c.jsonl", "b.jsonl"]


@pytest.mark.parametrize("data", [b'{"text": "x"}\n', {"text": "x"}])
def test_a_row_can_be_parsed_in_another_process(data):
    raw = Raw("a.jsonl:1", data)
    assert pickle.loads(pickle.dumps(raw)) == raw
    assert raw.parse() == rows.Located("a.jsonl:1", {"text": "x"})


# -- what is broken


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "half', "not JSON: Unterminated string"),
        (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data at column 15"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b"[1, 2]", "not an object: list"),
        (b"null", "not an object: NoneType"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=["half a line", "two objects", "bad byte", "surrogate bytes", "list", "null", "huge number", "deep"],
)
def test_a_broken_line_is_told_with_its_line_and_the_rest_is_read(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' + line + b'\n{"text": "3"}\n')
    read = found(path)
    assert [where for where, _, _ in read] == [":1", ":2", ":3"]
    assert [row for _, row, _ in read] == [{"text": "1"}, None, {"text": "3"}]
    assert read[1][2].startswith(says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[\n{"text": "1"},\n{"text": "2', ":3: not JSON: Unterminated string starting at character 27 of the file"),
        (b'[\n{"text": "1"}\n{"text": "2"}]', ":3: not JSON: no comma"),
        (b'[\n{"text": "1"},\n]', ":3: not JSON: a comma before the end"),
        (b'[\n{"text": "1"}', ":2: not JSON: no comma"),
        (b"[\n{}]\nx", ":3: not JSON: something after the end"),
        (b"[", ":1: not JSON: Expecting value"),
        (b'[\n"\xff"]', ":2: not UTF-8: invalid start byte at byte 3"),
        (b'[\n"\xc3', ":2: not UTF-8: unexpected end of data at byte 3"),
        (b"[\n" + b"[" * 100_000, ":2: not JSON"),
        (b"[\n" + b"9" * 5000 + b"]", ":2: not JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("block", [1, 2**20])
def test_a_broken_list_is_told_with_its_line(tmp_path, monkeypatch, data, says, block):
    monkeypatch.setattr(rows, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(LlameroError, match=rf"a\.json{says}"):
        found(path)


def test_a_list_broken_in_the_middle_is_read_up_to_there_and_no_further(tmp_path):
    path = tmp_path / "a.json"
    good = b',\n{"text": "' + b"x" * 1000 + b'"}'
    path.write_bytes(b'[{"text": "1"}' + good * 5000 + b',\n{"text" "2"}' + good * 5000 + b"]")
    read = rows.rows(path)
    assert sum(1 for _ in islice(read, 5001)) == 5001
    with pytest.raises(LlameroError, match=r"a\.json:5002: not JSON: Expecting ':' delimiter"):
        next(read)


def test_an_element_that_is_no_object_is_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "1"},\n3,\n{"text": "3"}]')
    assert [(where, problem) for where, _, problem in found(path)] == [
        (":2", ""),
        (":3", "not an object: int 3"),
        (":4", ""),
    ]


RANDOM = b"\n".join(json.dumps({"text": os.urandom(9).hex()}).encode() for _ in range(100))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".gz", lambda raw: raw[:-20]),
        (".gz", lambda raw: raw[:60] + b"\0" * 20 + raw[80:]),
        (".gz", lambda _: b"no"),
        (".zst", lambda raw: raw[:-20]),
        (".zst", lambda _: b"no"),
    ],
    ids=["truncated gzip", "overwritten gzip", "no gzip", "truncated zstd", "no zstd"],
)
def test_a_broken_compressed_file_is_named(tmp_path, name, suffix, damage):
    path = tmp_path / (name + suffix)
    path.write_bytes(damage(COMPRESS[suffix](RANDOM)))
    with pytest.raises(LlameroError, match=r"a\.\w+\.(gz|zst)(:\d+)?: broken file.*\n.*download it again"):
        found(path)


@pytest.mark.parametrize("kept", [100, 512, 1000, 5000, -20480 + 512, -1], ids=lambda kept: f"to {kept}")
def test_a_truncated_archive_is_named(tmp_path, kept):
    path = tmp_path / "a.tar"
    whole = tarred({"a.jsonl": RANDOM, "b.jsonl": RANDOM})
    path.write_bytes(whole[:kept].rstrip(b"\0") if kept == -1 else whole[:kept])
    with pytest.raises(LlameroError, match=r"a\.tar(/\w\.jsonl:\d+)?: broken file"):
        found(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_compressed_archive_is_named(tmp_path, kept):
    path = tmp_path / "a.tar.gz"
    whole = gzip.compress(tarred({"a.jsonl": RANDOM, "b.jsonl": RANDOM}))
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(LlameroError, match=r"a\.tar\.gz(/\w\.jsonl:\d+)?: broken file"):
        found(path)


@pytest.mark.parametrize("data", [b"", b"PAR1 nonsense PAR1"])
def test_a_broken_parquet_file_is_named(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(LlameroError, match=r"a\.parquet: broken Parquet"):
        found(path)


def test_a_parquet_file_damaged_behind_its_schema_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) * 50 for n in range(2000)]}), path, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[100:2000] = os.urandom(1900)
    path.write_bytes(bytes(raw))
    with pytest.raises(LlameroError, match=r"a\.parquet: broken Parquet"):
        found(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("data", [b"", b" \n\n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_told(tmp_path, name, compression, data):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](data))
    assert found(path) == [("", None, "the file has no rows")]


def test_a_missing_or_unknown_file_is_named(tmp_path):
    with pytest.raises(LlameroError, match="no such data file"):
        found(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(LlameroError, match=r"unknown kind of file(?s:.*)\.parquet"):
        found(tmp_path / "a.csv")
    with pytest.raises(LlameroError, match=r"no file in it that ends in"):
        found(tmp_path)
    (tmp_path / "a.tar").write_bytes(tarred({"a.csv": b"a,b"}))
    with pytest.raises(LlameroError, match=r"a\.tar: no file in it that ends in"):
        found(tmp_path / "a.tar")


# -- sizes


def test_a_single_line_of_ten_megabytes_is_read(tmp_path):
    row = {"text": "é" * 5_000_000}
    for name, text in (("a.jsonl", json.dumps(row, ensure_ascii=False)), ("a.json", json.dumps([row]))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert found(tmp_path / name) == [(":1", row, "")]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{}\n{"text": "%s"}\n{}' % (b"x" * 3000), r"a\.jsonl:2: a line longer than"),
        ("a.json", b'[{},\n{"text": "%s"},\n{}]' % (b"x" * 3000), r"a\.json:2: a JSON element longer than"),
        ("a.txt", b"x" * 3000, r"a\.txt: a document longer than"),
    ],
)
def test_what_is_too_long_for_memory_is_refused(tmp_path, monkeypatch, name, data, says):
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    monkeypatch.setattr(rows, "_BLOCK", 100)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LlameroError, match=says):
        found(tmp_path / name)


LONG = json.dumps({"text": "All of it at once would not do. " * 30}).encode()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.jsonl", lambda: (LONG + b"\n") * 40_000),
        ("a.jsonl.gz", lambda: gzip.compress((LONG + b"\n") * 40_000, 1)),
        ("a.jsonl.zst", lambda: zstd((LONG + b"\n") * 40_000)),
        ("a.json", lambda: b"[" + b",".join([LONG] * 40_000) + b"]"),
        ("a.txt", lambda: (LONG + rows.MARK.encode()) * 40_000),
        ("a.tar.gz", lambda: gzip.compress(tarred({f"{n}.jsonl": (LONG + b"\n") * 400 for n in range(100)}), 1)),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, name, make):
    path = tmp_path / name
    path.write_bytes(make())
    tracemalloc.start()
    try:
        assert sum(raw.data is not None for raw in rows.read(path)) == 40_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20, "of a file of 40 MB"
