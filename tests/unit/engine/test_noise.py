"""Dropout and NEFTune in training: the same however a step is cut, however often a run is, and never in validation."""

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.engine.loop import train
from llamero.engine.metrics import read_lines
from llamero.engine.noise import noise_of, rates
from llamero.kernels.cross_entropy import linear_cross_entropy
from llamero.model.dropout import Rates
from llamero.parallel.config import ParallelConfig

LIMA = {"dropout": {"hidden": 0.25, "lima": True}}
ALL = {"dropout": {"hidden": 0.2, "attention": 0.1}, "neftune": 5.0}


def run(model, data, stage, directory, *, micro_batch=0, validation=None, **more):
    parallel = ParallelConfig(micro_batch=micro_batch, device="cpu")
    held = None if validation is None else validation.batches(stage)
    outcome = train(model, data.batches(stage), stage, directory, parallel=parallel, validation=held, **more)
    return outcome, read_lines(directory / "metrics.jsonl")


def assert_same_bits(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Rates()),
        ({"dropout": {"hidden": 0.1}}, Rates(hidden=0.1, embedding=0.1)),
        ({"dropout": {"hidden": 0.1, "embedding": 0.0}}, Rates(hidden=0.1)),
        (LIMA, Rates(hidden=0.25, lima=True)),
        ({"dropout": {"attention": 0.2}, "neftune": 5}, Rates(attention=0.2, neftune=5.0)),
    ],
)
def test_what_a_stage_says_is_what_falls(make_stage, keys, expected):
    assert rates(make_stage(**keys)) == expected


def test_a_stage_without_noise_makes_none(make_data, make_stage):
    stage, cpu = make_stage(), torch.device("cpu")
    batch = make_data().batches(stage).assemble([0, 1])
    assert noise_of(batch, stage, layers=2, seed=0, step=0, device=cpu) is None


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_token_has_one_key_however_its_step_is_cut(make_data, make_stage, micro_batch, reverse):
    stage, cpu = make_stage(batch=6, **ALL), torch.device("cpu")
    batches = make_data(60).batches(stage)
    rows = batches.rows_of(3)

    def keys_of(rows):
        batch = batches.assemble(rows)
        noise = noise_of(batch, stage, layers=2, seed=1, step=3, device=cpu)
        assert noise is not None
        return dict(zip(batch.documents, noise.keys.split(batch.lengths), strict=True))

    parts = [rows[start : start + micro_batch] for start in range(0, 6, micro_batch)]
    found = [keys_of(part) for part in (parts[::-1] if reverse else parts)]
    for document, keys in keys_of(rows).items():
        (here,) = [part[document] for part in found if document in part]
        assert torch.equal(here, keys)


@pytest.mark.parametrize("keys", [LIMA, ALL], ids=["lima", "all"])
def test_k_small_batches_are_one_large_one_with_noise_too(make_model, make_stage, make_data, tmp_path, keys):
    data, stage = make_data(60), make_stage(batch=6, steps=5, lr=1e-3, **keys)
    whole, parts = make_model(), make_model()
    _, expected = run(whole, data, stage, tmp_path / "whole")
    _, lines = run(parts, data, stage, tmp_path / "parts", micro_batch=2)
    for line, one in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_with_noise_in_two_parts_ends_in_the_same_bits(make_model, make_stage, make_data, tmp_path, cut):
    data, stage = make_data(40), make_stage(steps=6, save_every=2, z_loss=1e-3, **ALL)
    whole, first, second = make_model(), make_model(), make_model()
    expected, _ = run(whole, data, stage, tmp_path / "whole")

    class CutOffError(Exception):
        pass

    calls = []

    def stop(module, inputs, output):
        calls.append(1)
        if len(calls) == cut:
            raise CutOffError

    first.model.norm.register_forward_hook(stop)
    with pytest.raises(CutOffError):
        run(first, data, stage, tmp_path / "parts")
    assert run(second, data, stage, tmp_path / "parts")[0] == expected
    assert_same_bits(whole, second)


