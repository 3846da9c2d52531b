import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llamero.core.errors import LlameroError
from llamero.corpus import sources
from llamero.corpus.sources import BadRowError, Chat, Document
from llamero.text.messages import Message

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data/instruct"


def chat(*turns):
    return Chat(tuple(Message(role, text) for role, text in turns))


ROWS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        chat(("user", "Add.\n1 and 2"), ("assistant", "3")),
    ),
    "alpaca without input": (
        {"instruction": "Greet.", "input": "", "output": "Hi", "system": "Be kind."},
        chat(("system", "Be kind."), ("user", "Greet."), ("assistant", "Hi")),
    ),
    "orca": (
        {"id": "niv.1", "system_prompt": "Think.", "question": "Why?", "response": "So."},
        chat(("system", "Think."), ("user", "Why?"), ("assistant", "So.")),
    ),
    "orca without system": (
        {"system_prompt": "", "question": "Why?", "response": "So."},
        chat(("user", "Why?"), ("assistant", "So.")),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        chat(("user", "Hi"), ("assistant", "Yo")),
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "context", "content": "C"},
                {"role": "user", "content": [{"type": "text", "text": "U"}, {"type": "text", "value": "V"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        chat(("system", "S"), ("context", "C"), ("user", "UV"), ("assistant", "A")),
    ),
    "messages with weights": (
        {
            "messages": [
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "no", "loss_weight": 0.0},
                {"role": "user", "content": "V"},
                {"role": "assistant", "content": "yes", "loss_weight": 1},
            ]
        },
        Chat(
            (
                Message("user", "U"),
                Message("assistant", "no", learned=False),
                Message("user", "V"),
                Message("assistant", "yes"),
            )
        ),
    ),
    "pair": ({"prompt": "P", "completion": "C"}, chat(("user", "P"), ("assistant", "C"))),
    "text": ({"text": "Once.", "meta": 3}, Document("Once.")),
}


@pytest.mark.parametrize(("row", "sample"), ROWS.values(), ids=ROWS)
def test_a_layout_is_recognised_and_read(row, sample):
    layout = sources.detect(row, where="x:1")
    assert sources.layout_named(layout).read(row) == sample


def test_a_rendered_alpaca_prompt_is_taken_out_of_its_wrapper():
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    prompt = f"{preamble}\n\n### Instruction:\nAdd.\n\n### Response:"
    read = sources.layout_named("alpaca-rendered").read
    assert read({"prompt": prompt, "answer": "3"}) == chat(("user", "Add."), ("assistant", "3"))
    with pytest.raises(BadRowError, match="not in the Alpaca wrapper"):
        read({"prompt": "Add.", "answer": "3"})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"a": 1}, "the keys a fit no known layout"),
        ({}, "fit no known layout"),
        ({"instruction": "I", "output": "O", "text": "T"}, "fit alpaca and text"),
    ],
)
def test_what_cannot_be_recognised_must_be_stated(row, says):
    with pytest.raises(LlameroError, match=rf"^file:3: (?s:.*){says}(?s:.*)state `layout:`"):
        sources.detect(row, where="file:3")


def test_an_unknown_layout_is_answered_with_the_nearest():
    with pytest.raises(LlameroError, match="did you mean `sharegpt`"):
        sources.layout_named("share_gpt")


TURN = {"role": "user", "content": "U"}


