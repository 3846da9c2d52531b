"""What is saved, when, how much of it is kept, and what is said when it cannot be."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from llamero.core.errors import LlameroError
from llamero.engine import resume, saving
from llamero.engine.loop import train
from llamero.engine.metrics import read_lines
from llamero.engine.optimizer import adamw
from llamero.engine.saving import Saver
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World


def world(**keys):
    return World(ParallelConfig(device="cpu", **keys))


@pytest.fixture
def trained(make_model, make_stage):
    """A model of which every number is 1, and an optimizer with moments."""
    model = make_model()
    optimizer = adamw(model, make_stage())
    model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model, optimizer


@pytest.fixture
def make_saver(trained, make_stage, tmp_path):
    model, optimizer = trained

    def make(parallel=None, **keys):
        weights = dict(model.named_parameters())
        return Saver(tmp_path, make_stage(**keys), weights=weights, optimizer=optimizer, world=world(**parallel or {}))

    return make


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this is set."""
    event, original = threading.Event(), FileSystemWriter.write_data

    def wait(*arguments):
        assert event.wait(30)
        return original(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait)
    return event


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(make_saver, trained, held, tmp_path):
    model, optimizer = trained
    with make_saver() as saver:
        saver.save(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(2.0)
        saver.look()
        assert names(tmp_path) == ["step-00000002.partial"]
        held.set()
    assert names(tmp_path) == ["step-00000002"]
    resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=world())
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_a_second_save_waits_for_the_first(make_saver, held, tmp_path):
    with make_saver() as saver:
        saver.save(2)
        threading.Timer(0.2, held.set).start()
        saver.save(4)
        assert held.is_set()
        assert "step-00000002" in names(tmp_path)


def test_in_the_foreground_saving_is_done_when_it_returns_and_takes_no_copies(make_saver, trained, tmp_path):
    saver = make_saver(parallel={"save_in_background": False})
    saver.save(2)
    assert names(tmp_path) == ["step-00000002"]
    mine = {parameter.data_ptr() for parameter in trained[0].parameters()}
    assert mine <= {tensor.data_ptr() for tensor in saver._planner._taken.values()}


def test_the_next_look_names_a_checkpoint_that_is_written(make_saver, tmp_path):
    saver = make_saver()
    saver.save(2)
    saver._pending.part.join()
    saver.look()
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(make_saver, tmp_path, keep):
    with make_saver(keep=keep) as saver:
        for step in (1, 2, 9, 10):
            saver.save(step)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000009", "step-00000010"][-keep:]


def test_the_best_is_kept_beside_the_last_ones(make_saver, tmp_path):
    keys = {"keep": 1, "keep_best": True, "eval_every": 1}
    with make_saver(**keys) as saver:
        for step, loss in ((1, 3.0), (2, 1.5), (3, None), (4, 1.5), (5, 2.0)):
            saver.save(step, loss)
    assert names(tmp_path) == ["step-00000002", "step-00000005"]
    saver = make_saver(**keys)  # of a run that goes on
    assert not saver.wants(6, 1.5)
    assert saver.wants(6, 1.4)
    assert saver.wants(200, None)


def test_a_removal_that_was_cut_off_is_no_checkpoint_and_is_finished(make_saver, trained, tmp_path):
    model, optimizer = trained
    with make_saver() as saver:
        saver.save(2)
    (tmp_path / "step-00000001.removed").mkdir()
    assert resume.finished(tmp_path) == [tmp_path / "step-00000002"]
    resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=world())
    assert names(tmp_path) == ["step-00000002"]


