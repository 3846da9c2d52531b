import shutil

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.engine import resume
from llamero.engine.loop import train
from llamero.engine.metrics import read_lines
from llamero.engine.optimizer import adamw
from llamero.engine.saving import Saver
from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World

ALONE = World(ParallelConfig(device="cpu"))


@pytest.fixture
def trained(make_model, make_stage):
    """A model and its optimizer after two steps."""

    def make(seed=0):
        model = make_model(seed=seed, tied=True)
        optimizer = adamw(model, make_stage())
        for _ in range(2):
            model(torch.arange(12)[None]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return make


def save(directory, step, model, optimizer, validation_loss=None, **keys):
    stage = StageConfig.model_validate({"name": "tiny", "mixture": "chat", "steps": 4, **keys})
    weights = dict(model.named_parameters())
    with Saver(directory, stage, weights=weights, optimizer=optimizer, world=ALONE) as saver:
        saver.save(step, validation_loss)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_brings_everything_back_bit_by_bit(trained, make_model, make_stage, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 7, model, optimizer)
    other = make_model(seed=5, tied=True)
    again = adamw(other, make_stage())
    assert resume.load(tmp_path, weights=dict(other.named_parameters()), optimizer=again, world=ALONE) == 7
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert optimizer.state[one].keys() == again.state[two].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, again.state[two][key]), (name, key)


def test_without_a_checkpoint_one_starts_at_the_beginning(trained, tmp_path):
    model, optimizer = trained()
    assert resume.load(tmp_path / "none", weights=dict(model.named_parameters()), optimizer=optimizer, world=ALONE) == 0


def test_only_the_last_two_are_kept(trained, tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 10, 100):
        save(tmp_path, step, model, optimizer)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=ALONE) == 100


def test_a_half_written_checkpoint_is_no_checkpoint(trained, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    half = tmp_path / "step-00000006.partial"
    shutil.copytree(tmp_path / "step-00000003", half)
    assert resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=ALONE) == 3
    save(tmp_path, 6, model, optimizer)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_a_renamed_checkpoint_is_refused(trained, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000004")
    with pytest.raises(LlameroError, match="the checkpoint says step 3"):
        resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=ALONE)


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    weights = next((tmp_path / "step-00000003").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(LlameroError, match="step-00000003"):
        resume.load(tmp_path, weights=dict(model.named_parameters()), optimizer=optimizer, world=ALONE)


def test_a_checkpoint_of_another_model_is_refused(trained, make_model, make_stage, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other = make_model(tied=False)
    with pytest.raises(LlameroError, match="a model of another shape"):
        resume.load(tmp_path, weights=dict(other.named_parameters()), optimizer=adamw(other, make_stage()), world=ALONE)


def test_removing_is_done_at_one_stroke(trained, tmp_path):
    model, optimizer = trained()
    directory = tmp_path / "checkpoints"
    save(directory, 3, model, optimizer)
    (tmp_path / "checkpoints.removed").mkdir()  # of a removal that was cut off
    resume.remove(directory)
    assert names(tmp_path) == []
    resume.remove(directory)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_run_in_two_parts_ends_in_the_same_bits(make_model, make_stage, make_data, tmp_path, cut):
    data, stage = make_data(40), make_stage(steps=6, save_every=2, warmup=2)

    def run(directory, model):
        batches = data.batches(stage)
        return train(model, batches, stage, directory, parallel=ParallelConfig(device="cpu"))

    whole = make_model()
    expected = run(tmp_path / "whole", whole)

    class CutOffError(Exception):
        pass

    def stop(module, inputs, output, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == cut:
            raise CutOffError

    first, second = make_model(), make_model()
    first.model.norm.register_forward_hook(stop)
    with pytest.raises(CutOffError):
        run(tmp_path / "parts", first)
    assert run(tmp_path / "parts", second) == expected
    for (name, one), two in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two[1]), name
    lines = [read_lines(tmp_path / part / "metrics.jsonl") for part in ("whole", "parts")]
    decided = [[(line["step"], line["loss"], line["grad_norm"]) for line in part] for part in lines]
    assert decided[0] == decided[1]
    assert [step for step, _, _ in decided[1]] == [1, 2, 3, 4, 5, 6]
