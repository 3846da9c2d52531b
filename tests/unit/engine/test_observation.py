"""What a line of metrics says, against a walk over the documents; arithmetic against torch's own counter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from llamero.checkpoint.hf import Spec
from llamero.core.hardware import accelerator
from llamero.corpus.dataset import Sources
from llamero.engine import loop, work
from llamero.engine.batches import Batches
from llamero.engine.loop import train
from llamero.engine.metrics import decided, read_lines
from llamero.engine.phases import PHASES, Phases, largest
from llamero.kernels.cross_entropy import plain
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import attach
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World
from llamero.text.messages import Role

LEARN = {"assistant": 1.0, "text": 0.5, "user": 0.25, "system": 0.0, "context": 0.0}
SOURCES = Sources(("chats", "none", "books"), (11, 11, 30))


def batches(data, stage, sources: Sources | None = SOURCES):
    return Batches(data.tokens, data.roles, stage, seed=0, where="here", sources=sources)


def run(model, data, held, stage, directory, *, sources: Sources | None = SOURCES, micro_batch=0):
    parallel = ParallelConfig(device="cpu", micro_batch=micro_batch)
    made, validation = batches(data, stage, sources), batches(held, stage, sources)
    outcome = train(model, made, stage, directory, parallel=parallel, validation=validation)
    return outcome, read_lines(directory / "metrics.jsonl")


@torch.no_grad()
def walk(model, data, documents):
    """Σ weight·nll, Σ weight, right and supervised tokens of each source, document by document."""
    sums = {}
    for number in documents:
        ids = torch.as_tensor(data.tokens[number])
        logits = model(ids[None, :-1])[0]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        codes = data.roles[number][1:]
        weight = torch.tensor([LEARN[Role(code).name.lower()] if code < 16 else 0.0 for code in codes])
        right = (logits.argmax(-1) == ids[1:]) & (weight > 0)
        name = SOURCES.names[int(number >= 11) * 2]
        found = torch.tensor([(nll * weight).sum(), weight.sum(), right.sum(), (weight > 0).sum()]).double()
        sums[name] = sums.get(name, 0) + found
    return {name: found.tolist() for name, found in sums.items()}


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_losses_and_accuracies_of_each_source_are_those_of_its_documents(
    make_model, make_stage, make_data, tmp_path, micro_batch
):
    stage = make_stage(steps=2, learn=LEARN, lr=1e-9, batch=3, z_loss=0.01, eval_every=1)
    data, held, model = make_data(30), make_data(30, seed=5), make_model()
    outcome, lines = run(model, data, held, stage, tmp_path, micro_batch=micro_batch)
    for step, line in enumerate(lines):
        found = walk(model, data, batches(data, stage).assemble(batches(data, stage).rows_of(step)).documents)
        expected = {f"loss/{name}": nll / weight for name, (nll, weight, _, _) in found.items()}
        assert {key: line[key] for key in line if key.startswith("loss/")} == pytest.approx(expected, rel=1e-5)
        assert line["loss"] > sum(nll for nll, *_ in found.values()) / sum(w for _, w, *_ in found.values())  # z-loss
    found = walk(model, held, range(30))
    assert set(found) == {"chats", "books"}
    for name, (nll, weight, right, supervised) in found.items():
        assert lines[-1][f"validation_loss/{name}"] == pytest.approx(nll / weight, rel=1e-5)
        assert lines[-1][f"validation_accuracy/{name}"] == pytest.approx(right / supervised)
    right, supervised = (sum(values[at] for values in found.values()) for at in (2, 3))
    assert outcome.validation_accuracy == lines[-1]["validation_accuracy"] == pytest.approx(right / supervised)
    assert not any("none" in key for key in lines[-1])


def test_a_model_that_knows_its_text_is_right(make_model, make_stage, make_data, tmp_path):
    data = make_data(4)
    stage = make_stage(steps=60, lr=3e-2, objective="lm", batch=4)
    outcome, _ = run(make_model(), data, data, stage, tmp_path, sources=None)
    assert outcome.validation_accuracy is not None
    assert outcome.validation_accuracy > 0.9


def test_one_source_has_no_loss_of_its_own(make_model, make_stage, make_data, tmp_path):
    data = make_data(12)
    _, lines = run(make_model(), data, data, make_stage(steps=1), tmp_path, sources=Sources(("all",), (12,)))
    assert not [key for key in lines[0] if "/" in key and not key.startswith("time/")]


def test_a_line_says_where_time_and_memory_went(make_model, make_stage, make_data, tmp_path):
    data = make_data(30)
    _, lines = run(make_model(), data, data, make_stage(steps=3, save_every=1), tmp_path)
    for line in lines:
        assert {f"time/{name}" for name in ("data", "forward_backward", "clip", "optimizer")} <= line.keys()
        assert not [key for key in line if key.startswith("slowest/")]  # alone
        assert 0.05 < line["memory_gib"] < 24
        assert "mfu" not in line
        assert line["tokens_per_second_per_gpu"] == line["tokens_per_second"]
    assert ["time/validation" in line for line in lines] == [False, False, True]
    assert lines[1]["time/save"] > lines[0]["time/save"]  # told by the line after


def test_what_the_recipe_decides_is_the_same_in_every_run(make_model, make_stage, make_data, tmp_path):
    data, stage = make_data(30), make_stage(eval_every=2)
    one, other = (run(make_model(), data, data, stage, tmp_path / name)[1] for name in "ab")
    assert one != other
    assert [decided(line) for line in one] == [decided(line) for line in other]
    assert {"loss", "loss/chats", "validation_loss/books", "validation_accuracy"} <= decided(one[-1]).keys()


def test_mfu_is_the_share_of_the_peak(make_model, make_stage, make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_of", lambda *_: 1e9)
    data, stage, model = make_data(30), make_stage(steps=1), make_model()
    _, (line,) = run(model, data, data, stage, tmp_path)
    batch = batches(data, stage).assemble(batches(data, stage).rows_of(0))
    asked = work.work_of(model.config, specs(model), names(model))
    pairs = work.pairs_of(batch.lengths)
    flops = asked.of(tokens=batch.tokens, pairs=pairs, supervised=len(batch.targets))
    assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / batch.tokens / 1e9, rel=1e-2)
    assert f"MFU {line['mfu']:.1%}" in loop._note(line)  # pyright: ignore[reportPrivateUsage]


# -- arithmetic


def specs(model):
    return {name: Spec(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


def names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def counted(model, length, learned):
    """FLOPs of the matrix products of both passes, by torch's counter."""
    ids = torch.arange(length)
    with FlopCounterMode(display=False) as counter:
        hidden = model.packed_hidden(ids, (length,))[:learned]
        plain(hidden, model.lm_head.weight, ids[:learned], torch.ones(learned)).backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in by_operation.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))


