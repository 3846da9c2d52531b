import pytest
from pydantic import ValidationError

from llamero.core.errors import LlameroError
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.variants import EXAMPLES, Variant, parse


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


def test_a_wholly_unknown_name_is_answered_with_examples():
    with pytest.raises(LlameroError, match="one of: awq-4bit-128g, gptq-3bit-128g-actorder_True, "):
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
        (["rtn-4bit-128g"], {}, "either `mixture` or `text`"),
        (["rtn-4bit-128g"], {"mixture": "chat", "text": "a.txt"}, "either `mixture` or `text`"),
        (["rtn-4bit-128g"], {"mixture": "chat", "tokens": 100}, "less than one sequence"),
    ],
)
def test_a_wrong_config_says_why(variants, calibration, says):
    with pytest.raises(ValidationError, match=says):
        QuantizeConfig.model_validate({"variants": variants, "calibration": calibration})