@pytest.mark.parametrize(
    ("layout", "row", "says"),
    [
        ("alpaca", {"instruction": "I"}, "`output` is missing; the row has instruction"),
        ("alpaca", {"instruction": None, "output": "O"}, "`instruction` is null"),
        ("alpaca", {}, "no keys"),
        ("alpaca", {"instruction": 3, "output": "O"}, "`instruction` must be text, is int 3"),
        ("alpaca", {"instruction": "I", "input": ["x"], "output": "O"}, "`input` must be text, is list"),
        ("alpaca", {"instruction": "I", "output": "  \n"}, "answer is empty"),
        ("orca", {"question": "Q", "response": "ok \ud83d"}, r"`response` holds half a character .* at 3"),
        ("pair", {"prompt": "P"}, "`answer` is missing"),
        ("text", {"text": {"a": 1}}, "`text` must be text, is dict"),
        ("sharegpt", {"conversations": []}, "`conversations` must be a list of turns"),
        ("sharegpt", {"conversations": "hi"}, "`conversations` must be a list of turns, is str"),
        ("sharegpt", {}, "`conversations` must be a list of turns, is NoneType"),
        ("sharegpt", {"conversations": ["hi"]}, r"`conversations\.0` must be an object"),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "x"}]}, r"`conversations\.0\.from` is str 'bing'"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "x"}]}, r"`conversations\.0\.from` is list"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"`value` is missing.*in `conversations\.0`"),
        ("messages", {"messages": [TURN, {"role": "tool", "content": "x"}]}, r"`messages\.1\.role` is str 'tool'"),
        ("messages", {"messages": [TURN, {"content": "x"}]}, r"`messages\.1\.role` is NoneType None"),
        ("messages", {"messages": [{**TURN, "content": None}]}, r"`content` is null.*in `messages\.0`"),
        ("messages", {"messages": [{**TURN, "content": [{"type": "image"}]}]}, r"`messages\.0\.content` has parts"),
        ("messages", {"messages": [{**TURN, "loss_weight": 0.5}]}, r"`messages\.0\.loss_weight` is 0\.5"),
        ("messages", {"messages": [{**TURN, "loss_weight": [1]}]}, r"`messages\.0\.loss_weight` is"),
    ],
)
def test_a_malformed_row_names_the_key_and_the_value(layout, row, says):
    with pytest.raises(BadRowError, match=says):
        sources.layout_named(layout).read(row)


GOOD = {"text": "é\u2028x"}


