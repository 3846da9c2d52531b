"""The model itself: what a token may know, and what loading refuses."""

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig, from_hf
from llamero.model.llama import Llama, RMSNorm, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default, Dynamic, Rope

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for


def small(rope: Rope | None = None, **changes) -> Llama:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    config = LlamaConfig(
        **{**sizes, "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **changes},
        rope=rope or Default(10000.0, 8),
    )
    model = Llama(config).eval()
    initialize(model, seed=0, std=0.2)
    return model


def some_ids(count, seed=0):
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("rope", [Default(10000.0, 8), Dynamic(10000.0, 8, 4.0, 16)], ids=["default", "dynamic"])
def test_packed_documents_do_not_see_each_other(rope):
    model, lengths = small(rope), (5, 30, 1, 30, 18)
    parts = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    packed = model.packed_hidden(torch.cat(parts), lengths)
    alone = torch.cat([model.packed_hidden(part, (len(part),)) for part in parts])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_token_knows_nothing_of_what_comes_after_it():
    model, ids = small(), some_ids(20)
    changed = ids.clone()
    changed[12:] = (changed[12:] + 1) % 50
    before, after = model(ids[None])[0], model(changed[None])[0]
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:], atol=1e-3)


@torch.no_grad()
def test_batches_are_rows_of_their_own():
    model, ids = small(), some_ids(24).view(3, 8)
    logits = model(ids)
    for row in range(3):
        torch.testing.assert_close(logits[row], model(ids[row : row + 1])[0], rtol=0, atol=1e-5)


def test_a_tied_head_is_the_embedding():
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert small().lm_head.weight is not small().model.embed_tokens.weight


def test_normalization_is_done_in_float32():
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    x = (100 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x).double(), expected, rtol=4e-3, atol=0)


def test_the_same_seed_draws_the_same_weights():
    first, second = small(), small()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_loaded(tmp_path, dtype, tied):
    model = small(tie_word_embeddings=tied)
    save_model(model, tmp_path, dtype=dtype)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.lm_head.weight.dtype == dtype
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a.to(dtype), b)
    wide = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.model.norm.weight, model.model.norm.weight.to(dtype).float())


def test_a_hugging_face_config_survives_the_round_trip():
    config = small(Dynamic(500000.0, 8, 2.0, 64), attention_bias=True).config
    assert from_hf(config.to_hf(dtype="float32"), where="config.json") == config


def test_two_spellings_that_disagree_are_refused():
    config = {**small().config.to_hf(dtype="float32"), "rope_theta": 500000.0}
    with pytest.raises(LlameroError, match=r"rope_theta 10000\.0, the older spelling says 500000\.0"):
        from_hf(config, where="config.json")
