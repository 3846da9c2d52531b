import pytest

from llamero.core.errors import LlameroError
from llamero.engine.stage import StageConfig
from llamero.plan.data import FILL, Said, of_stage, sayings
from llamero.recipe.schema import Recipe


def recipe(**stage):
    keys = {"name": "sft", "mixture": "chat", **stage}
    return Recipe.model_validate(
        {
            "name": "x",
            "base": "owner/name",
            "data": {"mixtures": {"chat": {"sources": [{"source": "a", "path": "a.jsonl"}]}}},
            "train": [keys],
        }
    )


def known(tmp_path, said=None, **stage):
    made = recipe(**stage)
    return of_stage(made.train[0], made, tmp_path, said)


def test_what_is_said_is_read():
    assert Said.parse("stage1=375,772,920/793569") == ("stage1", Said(375_772_920, 793_569))
    assert Said.parse("sft=1000") == ("sft", Said(1000))
    for wrong in ("sft", "sft=", "sft=x", "=5", "sft=5/0", "sft=5/6", "sft=0"):
        with pytest.raises(LlameroError, match=r"is not STAGE=TOKENS"):
            Said.parse(wrong)
    with pytest.raises(LlameroError, match="no stage `stf`"):
        sayings(["stf=5"], recipe(steps=1))


def test_the_published_mixtures_of_oasst_70b(tmp_path):
    """The card's sizes, and what its own trainer made of them: 64 dialogues, each padded to a row of its own."""
    stage = {"steps": 12_000, "batch_samples": 64, "sequence": 4096}
    first = known(tmp_path, Said(375_772_920, 793_569), **stage)
    assert (first.rows, first.steps) == (8, 12_000)
    assert round(first.step_tokens) == 30_305
    assert first.tokens == round(12_000 * 64 * 375_772_920 / 793_569)
    second = known(tmp_path, Said(5_315_368, 11_441), epochs=3, batch_samples=64, sequence=4096)
    assert second.steps == 537  # 3 · 11,441 / 64, the validation part of the card's 519 included
    assert second.tokens == pytest.approx(3 * 5_315_368, rel=0.002)


def test_epochs_become_steps_where_the_tokens_are_said(tmp_path):
    data = known(tmp_path, Said(1_000_000), epochs=2, batch=8, sequence=1000)
    assert data.steps == -(-2_000_000 // (8000 * FILL))
    assert data.tokens == pytest.approx(2_000_000, rel=0.01)


def test_epochs_of_unknown_data_stay_unknown_and_it_is_said_what_would_tell(tmp_path):
    data = known(tmp_path, epochs=2, batch=8)
    assert (data.steps, data.tokens) == (None, None)
    assert any("--tokens" in note and "llamero data tokenize" in note for note in data.notes)
    assert known(tmp_path, steps=7, batch=8, sequence=100).tokens == 7 * 800


def test_samples_that_are_longer_than_a_row_see_no_more_than_a_row(tmp_path):
    assert known(tmp_path, Said(10_000, 1), steps=1, batch=1, sequence=64).attended == 32.5
    assert StageConfig(name="a", mixture="b", steps=1).sequence == 4096
