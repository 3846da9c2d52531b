import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus.samples import Chat, Document
from llamero.data.config import FileSource, MixtureConfig, ToyWorldSource
from llamero.data.read import Parsed, Reading, refuse_unreadable

GOOD = {"instruction": "I", "output": "O"}


def reading(tmp_path, *lines, **keys):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    return Reading(FileSource(source="a", path="a.jsonl", **keys), tmp_path)


def counted(rows):
    """Where samples were found, and what was met instead of samples, by reason."""
    found, reasons = [], Counter()
    for parsed in map(rows.parse, rows):
        for item in parsed.found:
            if isinstance(item, Chat | Document):
                found.append(parsed.where)
            else:
                reasons[item.reason] += 1
    return found, reasons


MALFORMED = {
    "key missing": ({"instruction": "I"}, "`output` is missing"),
    "half a line": ('{"instruction": "I", "outp', "not JSON"),
    "bad byte": ('{"instruction": "\udcff", "output": "O"}', "not UTF-8"),
    "lone surrogate": (
        '{"instruction": "\\ud83d", "output": "O"}',
        "`instruction` holds half a character (lone surrogate)",
    ),
    "no object": ([1], "not an object"),
    "empty answer": ({"instruction": "I", "output": ""}, "the answer is empty"),
}


@pytest.mark.parametrize(("row", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_stops_everything_at_its_line(tmp_path, row, reason):
    with pytest.raises(LlameroError) as told:
        list(reading(tmp_path, GOOD, GOOD, row, GOOD).samples())
    assert told.value.where == str(tmp_path / "a.jsonl:3")
    assert told.value.problem.startswith(reason)
    assert "on_error: skip" in str(told.value.fix)


@pytest.mark.parametrize(("row", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_or_is_counted_and_skipped(tmp_path, row, reason):
    rows = reading(tmp_path, GOOD, row, GOOD, row, on_error="skip")
    assert [found.where for found in rows.samples()] == [str(tmp_path / f"a.jsonl:{line}") for line in (1, 3)]
    assert counted(rows)[1] == Counter({reason: 2})


def test_rows_of_one_fault_are_counted_together(tmp_path):
    def turns(*roles):
        return {"messages": [{"role": role, "content": "x"} for role in roles]}

    rows = reading(
        tmp_path,
        turns("user", "tool"),
        turns("user", "assistant", "tool"),
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [3]}]},
        {"messages": [{"role": "user", "content": 4}]},
        layout="messages",
        on_error="skip",
    )
    assert counted(rows) == (
        [],
        {
            "`messages.N.role` is str 'tool'": 2,
            "`content` must be text": 2,
            "`messages.N.content` has parts that are not text": 1,
        },
    )


@pytest.mark.parametrize("first", [{"a": 1}, {"instruction": "I"}, "{"], ids=["foreign", "key missing", "half"])
def test_the_layout_is_recognised_by_the_first_row_that_has_one(tmp_path, first):
    rows = reading(tmp_path, first, GOOD, on_error="skip")
    assert rows.layout == "alpaca"
    found, reasons = counted(rows)
    assert (len(found), reasons.total()) == (1, 1)


def test_an_unknown_layout_stops_everything_where_faults_do(tmp_path):
    with pytest.raises(LlameroError, match=r"a\.jsonl:1: .*fit no known layout(?s:.*)state `layout:`"):
        list(reading(tmp_path, {"a": 1}, GOOD))


def test_a_row_of_another_layout_is_malformed(tmp_path):
    with pytest.raises(LlameroError, match=r"a\.jsonl:2: `instruction` is missing; the row has text"):
        list(reading(tmp_path, GOOD, {"text": "T"}).samples())


def test_an_empty_file_is_an_error_or_a_counted_skip(tmp_path):
    with pytest.raises(LlameroError, match=r"a\.jsonl: the file has no rows"):
        list(reading(tmp_path))
    rows = reading(tmp_path, on_error="skip", layout="alpaca")
    assert counted(rows) == ([], {"the file has no rows": 1})


def test_a_limit_counts_rows(tmp_path):
    assert len(list(reading(tmp_path, GOOD, GOOD, GOOD, limit=2))) == 2


def hub(monkeypatch, rows):
    """Read a data set of the hub; `rows` stands for what the `datasets` library gives."""
    library = ModuleType("datasets")

    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("owner/name", "test", True)
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    vars(library)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    return list(Reading(FileSource(source="a", hub="owner/name", split="test"), Path("/")).samples())


def test_a_data_set_of_the_hub_is_a_source_like_others(monkeypatch):
    assert [found.where for found in hub(monkeypatch, [GOOD, GOOD])] == [
        "owner/name:test:row 1",
        "owner/name:test:row 2",
    ]
    with pytest.raises(LlameroError, match="owner/name:test:row 2: `output` is missing"):
        hub(monkeypatch, [GOOD, {"instruction": "I"}])


@pytest.mark.parametrize("error", [FileNotFoundError("no such data set"), ValueError("Bad split"), ConnectionError()])
def test_what_the_hub_refuses_is_said_with_the_row(monkeypatch, error):
    with pytest.raises(LlameroError, match=r"owner/name, split test, after row 1: the hub data set cannot be read"):
        hub(monkeypatch, [GOOD, error])


def test_the_library_for_the_hub_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LlameroError, match=r"pip install 'llamero\[data\]'"):
        list(Reading(FileSource(source="a", hub="owner/name"), Path("/")))