@pytest.mark.parametrize("tied", [False, True])
def test_work_is_what_torch_counts(make_model, tied):
    model = make_model(tied=tied)
    asked = work.work_of(model.config, specs(model), names(model))
    assert counted(model, 16, 5) == asked.of(tokens=16, pairs=0, supervised=5)
    shape = 1, model.config.num_heads, 16, model.config.head_dim
    attention = sdpa_flop_count(shape, shape, shape) * model.config.num_layers
    assert attention == asked.per_pair * 16**2 / 3  # of all pairs, two products of the six


def test_work_with_an_adapter_is_what_torch_counts(make_model):
    model = make_model()
    attach(model, AdapterConfig(lora=2), seed=0, grown=False)
    asked = work.work_of(model.config, specs(model), names(model))
    products = counted(model, 16, 5)
    # the first layer's inputs ask for no gradient, which the convention does not look at
    first = model.model.layers[0].self_attn
    spared = 2 * 16 * sum(getattr(first, f"{kind}_proj").base.weight.numel() for kind in "qkv")
    spared += 2 * 16 * sum(getattr(first, f"{kind}_proj").lora_A.weight.numel() for kind in "qkv")
    assert products == asked.of(tokens=16, pairs=0, supervised=5) - spared


def test_pairs_are_those_of_each_document():
    assert work.pairs_of((1, 3)) == 1 + 6
    assert work.pairs_of(()) == 0


def test_llama_70b_asks_for_six_times_its_weights_a_token(make_model):
    config = replace(
        make_model().config,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32000,
    )
    sizes = {"self_attn.q_proj": 8192**2, "self_attn.o_proj": 8192**2, "self_attn.k_proj": 8192 * 1024}
    sizes |= {"self_attn.v_proj": 8192 * 1024} | {f"mlp.{name}_proj": 8192 * 28672 for name in ("gate", "up", "down")}
    about = {
        f"model.layers.{layer}.{name}.weight": Spec((size // 8192, 8192), torch.float32)
        for layer in range(80)
        for name, size in sizes.items()
    } | {"lm_head.weight": Spec((32000, 8192), torch.float32)}
    asked = work.work_of(config, about, list(about))
    assert (asked.per_token + asked.per_supervised) / 6 == 68_976_648_192 - 32000 * 8192 - 161 * 8192
    assert asked.per_pair == 12 * 80 * 8192


def test_the_peak_is_that_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda", 0)
    assert work.peak_of(cuda, torch.bfloat16) == 312e12
    assert work.peak_of(cuda, None) == accelerator("a100-80gb").tflops["fp32"] * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert work.peak_of(cuda, torch.bfloat16) is None
    assert work.peak_of(torch.device("cpu"), torch.bfloat16) is None


# -- phases


def test_phases_add_up_and_begin_anew():
    phases = Phases(torch.device("cpu"))
    with phases("data"):
        sum(range(20_000))
    before = phases.taken()
    assert before[PHASES.index("data")] > 0
    assert sum(map(bool, before)) == 1
    assert not any(phases.taken())


def test_alone_one_is_the_slowest_at_everything():
    assert largest(World(ParallelConfig(device="cpu")), [0.5, 2.0], True) == ([(0.5, 0), (2.0, 0)], True)