def found(path):
    return [(row.where.removeprefix(str(path)), row.row, row.problem) for row in sources.rows(path)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", json.dumps(GOOD).encode() + b"\n\n" + json.dumps(GOOD, ensure_ascii=False).encode() + b"\r\n"),
        ("a.ndjson", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n \n" + json.dumps(GOOD).encode()),
        ("a.json", b"\n" + json.dumps([GOOD, GOOD], indent=0).encode()),
        ("a.json", b"\xef\xbb\xbf [" + json.dumps(GOOD).encode() + b"\n\n,\n" + json.dumps(GOOD).encode() + b" ]\n"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
def test_json_is_read_with_the_line_of_every_row(tmp_path, name, data, zipped):
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    rows = found(path)
    assert [row for _, row, _ in rows] == [GOOD, GOOD]
    for where, row, _ in rows:
        line = data.decode("utf-8-sig").split("\n")[int(where[1:]) - 1]
        assert line.lstrip(" [").startswith(("{", "\ufeff{"))
        assert row == GOOD


def test_parquet_is_read_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [ROWS["messages with weights"][0], ROWS["messages with weights"][0]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = found(path)
    assert [where for where, _, _ in read] == [":row 1", ":row 2"]
    assert {sources.messages(row) for _, row, _ in read if row} == {ROWS["messages with weights"][1]}


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
def test_text_is_one_document_but_for_its_marks(tmp_path, zipped):
    path = tmp_path / ("a.txt" + ".gz" * zipped)
    data = b"One.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>\n"
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert found(path) == [
        (":document 1", {"text": "One.\n\nStill one."}, ""),
        (":document 2", {"text": "Two."}, ""),
    ]


def test_a_directory_is_read_file_by_file_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "LICENSE").write_text("not data")
    assert [row.row for row in sources.rows(tmp_path)] == [{"text": "a.jsonl"}, {"text": "b.jsonl"}]


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
    rows = found(path)
    assert [where for where, _, _ in rows] == [":1", ":2", ":3"]
    assert [row for _, row, _ in rows] == [{"text": "1"}, None, {"text": "3"}]
    assert rows[1][2].startswith(says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[\n{"text": "1"},\n{"text": "2', ":3: not JSON: Unterminated"),
        (b'[\n{"text": "1"}\n{"text": "2"}]', ":3: not JSON: no comma"),
        (b'[\n{"text": "1"},\n]', ":3: not JSON: a comma before the end"),
        (b'[\n{"text": "1"}', ":2: not JSON: no comma"),
        (b"[\n{}]\nx", ":3: not JSON: something after the end"),
        (b"[", ":1: not JSON: Expecting value"),
        (b'[\n"\xff"]', ":2: not UTF-8"),
        (b'{"text": "1"}\n{"text": "2"}', r": a list of objects is expected\n  fix: use .jsonl"),
        (b"[" * 100_000, ": after line 1: not JSON"),
    ],
)
def test_a_broken_json_file_is_told_with_its_line(tmp_path, data, says):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(LlameroError, match=rf"a\.json{says}"):
        found(path)


def test_an_element_that_is_no_object_is_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "1"},\n3,\n{"text": "3"}]')
    assert [(where, problem) for where, _, problem in found(path)] == [
        (":2", ""),
        (":3", "not an object: int 3"),
        (":4", ""),
    ]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: raw[:60] + b"\0" * 20 + raw[80:], lambda _: b"no"]
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_a_broken_gzip_is_named(tmp_path, damage, name):
    rows = "\n".join(json.dumps({"text": os.urandom(9).hex()}) for _ in range(100))
    path = tmp_path / name
    path.write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(LlameroError, match=r"a\.\w+\.gz:\d+: broken gzip.*\n.*download it again"):
        found(path)


@pytest.mark.parametrize("data", [b"", b"PAR1 nonsense PAR1"])
def test_a_broken_parquet_file_is_named(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(LlameroError, match=r"a\.parquet: broken Parquet"):
        found(path)


def test_a_parquet_file_cut_off_behind_its_schema_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) * 50 for n in range(2000)]}), path, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[100:2000] = os.urandom(1900)
    path.write_bytes(bytes(raw))
    with pytest.raises(LlameroError, match=r"a\.parquet: broken Parquet"):
        found(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b" \n\n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_told(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert found(path) == [("", None, "the file has no rows")]


def test_a_missing_or_unknown_file_is_named(tmp_path):
    with pytest.raises(LlameroError, match="no such data file"):
        found(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(LlameroError, match=r"unknown kind of file(?s:.*)\.parquet"):
        found(tmp_path / "a.csv")
    with pytest.raises(LlameroError, match=r"no file in it that ends in"):
        found(tmp_path)


REAL = [
    ("alpaca/alpaca_en_demo.json", None),
    ("alpaca/alpaca_tiny.json", "alpaca"),
    ("alpaca/identity.json", None),
    ("code_alpaca/code_alpaca_2k.json", None),
    ("lima/lima.json", None),
    ("dolly/dolly.jsonl", "alpaca-rendered"),
    ("sharegpt/dummy_conversation.json", None),
    ("messages/v1_sft_demo.jsonl", None),
]


EMPTY_ANSWERS = {"code_alpaca/code_alpaca_2k.json": 2}


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")
@pytest.mark.parametrize(("name", "layout"), REAL, ids=[name for name, _ in REAL])
def test_real_files_are_read_completely(name, layout):
    path = SHARED / name
    raw = path.read_text(encoding="utf-8")
    expected = json.loads(raw) if path.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]
    rows = list(sources.rows(path))
    assert [row.row for row in rows] == expected
    layout = layout or sources.detect(expected[0], where=name)
    bad = []
    for row in rows:
        assert row.row is not None
        try:
            sample = sources.layout_named(layout).read(row.row)
        except BadRowError as error:
            bad.append(f"{row.where}: {error}")
            continue
        assert isinstance(sample, Chat)
        assert sample.messages[-1].role == "assistant"
    assert [problem.split(": ", 1)[1] for problem in bad] == ["the answer is empty"] * EMPTY_ANSWERS.get(name, 0)