def test_the_toy_world_is_a_source_like_others(tmp_path):
    texts = list(Reading(ToyWorldSource(toy_world="documents", count=5), tmp_path).samples())
    chats = list(Reading(ToyWorldSource(toy_world="conversations", count=5), tmp_path).samples())
    assert all(isinstance(found.sample, Document) for found in texts)
    assert all(isinstance(found.sample, Chat) for found in chats)
    assert [found.where for found in chats] == [f"toy_world:{number}" for number in range(1, 6)]


def tree_table(count):
    """Messages whose parent is nowhere: all of one fault."""
    for number in range(count):
        row = {"message_id": f"m{number}", "parent_id": f"gone{number}", "message_tree_id": f"t{number}"}
        yield row | {"text": "x", "role": "assistant", "lang": "en", "tree_state": "ready_for_export"}


def test_faults_of_tables_of_trees_have_one_reason(tmp_path):
    rows = reading(tmp_path, *tree_table(5), layout="oasst-flat", on_error="skip")
    assert counted(rows) == ([], {"a parent is missing, or stands apart from its tree": 5})


def test_threads_of_trees_are_not_joined(tmp_path):
    with pytest.raises(LlameroError, match="`join_chars` would join threads of `a` across trees"):
        reading(tmp_path, *tree_table(1), layout="oasst-flat", join_chars=100)


def test_conversations_are_joined_under_their_system_message_and_rows_are_counted(tmp_path):
    said = [{"instruction": "S", "input": f"q{n}", "output": "a" * 30} for n in range(5)]
    said.insert(2, {"instruction": "other", "input": "q", "output": "a"})
    rows = reading(tmp_path, *said, layout="dolphin", join_chars=60)
    units = [unit for unit in rows if isinstance(unit, Parsed)]
    chats = [chat for unit in units for chat in unit.found if isinstance(chat, Chat)]
    assert [len(chat.messages) for chat in chats] == [5, 5, 3, 3]
    assert [unit.rows for unit in units] == [2, 2, 1, 1]
    assert [chat.messages[0].text for chat in chats] == ["S", "S", "other", "S"]


def test_languages_and_refusals_are_left_out_by_reason(tmp_path):
    def chat(answer, language):
        return {"instruction": "I", "output": answer, "language": language}

    lines = [chat("fine", "en"), chat("fine", "de"), chat("As an AI language model, I will not", "en")]
    found, reasons = counted(reading(tmp_path, *lines, lang="en", refusals=True))
    assert (len(found), reasons) == (1, {"another language": 1, "speaks as a refusing assistant": 1})
    found, reasons = counted(reading(tmp_path, GOOD, lang="en", on_error="skip"))
    assert (found, reasons) == ([], {"the row names no language, `lang` asks for en": 1})


def test_replies_are_ranked_in_trees_only(tmp_path):
    with pytest.raises(LlameroError, match="`top_k` and `synthetic` are for message trees"):
        reading(tmp_path, GOOD, top_k=1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sources": [{"source": "a", "path": "gone.jsonl"}]}, r"gone\.jsonl: there is no such file \(source a\)"),
        ({"sources": [{"source": "a", "path": "b.jsonl"}]}, r"b\.jsonl:1: source `a`: the keys x fit no known layout"),
        (
            {
                "sources": [{"source": "a", "path": "a.jsonl"}],
                "decontaminate": {"against": {"quiz": "quiz.jsonl"}},
            },
            r"quiz\.jsonl: there is no such file \(test set quiz\)",
        ),
    ],
)
def test_what_a_mixture_cannot_read_is_known_before_anything_is_made(tmp_path, keys, says):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "b.jsonl").write_text(json.dumps({"x": 1}))
    with pytest.raises(LlameroError, match=says):
        refuse_unreadable(MixtureConfig.model_validate(keys), tmp_path)
    refuse_unreadable(MixtureConfig.model_validate({"sources": [{"source": "a", "path": "a.jsonl"}]}), tmp_path)
