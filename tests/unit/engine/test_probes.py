"""Probes ask what scoring would, change no bit of training, and each step's answers are written once."""

import numpy as np
import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.engine.loop import train
from llamero.engine.metrics import Sample, read_lines, read_probes
from llamero.engine.probes import Probe
from llamero.infer.likelihood import log_likelihoods
from llamero.parallel.config import ParallelConfig

RANDOM = np.random.default_rng(4)
QUESTIONS = [
    [(context, RANDOM.integers(0, 64, length).tolist()) for length in lengths]
    for lengths in ((1, 3), (2, 2, 5), (4, 1))
    for context in [RANDOM.integers(0, 64, 6).tolist()]
]


class CutOffError(Exception):
    pass


def run(model, data, stage, directory, *, cut=0, asked=None):
    """Train with a probe every second step; what was asked is appended to `asked`."""
    calls = [0]

    def judge(found):
        if asked is not None:
            asked.append([list(values) for values in found])
        return {"probe_accuracy": len(found) / 4}

    def speak(spread) -> list[Sample]:
        calls[0] += 1
        if calls[0] == cut:
            raise CutOffError
        return [{"prompt": "hi", "text": f"{float(spread.named()['model.norm.weight'].detach().sum()):.9f}"}]

    probe = None if asked is None else Probe(2, QUESTIONS, judge, speak)
    parallel = ParallelConfig(device="cpu", micro_batch=1)
    return train(model, data.batches(stage), stage, directory, parallel=parallel, probe=probe)


def test_questions_are_scored_as_inference_scores_them(make_model, make_stage, make_data, tmp_path):
    model, asked = make_model(), []
    run(model, make_data(30), make_stage(steps=3, min_lr=1e-3, dropout={"hidden": 0.5}), tmp_path, asked=asked)
    expected = [[each.log_likelihood for each in log_likelihoods(model, answers)] for answers in QUESTIONS]
    assert len(asked) == 2  # after the second and the last step
    for ours, theirs in zip(asked[-1], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert asked[0] != asked[1]


def test_a_probe_changes_no_bit_of_training(make_model, make_stage, make_data, tmp_path):
    data, stage, models = make_data(30), make_stage(steps=5, dropout={"hidden": 0.3}), [make_model(), make_model()]
    run(models[0], data, stage, tmp_path / "without")
    run(models[1], data, stage, tmp_path / "with", asked=[])
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("without", "with")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert ["probe_accuracy" in line for line in lines[1]] == [False, True, False, True, True]
    assert [line["step"] for line in read_probes(tmp_path / "with" / "probes.jsonl")] == [2, 4, 5]
    assert not (tmp_path / "without" / "probes.jsonl").exists()


@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_a_run_that_is_cut_off_asks_and_writes_each_step_once(make_model, make_stage, make_data, tmp_path, save_every):
    data, stage = make_data(30), make_stage(steps=6, save_every=save_every)
    run(make_model(), data, stage, tmp_path / "whole", asked=[])
    with pytest.raises(CutOffError):
        run(make_model(), data, stage, tmp_path / "parts", cut=3, asked=[])
    run(make_model(), data, stage, tmp_path / "parts", asked=[])
    whole, parts = (read_probes(tmp_path / name / "probes.jsonl") for name in ("whole", "parts"))
    assert parts == whole
    assert [line["step"] for line in parts] == [2, 4, 6]


def test_a_question_that_is_too_long_is_refused_before_the_first_step(make_model, make_stage, make_data, tmp_path):
    probe = Probe(2, [[([1] * 40, [2]), ([1], [3])]], lambda _: {}, lambda _: [])
    stage = make_stage()
    with pytest.raises(LlameroError, match="41 tokens, `sequence` is 32") as caught:
        train(
            make_model(),
            make_data().batches(stage),
            stage,
            tmp_path,
            parallel=ParallelConfig(device="cpu"),
            probe=probe,
        )
    assert caught.value.where == "probe of stage tiny"
    assert not read_lines(tmp_path / "metrics.jsonl")