def fail(error):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.parametrize("method", ["write_data", "finish"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(make_saver, tmp_path, monkeypatch, number, method):
    with make_saver() as saver:
        saver.save(2)
    monkeypatch.setattr(FileSystemWriter, method, fail(OSError(number, os.strerror(number))))
    saver = make_saver()
    saver.save(4)
    with pytest.raises(LlameroError, match="no room to write") as told:
        saver.wait()
    assert "step-00000004" in str(told.value)
    assert "what was finished before is kept" in told.value.problem
    assert names(tmp_path) == ["step-00000002"]
    saver.wait()  # it was told once


@pytest.mark.slow
def test_a_really_full_disk_is_seen_through_what_torch_makes_of_it(tmp_path):
    """A limit on file sizes, in a process of its own."""
    program = f"""
import resource, signal, torch
from pathlib import Path
from llamero.core.errors import LlameroError
from llamero.engine.saving import Saver
from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World
weight = torch.nn.Parameter(torch.ones(300_000))
optimizer = torch.optim.AdamW([weight])
weight.grad = torch.ones_like(weight)
optimizer.step()
stage = StageConfig.model_validate({{"name": "x", "mixture": "x", "steps": 1}})
world = World(ParallelConfig(device="cpu"))
saver = Saver(Path({str(tmp_path / "full")!r}), stage, weights={{"w": weight}}, optimizer=optimizer, world=world)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
saver.save(1)
try:
    saver.wait()
except LlameroError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "no room to write (File too large)" in done.stdout, done.stderr
    assert names(tmp_path / "full") == []


def test_what_else_goes_wrong_while_writing_is_told(make_saver, monkeypatch):
    monkeypatch.setattr(FileSystemWriter, "write_data", fail(PermissionError(errno.EACCES, "Permission denied")))
    saver = make_saver()
    saver.save(4)
    with pytest.raises(LlameroError, match=r"could not be written \(Permission denied\); those before it are kept"):
        saver.wait()


@pytest.mark.parametrize("what", ["weight", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_never_saved(make_saver, trained, tmp_path, what, value):
    model, optimizer = trained
    with make_saver() as saver:
        saver.save(2)
    norm = model.model.norm.weight
    tensor = norm.data if what == "weight" else optimizer.state[norm][what]
    tensor[3] = value
    saver = make_saver()
    saver.save(4)
    named = "model.norm.weight" if what == "weight" else "optimizer.model.norm.weight.exp_avg_sq"
    with pytest.raises(LlameroError, match=f"`{named}` has numbers that are not finite.*are kept"):
        saver.wait()
    assert names(tmp_path) == ["step-00000002"]


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(make_saver, trained, tmp_path, monkeypatch):
    model, optimizer = trained
    optimizer.state[model.model.norm.weight]["exp_avg"][0] = float("nan")
    monkeypatch.setattr(saving, "finite", lambda tensor: True)
    with make_saver() as saver:
        saver.save(2)
    monkeypatch.undo()
    with pytest.raises(LlameroError, match=r"`optimizer\.model\.norm\.weight\.exp_avg` of the checkpoint.*not finite"):
        resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=world())


def test_a_run_that_breaks_off_does_not_wait_for_a_checkpoint(make_saver, tmp_path):
    saver = make_saver()
    saver.save(2)
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
    assert not saver._pending.part.is_alive()
    assert names(tmp_path) == ["step-00000002.partial"]


@pytest.mark.parametrize("error", [LlameroError("the loss is nan"), KeyError("a bug")])
def test_an_error_waits_for_the_checkpoint_before_it(make_saver, held, tmp_path, error):
    saver = make_saver()
    saver.save(2)
    threading.Timer(0.1, held.set).start()
    with pytest.raises(type(error)), saver:
        raise error
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        (None, "file is missing"),
        ("{", "not valid JSON"),
        ("{}", "does not say what"),
        ('{"step": "x", "sha256": {}}', "does not say what"),
        ('{"step": 2, "sha256": []}', "does not say what"),
        ('{"step": 3, "sha256": {}}', "the checkpoint says step 3"),
    ],
)
def test_a_directory_that_is_no_whole_checkpoint_is_named_with_the_way_out(
    make_saver, trained, tmp_path, about, problem
):
    model, optimizer = trained
    with make_saver() as saver:
        saver.save(1)
        saver.save(2)
    state = tmp_path / "step-00000002" / "state.json"
    state.unlink()
    if about is not None:
        state.write_text(about)
    weights = dict(model.named_parameters())
    with pytest.raises(LlameroError, match=problem) as told:
        resume.load(tmp_path, weights=weights, optimizer=optimizer, world=world())
    assert str(tmp_path / "step-00000002") in str(told.value.where)
    assert "remove this directory" in str(told.value.fix)
    shutil.rmtree(tmp_path / "step-00000002")
    assert resume.load(tmp_path, weights=weights, optimizer=optimizer, world=world()) == 1


def test_every_file_of_a_checkpoint_has_its_checksum(make_saver, trained, tmp_path):
    model, optimizer = trained
    with make_saver() as saver:
        saver.save(2)
    directory = tmp_path / "step-00000002"
    sums = json.loads((directory / "state.json").read_text())["sha256"]
    assert {*sums, "state.json"} == set(names(directory))
    for name in sums:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)
        with pytest.raises(LlameroError, match=f"{name}: not what was written"):
            resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=world())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)


@pytest.mark.parametrize("key", ["keep_best", "export_best"])
def test_the_best_needs_validations_to_choose_among(make_stage, key):
    with pytest.raises(ValidationError, match=f"`{key}` needs `eval_every`"):
        make_stage(**{key: True})


def test_what_is_kept_decides_nothing_and_what_is_exported_does(make_stage):
    plain = make_stage().decides()
    assert make_stage(keep=5, keep_best=True, eval_every=2, save_every=1).decides() == plain
    best = make_stage(export_best=True, eval_every=2)
    assert best.decides() != plain
    assert best.decides() != make_stage(export_best=True, eval_every=1).decides()


@pytest.fixture
def overfit(make_model, make_stage, make_data, tmp_path):
    """Train far too fast, so that the best validation is not the last; return the metrics and what is exported."""

    def run(name, **keys):
        about = {"steps": 12, "eval_every": 2, "save_every": 5, "lr": 0.05, "schedule": "constant", **keys}
        model, stage, exported = make_model(), make_stage(**about), {}

        def export(spread):
            exported.update({name: tensor.clone() for name, tensor in spread.whole()})

        held = make_data(9, seed=3).batches(stage)
        batches, parallel = make_data(30).batches(stage), ParallelConfig(device="cpu")
        outcome = train(model, batches, stage, tmp_path / name, parallel=parallel, validation=held, export=export)
        return read_lines(tmp_path / name / "metrics.jsonl"), exported, outcome

    return run


def test_the_best_checkpoint_becomes_the_model(overfit, tmp_path):
    lines, best, outcome = overfit("best", export_best=True, keep=1)
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    step = min(losses, key=lambda step: losses[step])
    assert 2 <= step < 12
    assert names(tmp_path / "best" / "checkpoints") == [f"step-{step:08}", "step-00000012"]
    assert (outcome.steps, outcome.exported_step, outcome.validation_loss) == (12, step, losses[step])
    assert outcome.loss == lines[step - 1]["loss"]
    _, expected, _ = overfit("short", steps=step)
    _, last, _ = overfit("last")
    for name, value in expected.items():
        assert torch.equal(best[name], value), name
    assert any(not torch.equal(best[name], value) for name, value in last.items())


def test_a_disk_too_small_for_what_will_be_kept_is_refused_before_the_first_step(overfit, monkeypatch, tmp_path):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LlameroError, match=r"the disk is too small for the checkpoints and the model of stage tiny"):
        overfit("small")
    assert not (tmp_path / "small").exists()


def test_the_room_that_is_asked_for_is_that_of_all_checkpoints_at_once(overfit, make_model, monkeypatch):
    """Three saves, two are kept while the third is written: weights and two moments of each."""
    needed = 3 * 3 * 4 * sum(parameter.numel() for parameter in make_model().parameters())
    free = [needed - 1, needed]
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(LlameroError, match="the disk is too small"):
        overfit("small")
    overfit("large")
