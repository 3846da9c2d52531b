"""What was appended stays; half a line goes."""

import json
import threading

import pytest

from llamero.core.errors import LlameroError
from llamero.core.journal import Journal


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_was_appended_is_there_again(tmp_path):
    path = tmp_path / "not" / "there" / "j.jsonl"
    first = Journal(path)
    assert first.records == []
    first.append({"n": 1, "said": "größer\n\u2028"})
    first.append({"n": 2})
    assert Journal(path).records == first.records == [{"n": 1, "said": "größer\n\u2028"}, {"n": 2}]


@pytest.mark.parametrize("torn", [b'{"n": 3, "sa', b'{"n": 3, "said": "\xc3', b"{", b"[3]"])
def test_half_a_line_is_taken_off(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + torn)
    journal = Journal(path)
    journal.append({"n": 4})
    assert lines(path) == journal.records == [{"n": 1}, {"n": 2}, {"n": 4}]


def test_a_line_that_lacks_only_its_end_stays(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    journal = Journal(path)
    journal.append({"n": 3})
    assert lines(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"n": 1}\nnonsense\n{"n": 2}\n', encoding="utf-8")
    with pytest.raises(LlameroError, match=r"j\.jsonl:2: not a JSON object"):
        Journal(path)


def test_threads_append_whole_lines(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    threads = [
        threading.Thread(target=lambda k=k: [journal.append({"k": k, "x": "x" * 5000}) for _ in range(20)])
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["k"] for record in lines(journal.path)) == [k for k in range(8) for _ in range(20)]


def test_rewriting_replaces_everything(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"n": 1})
    journal.rewrite([{"n": 2}])
    journal.append({"n": 3})
    assert lines(journal.path) == journal.records == [{"n": 2}, {"n": 3}]
