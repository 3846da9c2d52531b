import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llamero.core.errors import LlameroError
from llamero.engine.loop import train
from llamero.engine.metrics import read_lines
from llamero.kernels.cross_entropy import linear_cross_entropy
from llamero.parallel.config import ParallelConfig
from llamero.text.messages import Role

WEIGHT = {"assistant": 1.0, "text": 0.5, "user": 0.25, "system": 0.0, "context": 0.0}


def run(model, data, stage, directory, *, micro_batch=0, validation=None, seed=0):
    parallel = ParallelConfig(micro_batch=micro_batch, device="cpu")
    held = None if validation is None else validation.batches(stage, seed=seed)
    outcome = train(model, data.batches(stage, seed=seed), stage, directory, parallel=parallel, validation=held)
    return outcome, read_lines(directory / "metrics.jsonl")


def losses(model, tokens, roles):
    """Σ weight·nll and Σ weight of one document, from whole logits and torch's own cross-entropy."""
    ids = torch.as_tensor(tokens)
    nll = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    weight = torch.tensor([WEIGHT[Role(role).name.lower()] if role < 16 else 0.0 for role in roles[1:]])
    return (nll * weight).sum(), weight.sum()


def documents_of(batches, step):
    return batches.assemble(batches.rows_of(step)).documents


def naive(model, data, stage, steps):
    """Train document by document, with torch's plain AdamW and a schedule and a clip written out."""
    decay = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=stage.betas, eps=stage.eps, foreach=False)
    batches = data.batches(stage)
    said = []
    for step in range(steps):
        sums = [losses(model, data.tokens[number], data.roles[number]) for number in documents_of(batches, step)]
        loss = torch.stack([part for part, _ in sums]).sum() / sum(weight for _, weight in sums)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, stage.clip / (norm + 1e-6))
        if step < stage.warmup:
            rate = stage.lr * (step + 1) / stage.warmup
        else:
            done = (step - stage.warmup) / (steps - 1 - stage.warmup)
            rate = stage.min_lr + (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        said.append((loss.item(), norm, rate))
    return said


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_is_what_a_naive_loop_does(make_model, make_stage, make_data, tmp_path, tied):
    stage = make_stage(steps=8, warmup=3, min_lr=1e-3, weight_decay=0.1, clip=0.5, learn=WEIGHT)
    data, model, other = make_data(40), make_model(tied=tied), make_model(tied=tied)
    outcome, lines = run(model, data, stage, tmp_path, micro_batch=3)
    expected = naive(other, data, stage, 8)
    torch.testing.assert_close(
        [(line["loss"], line["grad_norm"], line["lr"]) for line in lines], expected, rtol=2e-5, atol=1e-7
    )
    assert max(norm for _, norm, _ in expected) > stage.clip
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()), rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert (outcome.steps, outcome.loss) == (8, lines[-1]["loss"])
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_k_small_batches_are_one_large_one(make_model, make_stage, make_data, tmp_path, micro_batch):
    data, stage = make_data(60), make_stage(batch=6, steps=5, learn=WEIGHT, lr=1e-3)
    whole, parts = make_model(), make_model()
    _, expected = run(whole, data, stage, tmp_path / "whole")
    _, lines = run(parts, data, stage, tmp_path / "parts", micro_batch=micro_batch)
    for line, one in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert (line["tokens"], line["supervised_tokens"]) == (one["tokens"], one["supervised_tokens"])
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), rtol=1e-5, atol=2e-6)


def test_packed_documents_have_the_losses_and_gradients_of_documents_alone(make_model, make_stage, make_data):
    model, data = make_model().double(), make_data(12)
    batches = data.batches(make_stage(sequence=64, batch=8, learn=WEIGHT))
    batch = batches.assemble(range(len(batches)))
    assert sorted(batch.documents) == list(range(12))
    assert len(batches) < 12
    hidden = model.packed_hidden(batch.ids, batch.lengths)[batch.learned]
    packed = linear_cross_entropy(hidden, model.lm_head.weight, batch.targets, batch.weights.double())
    packed.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(losses(model, data.tokens[number], data.roles[number])[0] for number in range(12))
    assert isinstance(alone, torch.Tensor)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_the_validation_loss_is_that_of_all_documents_together(make_model, make_stage, make_data, tmp_path):
    stage = make_stage(steps=3, eval_every=2, learn=WEIGHT)
    model, held = make_model(), make_data(17, seed=9)
    outcome, lines = run(model, make_data(30), stage, tmp_path, micro_batch=2, validation=held)
    with torch.no_grad():
        sums = [losses(model, tokens, roles) for tokens, roles in zip(held.tokens, held.roles, strict=True)]
    expected = float(sum(part for part, _ in sums) / sum(weight for _, weight in sums))
    assert lines[-1]["validation_loss"] == outcome.validation_loss == pytest.approx(expected, rel=1e-5)
    assert ["validation_loss" in line for line in lines] == [False, True, True]


