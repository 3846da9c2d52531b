import json

import pytest
from pydantic import ValidationError

from llamero.quantize.gate import Measure, Measured, Reading, judge


def reading(text="WikiText-2 test", **changes):
    keys = {"tokens": 1000, "broken": 0, "perplexity": 9.5, "kl": 0.01, "top1": 0.9, **changes}
    return Reading(text, "window 512, stride 256, no BOS", **keys)


def measured(*readings, problem=None):
    return Measured("awq-4bit-128g", readings, problem)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (measured(reading(), reading("stories", kl=0.1)), None),
        (measured(reading(), reading("stories", kl=0.1001)), "KL 0.1 on stories, more than 0.1"),
        (measured(reading(kl=7.0), reading("stories", kl=1.25)), "KL 7 on WikiText-2 test, more than 0.1"),
        (measured(reading(), reading("stories", tokens=980, broken=20)), "at 20 of 1,000 positions of stories"),
        (measured(reading(tokens=0, broken=1000, perplexity=None, kl=None, top1=None)), "at 1,000 of 1,000 positions"),
        (measured(problem="tensor `x` is missing"), "could not be measured: tensor `x` is missing"),
    ],
)
def test_what_is_far_from_the_original_or_cannot_be_measured_is_held_back(found, reason):
    verdict = judge(found, max_kl=0.1)
    assert verdict.published is (reason is None)
    assert (verdict.reason is None) if reason is None else reason in str(verdict.reason)
    told = judge(found, max_kl=0.1, anyway=["awq-4bit-128g"])
    assert told.published
    assert told.reason == verdict.reason
    assert judge(found, max_kl=0.1, anyway=["another"]) == verdict


def test_what_was_not_to_be_measured_is_not_judged():
    assert judge(None, max_kl=0.1).published


def test_the_worst_text_decides():
    assert measured(reading(kl=0.2), reading(kl=0.1)).kl == 0.2
    assert measured(problem="x").kl is None


def test_json_and_back():
    found = measured(reading(), reading("b", perplexity=None, kl=None, top1=None, broken=1000, tokens=0), problem=None)
    assert Measured.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


@pytest.mark.parametrize(
    ("keys", "context", "sight"),
    [
        ({}, 4096, (512, 256)),
        ({}, 128, (128, 64)),
        ({"window": 100}, 4096, (100, 50)),
        ({"window": 1024, "stride": 1024}, 4096, (1024, 1024)),
        ({"stride": 2}, 4096, (512, 2)),
    ],
)
def test_a_window_is_no_longer_than_the_context_unless_told(keys, context, sight):
    assert Measure(**keys).sight(context) == sight


@pytest.mark.parametrize("keys", [{"window": 8, "stride": 9}, {"tokens": 1}, {"window": 1}, {"text": {}}])
def test_what_makes_no_sense_is_refused(keys):
    with pytest.raises(ValidationError):
        Measure(**keys)
