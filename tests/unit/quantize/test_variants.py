import pytest
from pydantic import ValidationError

from llamero.core.errors import LlameroError
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.variants import EXAMPLES, PUBLISHED, Variant, default_set, parse, sibling_for_vllm


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gptq-4bit-128g-actorder_True", ("gptq", 4, 128, "desc")),
        ("gptq-4bit--1g-actorder_True", ("gptq", 4, -1, "desc")),
        ("gptq-3bit-128g-actorder_True", ("gptq", 3, 128, "desc")),
        ("gptq-8bit-64g-actorder_static", ("gptq", 8, 64, "static")),
        ("gptq-2bit-32g-actorder_False", ("gptq", 2, 32, "none")),
        ("rtn-4bit-128g", ("rtn", 4, 128, "none")),
        ("rtn-4bit--1g", ("rtn", 4, -1, "none")),
        ("gptq-4bit-128g-actorder_True-v2", ("gptq", 4, 128, "desc", True, "gptq_v2")),
        ("gptq-3bit-128g-actorder_static-ct", ("gptq", 3, 128, "static", True, "compressed-tensors")),
        ("gptq-5bit-32g-actorder_False-asym-ct", ("gptq", 5, 32, "none", False, "compressed-tensors")),
        ("gptq-4bit-128g-actorder_True-asym", ("gptq", 4, 128, "desc", False)),
        ("awq-4bit-128g", ("awq", 4, 128, "none", False, "awq")),
        ("awq-3bit-128g-ct", ("awq", 3, 128, "none", False, "compressed-tensors")),
    ],
)
def test_published_names_are_understood(name, expected):
    assert parse(name) == Variant(name, *expected)


def test_examples_are_names():
    assert [parse(name).name for name in EXAMPLES] == list(EXAMPLES)


def test_a_nearly_right_name_is_corrected():
    with pytest.raises(LlameroError, match="did you mean `gptq-4bit-128g-actorder_True`"):
        parse("gptq-4bit-128g-actorder_true")
    with pytest.raises(LlameroError, match="did you mean `gptq-8bit-256g-actorder_static-ct`"):
        parse("gptq-8bit-256g-actorder-static-ct")


def test_a_wholly_unknown_name_is_answered_with_examples():
    with pytest.raises(LlameroError, match="one of: awq-4bit-128g, gguf-Q4_K_M, gptq-3bit-128g-actorder_True, "):
        parse("Q5")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gptq-5bit-128g-actorder_True", "2, 3, 4 or 8 bits"),
        ("rtn-4bit-0g", "-1 for the whole row"),
        ("awq-3bit-128g", "awq files hold 4 bits"),
        ("gptq-9bit-128g-actorder_static-ct", "2, 3, 4, 5, 6, 7 or 8 bits"),
        ("gptq-4bit-128g-actorder_True-ct", "actorder_static"),
        ("awq-4bit-128g-v2", "leave out `-v2`"),
        ("awq-4bit-128g-actorder_True", "did you mean|one of"),
    ],
)
def test_impossible_numbers_are_refused(name, says):
    with pytest.raises(LlameroError, match=says):
        parse(name)


@pytest.mark.parametrize(
    ("name", "sibling"),
    [
        ("gptq-4bit--1g-actorder_True", None),
        ("gptq-4bit-128g-actorder_static", None),
        ("awq-4bit-128g", None),
        ("gptq-4bit-32g-actorder_True", "gptq-4bit-32g-actorder_static"),
        ("gptq-8bit-32g-actorder_True-v2", "gptq-8bit-32g-actorder_static"),
        ("gptq-3bit--1g-actorder_True", "gptq-3bit--1g-actorder_static-ct"),
        ("gptq-2bit-64g-actorder_False", "gptq-2bit-64g-actorder_False-ct"),
        ("gptq-4bit-64g-actorder_True-asym", "gptq-4bit-64g-actorder_static-asym-ct"),
        ("rtn-3bit-64g", "rtn-3bit-64g-ct"),
        ("gptq-3bit-64g-actorder_True-asym", None),  # no form of it is taken
        ("gptq-4bit-16g-actorder_True", None),
    ],
)
def test_what_vllm_refuses_has_a_sibling_that_it_takes(name, sibling):
    found = sibling_for_vllm(parse(name))
    assert (found and found.name) == sibling
    if found is not None:
        assert parse(found.name) == found


@pytest.mark.parametrize("sym", [True, False])
def test_the_default_set_is_the_published_table_with_siblings(sym):
    names = default_set(sym=sym)
    assert [name for name in names if name in PUBLISHED] == list(PUBLISHED)
    assert names[0] == "gptq-4bit--1g-actorder_True"  # the main branch
    assert len(set(names)) == len(names)
    for name in names:
        assert parse(name, sym=sym).name == name
    if sym:
        assert set(names) - set(PUBLISHED) == {
            "gptq-4bit-32g-actorder_static",
            "gptq-4bit-64g-actorder_static",
            "gptq-4bit-128g-actorder_static",
            "gptq-3bit--1g-actorder_static-ct",
            "gptq-3bit-128g-actorder_static-ct",
        }


def test_without_names_a_config_has_the_default_set():
    assert QuantizeConfig(calibration=Calibration(mixture="chat")).variants == default_set()


def test_a_config_gives_variants():
    config = QuantizeConfig(
        variants=("rtn-4bit-128g", "gptq-4bit-128g-actorder_True"), calibration=Calibration(mixture="chat"), sym=False
    )
    assert [variant.method for variant in config.parsed()] == ["rtn", "gptq"]
    assert not any(variant.sym for variant in config.parsed())


@pytest.mark.parametrize(
    ("variants", "calibration", "says"),
    [
        (["gptq-4bit-128g"], {"mixture": "chat"}, "gptq-4bit-128g-actorder_True, gptq-4bit-128g-actorder_static"),
        (["rtn-4bit-128g", "rtn-4bit-128g"], {"mixture": "chat"}, "listed twice"),
        ([], {"mixture": "chat"}, "at least 1"),
        (["rtn-4bit-128g"], {"sources": [{}]}, "give one of `mixture`, `path` and `hub`"),
        (["rtn-4bit-128g"], {"sources": [{"mixture": "chat", "path": "a.txt"}]}, "give one of"),
        (["rtn-4bit-128g"], {"sources": [{"source": "wikitext-2-v"}]}, r"did you mean `wikitext_2_v1`"),
        (["rtn-4bit-128g"], {"text": "a/test.txt", "sources": [{"path": "b/test.txt"}]}, r"two .* `test.txt \(test\)`"),
        (["rtn-4bit-128g"], {"mixture": "chat", "tokens": 100}, "less than one sequence"),
    ],
)
def test_a_wrong_config_says_why(variants, calibration, says):
    with pytest.raises(ValidationError, match=says):
        QuantizeConfig.model_validate({"variants": variants, "calibration": calibration})
