import math

import pytest
from pydantic import ValidationError

from llamero.engine.schedule import SHAPES, learning_rate
from llamero.engine.stage import Learn, StageConfig


def stage(**keys):
    return StageConfig.model_validate({"name": "s", "mixture": "m", "steps": 10, **keys})


@pytest.mark.parametrize(
    ("schedule", "by_hand"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 0.1 + 0.9 * 2 / 3, 0.1 + 0.9 / 3, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_rises_to_its_top_and_falls_to_its_end(schedule, by_hand):
    shape = stage(steps=6, lr=1.0, min_lr=0.1, warmup=2, schedule=schedule)
    assert [learning_rate(shape, step, steps=6) for step in range(6)] == pytest.approx(by_hand)


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert learning_rate(stage(lr=1.0), 0, steps=10) == 1.0
    assert learning_rate(stage(lr=1.0), 9, steps=10) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(stage(lr=1.0), 0, steps=1) == 1.0  # a stage of one step learns


def test_a_stage_may_be_all_warmup():
    rates = [learning_rate(stage(steps=4, warmup=4, lr=1.0), step, steps=4) for step in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", SHAPES)
def test_no_shape_leaves_its_bounds(name):
    shape = stage(schedule=name, lr=3e-4, min_lr=3e-5, warmup=7)
    rates = [learning_rate(shape, step, steps=101) for step in range(7, 101)]
    assert all(3e-5 - 1e-12 <= rate <= 3e-4 + 1e-12 for rate in rates)
    assert all(math.isfinite(rate) for rate in rates)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"epochs": 1}, "give `steps` or `epochs`"),
        ({"steps": None}, "give `steps` or `epochs`"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "`min_lr` 0.0001 is above `lr`"),
        ({"warmup": 11}, "`warmup` 11 is longer than `steps` 10"),
        ({"name": "Stage 1"}, "pattern"),
        ({"sequence": 4}, "greater than or equal to 8"),
        ({"learn": {"assistent": 1}}, "not permitted"),
        ({"learn": {"user": -1}}, "greater than or equal to 0"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        stage(**keys)


def test_how_often_we_look_and_save_does_not_decide_the_weights():
    assert stage(save_every=1, eval_every=3).decides() == stage().decides()
    assert stage(lr=2e-5).decides() != stage().decides()
    assert stage(learn=Learn(user=1)).decides() != stage().decides()


def test_each_objective_has_its_own_way_with_long_samples():
    assert stage().policy == "error"
    assert stage(objective="lm").policy == "split"
    assert stage(objective="lm", overlong="drop").policy == "drop"