@pytest.mark.parametrize("keys", [LIMA, ALL, {"z_loss": 0.1}], ids=["lima", "all", "z-loss"])
def test_validation_has_no_noise_and_no_z_loss(make_model, make_stage, make_data, tmp_path, keys):
    model, held = make_model(), make_data(17, seed=9)
    stage = make_stage(steps=2, **keys)
    outcome, _ = run(model, make_data(), stage, tmp_path, validation=held)
    batches = held.batches(stage)
    batch = batches.assemble(range(len(batches)))
    hidden = model.packed_hidden(batch.ids, batch.lengths)[batch.learned]
    loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.targets, batch.weights)
    assert outcome.validation_loss == pytest.approx(loss.item() / float(batch.weights.sum()), rel=1e-5)


@pytest.mark.parametrize("keys", [LIMA, ALL, {"z_loss": 0.1}], ids=["lima", "all", "z-loss"])
def test_noise_and_z_loss_change_what_is_trained(make_model, make_stage, make_data, tmp_path, keys):
    _, with_it = run(make_model(), make_data(), make_stage(**keys), tmp_path / "a")
    _, without = run(make_model(), make_data(), make_stage(), tmp_path / "b")
    assert abs(with_it[0]["loss"] - without[0]["loss"]) > 1e-4


def test_another_seed_or_step_drops_something_else(make_model, make_stage, make_data, tmp_path):
    data = make_data()
    stage = make_stage(steps=2, lr=1e-30, batch=len(data.batches(make_stage())), **LIMA)  # all there is, twice
    losses = [
        [line["loss"] for line in run(make_model(), data, stage, tmp_path / str(n), seed=seed)[1]]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)


def test_a_stage_goes_on_with_the_moments_of_the_one_before(make_model, make_stage, make_data, tmp_path):
    """Two stages are one where nothing but the optimizer is handed on: at a constant rate, with the same batches."""
    data = make_data()
    keys = {"batch": len(data.batches(make_stage())), "schedule": "constant"}  # all there is, in each step
    first = make_stage(steps=1, export_optimizer=True, **keys)
    second = make_stage(steps=1, optimizer="keep", **keys)
    parts, whole, fresh = make_model(), make_model(), make_model()
    for name, stage, start in (("a", first, None), ("b", second, tmp_path / "a")):
        run(parts, data, stage, tmp_path / name, start=start)
    run(whole, data, make_stage(steps=2, **keys), tmp_path / "whole")
    for name in ("c", "d"):
        run(fresh, data, first, tmp_path / name)
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(fresh.lm_head.weight, whole.lm_head.weight, atol=1e-4)
    assert not (tmp_path / "whole" / "optimizer").exists()


def test_moments_are_not_taken_again_when_a_stage_is_resumed(make_model, make_stage, make_data, tmp_path):
    data, first = make_data(), make_stage(export_optimizer=True)
    run(make_model(), data, first, tmp_path / "a")
    stage = make_stage(steps=4, save_every=2, optimizer="keep")
    whole, cut = make_model(), make_model()
    run(whole, data, stage, tmp_path / "whole", start=tmp_path / "a")

    def stop(module, inputs, output, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 4:
            raise KeyError

    hook = cut.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyError):
        run(cut, data, stage, tmp_path / "b", start=tmp_path / "a")
    hook.remove()
    run(cut, data, stage, tmp_path / "b", start=tmp_path / "a")
    assert_same_bits(whole, cut)


def test_a_first_stage_has_no_moments_to_keep(make_model, make_stage, make_data, tmp_path):
    with pytest.raises(LlameroError, match="no stage comes before this one"):
        run(make_model(), make_data(), make_stage(optimizer="keep"), tmp_path)


def test_a_decay_longer_than_the_epochs_is_refused(make_model, make_stage, make_data, tmp_path):
    stage = make_stage(epochs=1, schedule="wsd", decay=1000)
    with pytest.raises(LlameroError, match=r"1000 steps of `decay` are longer than the stage, which has \d"):
        run(make_model(), make_data(), stage, tmp_path)


def test_pieces_of_one_document_have_keys_of_their_own(make_data, make_stage):
    stage = make_stage(sequence=8, overlong="split", objective="lm", dropout={"hidden": 0.1})
    batches = make_data(20, texts=1.0).batches(stage)
    batch = batches.assemble(range(len(batches)))
    assert any(batch.starts)
    noise = noise_of(batch, stage, layers=2, seed=0, step=0, device=torch.device("cpu"))
    assert noise is not None
    assert len(noise.keys.unique()) == len(batch.ids)
