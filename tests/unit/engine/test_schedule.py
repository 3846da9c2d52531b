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
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.1]),  # a fifth of six steps is one
    ],
)
def test_the_rate_rises_to_its_top_and_falls_to_its_end(schedule, by_hand):
    shape = stage(steps=6, lr=1.0, min_lr=0.1, warmup=2, schedule=schedule)
    assert [learning_rate(shape, step, steps=6) for step in range(6)] == pytest.approx(by_hand)


@pytest.mark.parametrize("decay", [4, 0.4], ids=["steps", "share"])
@pytest.mark.parametrize(("schedule", "left"), [("wsd", lambda x: 1 - x), ("wsd_sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd_is_level_and_falls_at_the_end(schedule, left, decay):
    shape = stage(lr=1.0, min_lr=0.2, warmup=2, schedule=schedule, decay=decay)
    falls = [0.2 + 0.8 * left(x) for x in (0.25, 0.5, 0.75, 1.0)]
    assert [learning_rate(shape, step, steps=10) for step in range(10)] == pytest.approx([0.5, *[1.0] * 5, *falls])


def test_wsd_may_fall_from_the_first_step_after_warmup():
    rates = [learning_rate(stage(steps=4, lr=1.0, warmup=1, schedule="wsd", decay=3), i, steps=4) for i in range(4)]
    assert rates == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


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
        ({"warmup": 11}, "`warmup: 11` is longer than the stage, which has 10 steps"),
        ({"schedule": "wsd", "decay": 11}, "11 steps of `decay` are longer than the stage, which has 10"),
        ({"schedule": "wsd", "decay": 0.5, "warmup": 6}, "`warmup: 6` and 5 steps of `decay` are longer"),
        ({"schedule": "wsd", "decay": 2.5}, "`decay` 2.5 is neither a whole number of steps nor a share"),
        ({"schedule": "wsd", "decay": 0}, "greater than 0"),
        ({"decay": 0.1}, "`decay` is for `schedule: wsd`, this one is `cosine`"),
        ({"batch_tokens": 4095}, "`batch_tokens` 4095 is less than one row of 4096"),
        ({"batch_tokens": 8192, "batch": 3}, "`batch` says 3 rows, `batch_tokens` 2: give one of them"),
        ({"dropout": {"hidden": 1.0}}, "less than 1"),
        ({"dropout": {"attention": -0.1}}, "greater than or equal to 0"),
        ({"dropout": {"embedding": 1.5}}, "less than 1"),
        ({"dropout": {"lima": True}}, "`lima` shapes `hidden`, which is 0"),
        (
            {"dropout": {"hidden": 0.1, "lima": True, "embedding": 0.1}},
            "embeddings are not dropped, but `embedding` is",
        ),
        ({"z_loss": -1e-4}, "greater than or equal to 0"),
        ({"neftune": -5}, "greater than or equal to 0"),
        ({"optimizer": "kept"}, "'fresh' or 'keep'"),
        ({"name": "Stage 1"}, "pattern"),
        ({"sequence": 4}, "greater than or equal to 8"),
        ({"learn": {"assistent": 1}}, "not permitted"),
        ({"learn": {"user": -1}}, "greater than or equal to 0"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        stage(**keys)


def test_a_batch_in_tokens_is_as_many_rows_as_fit():
    assert stage(batch_tokens=10_000, sequence=1024).batch == 9
    assert stage(batch_tokens=4096).batch == 1
    written = stage(batch_tokens=10_000, sequence=1024)
    assert StageConfig.model_validate(written.model_dump(mode="json")) == written


def test_a_batch_in_samples_is_at_most_as_many_rows():
    assert stage(batch_samples=9).batch == 9
    written = stage(batch_samples=9)
    assert StageConfig.model_validate(written.model_dump(mode="json")) == written
    for keys, says in (({"batch": 4}, "`batch` says 4 rows, `batch_samples` 9"), ({"batch_tokens": 9999}, "both say")):
        with pytest.raises(ValidationError, match=says):
            stage(batch_samples=9, **keys)


def test_how_often_we_look_and_save_does_not_decide_the_weights():
    assert stage(save_every=1, eval_every=3).decides() == stage().decides()
    assert stage(lr=2e-5).decides() != stage().decides()
    assert stage(learn=Learn(user=1)).decides() != stage().decides()


def test_each_objective_has_its_own_way_with_long_samples():
    assert stage().policy == "error"
    assert stage(objective="lm").policy == "split"
    assert stage(objective="lm", overlong="drop").policy == "drop"