def test_validation_pays_for_no_gradients(make_model):
    weight, hidden = make_model().lm_head.weight, torch.ones(10, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        linear_cross_entropy(hidden, weight, torch.arange(10), torch.ones(10))
    assert counted.get_total_flops() == 2 * hidden.numel() * len(weight)


def test_looking_and_saving_more_often_changes_no_bit(make_model, make_stage, make_data, tmp_path):
    data, models = make_data(30), [make_model(), make_model()]
    run(models[0], data, make_stage(), tmp_path / "a")
    run(models[1], data, make_stage(eval_every=1, save_every=1), tmp_path / "b", validation=make_data(9, seed=3))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_epochs_are_counted_by_rows_and_tokens(make_model, make_stage, make_data, tmp_path):
    data, stage = make_data(30), make_stage(epochs=2, batch=5)
    batches = data.batches(stage)
    outcome, lines = run(make_model(), data, stage, tmp_path)
    assert len(batches) * 2 % 5  # the last step has fewer rows
    assert outcome.steps == len(lines) == math.ceil(len(batches) * 2 / 5)
    assert outcome.tokens == 2 * batches.report.tokens
    assert outcome.supervised_tokens == 2 * batches.report.supervised_tokens


def test_no_clip_is_no_clip(make_model, make_stage, make_data, tmp_path):
    _, loose = run(make_model(), make_data(), make_stage(clip=0), tmp_path / "a")
    _, wide = run(make_model(), make_data(), make_stage(clip=1e9), tmp_path / "b")
    assert [line["loss"] for line in loose] == [line["loss"] for line in wide]


def test_a_warmup_longer_than_the_stage_is_refused(make_model, make_stage, make_data, tmp_path):
    with pytest.raises(LlameroError, match=r"`warmup: 100` is longer than the stage, which has \d steps"):
        run(make_model(), make_data(), make_stage(epochs=1, warmup=100), tmp_path)


def poisoned(data, number, token=63):
    """The same documents, but only one has a certain token."""
    for each, ids in enumerate(data.tokens):
        ids[ids == token] = 0
        if each == number:
            ids[0] = token
    return data


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_and_names_step_rows_and_documents(
    make_model, make_stage, make_data, tmp_path, value
):
    data, stage = poisoned(make_data(40), 11), make_stage(epochs=1, batch=1, save_every=1)
    batches, model = data.batches(stage), make_model()

    def poison(module, inputs, output):
        return output.masked_fill((inputs[0] == 63).unsqueeze(-1), value)

    model.model.embed_tokens.register_forward_hook(poison)
    bad = next(step for step in range(batches.steps) if 11 in documents_of(batches, step))
    assert bad > 0
    with pytest.raises(LlameroError) as told:
        run(model, data, stage, tmp_path)
    numbers = ", ".join(map(str, sorted(documents_of(batches, bad))[:8]))
    assert told.value.problem.startswith(f"the loss of step {bad + 1} is nan")
    assert f"rows {batches.rows_of(bad)[0]}; documents {numbers}" in told.value.problem
    assert told.value.where == "stage tiny"
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, bad + 1))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] == f"step-{bad:08}"


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_model, make_stage, make_data, tmp_path):
    model = make_model()
    calls = []

    def overflow(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == 3 else 1.0)

    model.model.norm.weight.register_hook(overflow)
    with pytest.raises(LlameroError, match=r"the loss of step 3 is \d.*, its gradient's norm (inf|nan)"):
        run(model, make_data(), make_stage(save_every=1), tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000002"


def test_a_rate_that_is_far_too_high_is_told(make_model, make_stage, make_data, tmp_path):
    with pytest.raises(LlameroError, match=r"step \d is (nan|inf)(?s:.*)lower `lr`"):
        run(make_model(), make_data(), make_stage(lr=1e38, clip=0), tmp_path)


def test_a_ruined_model_is_not_exported_when_validation_shows_it(make_model, make_stage, make_data, tmp_path):
    stage = make_stage(steps=1, lr=1e38, clip=0)
    with pytest.raises(LlameroError, match=r"the validation loss after step 1 is (nan|inf) \(rows 0"):
        run(make_model(), make_data(), stage, tmp_path, validation=make_data(9, seed=3))
    assert not (tmp_path / "checkpoints").exists()


def test_bfloat16_products_train_too(make_model, make_stage, make_data, tmp_path):
    model = make_model()
    _, lines = run(model, make_data(), make_stage(steps=6, precision="bfloat16"), tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(make_model, make_stage, make_data, tmp_path):
    seen = []
    for number, seed in enumerate((1, 1, 2)):
        model = make_model()
        run(model, make_data(), make_stage(), tmp_path / str(number), seed=seed)
        seen.append(np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]).tobytes())
    assert seen[0] == seen[1] != seen[2]
