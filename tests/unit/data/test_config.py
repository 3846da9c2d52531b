import pytest
from pydantic import TypeAdapter, ValidationError

from llamero.data.config import FileSource, MixtureConfig, ToyWorldSource


def sources(*rows):
    return MixtureConfig.model_validate({"sources": list(rows)}).sources


def test_a_source_is_known_by_its_keys():
    first, second = sources({"source": "a", "path": "a.jsonl"}, {"toy_world": "documents", "count": 3})
    assert isinstance(first, FileSource)
    assert isinstance(second, ToyWorldSource)
    assert second.source == "toy_world documents"
    assert sources(first, second) == [first, second]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("alpaca", "valid dictionary"),
        (["alpaca"], "valid dictionary"),
        (3, "valid dictionary"),
        ({"source": "a"}, "give `path` or `hub`"),
        ({"source": "a", "path": "a", "hub": "b/c"}, "give `path` or `hub`"),
        ({"source": "a", "path": "a", "layout": "alpacca"}, "alpaca-rendered"),
        ({"source": "a", "path": "a", "val_split": 1.0}, "less than 1"),
        ({"source": "a", "path": "a", "weight": 0}, "greater than 0"),
        ({"source": "a", "path": "a", "fraction": 0.5}, "not permitted"),
        ({"toy_world": "poems", "count": 1}, "'documents' or 'conversations'"),
    ],
)
def test_what_is_no_source_is_refused_with_a_reason(row, says):
    with pytest.raises(ValidationError, match=says):
        sources(row)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValidationError, match="two sources are called `a`"):
        sources({"source": "a", "path": "a"}, {"source": "a", "path": "b"})


def test_the_schema_can_be_written():
    assert "FileSource" in str(TypeAdapter(MixtureConfig).json_schema())
