import pytest

from llamero.publish import markdown


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(35_330_000_000, "35.33 GB"), (100_000_000, "0.10 GB"), (4_512_000, "4.51 MB")]
)
def test_sizes_are_decimal(num_bytes, text):
    assert markdown.size(num_bytes) == text


def test_a_cell_cannot_break_its_row():
    rows = markdown.table(["a", "b"], [["<|im_end|>", "two\nlines"]]).splitlines()
    assert rows == ["| a | b |", "| --- | ---: |", r"| <\|im_end\|> | two lines |"]


def test_a_fence_is_longer_than_those_inside():
    assert markdown.fence("```` inside", "yaml") == "`````yaml\n```` inside\n`````"
    assert markdown.fence("plain\n") == "```\nplain\n\n```"
