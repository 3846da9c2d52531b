import pytest

from llamero.cli import data, display
from llamero.core.errors import LlameroError
from llamero.data.stats import SourceStats


def test_a_place_in_a_file_is_no_emoji(capsys):
    display.out.print("file.jsonl:100: broken")
    display.err.print("file.jsonl:100: broken")
    said = capsys.readouterr()
    assert "file.jsonl:100: broken" in said.out
    assert "file.jsonl:100: broken" in said.err


def test_a_file_that_is_no_text_cannot_be_imported(tmp_path):
    (tmp_path / "garbage.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(LlameroError, match=r"garbage\.bin"):
        data.import_(tmp_path / "garbage.bin", "x")


def test_unknown_tokens_are_said_where_there_are_any(capsys):
    part = SourceStats("alpaca", unknown_tokens=1234)
    display.say_statistics("mixture", [part], part)
    assert "unknown tokens: 1,234" in capsys.readouterr().out
