"""TensorBoard and wandb read metrics.jsonl; nothing is written for them while training."""

import json

import pytest

from llamero.core.errors import LlameroError
from llamero.engine.watch import watch


@pytest.fixture
def run(tmp_path):
    for stage, losses in (("train-lm-123456789abc", (3.0, 2.0)), ("train-sft-abcdef123456.partial", (1.5,))):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"step": i + 1, "loss": loss, "lr": 0.1}) for i, loss in enumerate(losses)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_every_step_of_every_stage(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert watch(run, "tensorboard", follow=False) == 3
    events = EventAccumulator(str(run / "tensorboard" / "train-lm-123456789abc"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert (run / "tensorboard" / "train-sft-abcdef123456").is_dir()


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LlameroError, match="no such run directory"):
        watch(tmp_path / "none", "tensorboard", follow=False)


def test_an_unknown_board_is_refused(run):
    with pytest.raises(LlameroError) as caught:
        watch(run, "tensorbord", follow=False)
    assert caught.value.fix == "did you mean `tensorboard`?"


def test_wandb_that_is_not_installed_says_how_to_get_it(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LlameroError, match="wandb is not installed") as caught:
        watch(run, "wandb", follow=False)
    assert "llamero[observe]" in str(caught.value.fix)
