"""TensorBoard and wandb read metrics.jsonl; nothing is written for them while training."""

import json

import pytest

from llamero.core.errors import LlameroError
from llamero.engine.watch import tagged, watch


@pytest.fixture
def run(tmp_path):
    for stage, losses in (("train-lm-123456789abc", (3.0, 2.0)), ("train-sft-abcdef123456.partial", (1.5,))):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"step": i + 1, "loss": loss, "lr": 0.1}) for i, loss in enumerate(losses)]
        if len(lines) == 2:
            more = {"loss/books": 1.0, "validation_loss": 2.5, "validation_loss/books": 2.0, "probe_accuracy": 0.5}
            lines[1] = json.dumps(json.loads(lines[1]) | more | {"time/data": 0.1})
            probe = {"step": 2, "probe_accuracy": 0.5, "samples": [{"prompt": "why?", "text": "because\nso"}]}
            (tmp_path / stage / "probes.jsonl").write_text(json.dumps(probe) + "\n")
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_every_step_of_every_stage(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert watch(run, "tensorboard", follow=False) == 3
    events = EventAccumulator(str(run / "tensorboard" / "train-lm-123456789abc"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]
    assert (run / "tensorboard" / "train-sft-abcdef123456").is_dir()
    tags = set(events.Tags()["scalars"])
    assert tags == {
        "train/loss",
        "train/lr",
        "source/books",
        "val/loss",
        "val_source/books",
        "probe/accuracy",
        "time/data",
    }
    (text,) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("probe/0/text_summary")]
    assert text == "**why?**\n\n> because\n> so"


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


def test_every_key_of_a_line_has_a_group():
    line = {"step": 3, "loss": 1, "loss/a": 2, "validation_accuracy/a": 3, "tokens_per_second_per_gpu": 4, "mfu": 5}
    line |= {"memory_gib": 6, "slowest/data": 7, "grad_norm": 8, "validation_accuracy": 9}
    assert tagged(line) == {
        "train/loss": 1,
        "source/a": 2,
        "val_source_accuracy/a": 3,
        "speed/tokens_per_second_per_gpu": 4,
        "speed/mfu": 5,
        "memory/allocated_gib": 6,
        "slowest/data": 7,
        "train/grad_norm": 8,
        "val/accuracy": 9,
    }


@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_network_keeps_everything_here(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shown = []
    log = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, data, step: (shown.append((step, data)), log(self, data, step)))
    assert watch(run, "wandb", follow=False) == 3
    assert [step for step, _ in shown] == [1, 2, 1]
    assert shown[0][1] == {"train/loss": 3.0, "train/lr": 0.1}
    assert shown[1][1]["val_source/books"] == 2.0
    assert shown[1][1]["probe/answers"].data == [["why?", "because\nso"]]
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 2
