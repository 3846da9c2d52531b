"""What differs on CUDA: flash attention over packed documents, bfloat16 training, generation."""

import copy

import pytest
import torch

from llamero.engine.batches import Batches
from llamero.engine.loop import train
from llamero.engine.stage import StageConfig
from llamero.infer.generate import generate
from llamero.infer.sampler import Sampling
from llamero.kernels import attention
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default
from llamero.parallel.config import ParallelConfig
from llamero.text.messages import Role

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=Default(1e4, 32),
        max_position_embeddings=256,
    )
    model = Llama(config)
    initialize(model, seed=0)
    return model


def test_packed_documents_attend_as_the_plain_version_says():
    torch.manual_seed(0)
    lengths = (5, 64, 1, 130)
    q, k, v = (torch.randn(200, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    out, lse = attention.documents(q, k, v, lengths)
    mask = attention.same_document(lengths, device="cuda")
    expected, expected_lse = attention.masked(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.float(), expected_lse, atol=2e-2, rtol=2e-2)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    plain = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for ours, theirs in zip(grads, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


def test_bfloat16_training_follows_float32_on_the_cpu(model, tmp_path):
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 128, (n,), generator=generator).numpy() for n in (30, 60, 90, 20, 64, 100)]
    roles = [torch.full((len(d),), int(Role.TEXT)).numpy() for d in documents]
    stage = StageConfig(name="x", mixture="m", objective="lm", sequence=128, batch=2, steps=8, lr=1e-3)
    losses = {}
    for device in ("cpu", "cuda"):
        batches = Batches(documents, roles, stage, seed=0, where="here")
        trained = copy.deepcopy(model).to(device)
        losses[device] = train(trained, batches, stage, tmp_path / device, parallel=ParallelConfig()).loss
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)


def test_greedy_text_is_that_of_the_cpu(model):
    sampling = Sampling(temperature=0, max_new_tokens=16)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    on_cpu = generate(model.eval(), prompts, sampling)
    on_cuda = generate(copy.deepcopy(model).cuda(), prompts, sampling)
    assert [c.ids for c in on_cuda] == [c.ids for c in on_cpu]
