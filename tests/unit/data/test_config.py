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
        ({"source": "a"}, "where `a` lies is not known; give `path` or `hub`"),
        ({"source": "oasst_export"}, "never published; give the path of one"),
        ({"source": "megacode22"}, "did you mean `megacode2`"),
        ({"source": "a", "path": "a", "hub": "b/c"}, "give `path` or `hub`, not both"),
        ({"source": "a", "path": "a", "fraction": 0.5, "size": 3}, "`fraction` or `size`, not both"),
        ({"source": "a", "path": "a", "layout": "alpacca"}, "alpaca-rendered"),
        ({"source": "a", "path": "a", "val_split": 1.0}, "less than 1"),
        ({"source": "a", "path": "a", "weight": 0}, "greater than 0"),
        ({"source": "a", "path": "a", "part": 0.5}, "not permitted"),
        ({"toy_world": "poems", "count": 1}, "'documents' or 'conversations'"),
    ],
)
def test_what_is_no_source_is_refused_with_a_reason(row, says):
    with pytest.raises(ValidationError, match=says):
        sources(row)


def test_a_published_data_set_needs_only_its_name():
    (source,) = sources({"source": "megacode2", "fraction": 0.5})
    assert isinstance(source, FileSource)
    assert source.hub == "rombodawg/LosslessMegaCodeTrainingV2_1m_Evol_Uncensored"
    assert source.data_files == "DeDuped_LosslessMegaCodeTrainingV2_942k_Evol_Uncensored.json"
    assert (source.layout, source.refusals, source.fraction) == ("instruction-response", True, 0.5)
    assert sources(source) == [source]


def test_what_a_recipe_says_of_a_published_data_set_counts():
    said, copied = sources(
        {"source": "megacode2", "refusals": False}, {"source": "orca-chat", "path": "copy.json", "lang": "en"}
    )
    assert isinstance(said, FileSource)
    assert isinstance(copied, FileSource)
    assert said.refusals is False
    assert (copied.hub, copied.layout) == (None, None)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValidationError, match="two sources are called `a`"):
        sources({"source": "a", "path": "a"}, {"source": "a", "path": "b"})


def test_the_schema_can_be_written():
    assert "FileSource" in str(TypeAdapter(MixtureConfig).json_schema())
