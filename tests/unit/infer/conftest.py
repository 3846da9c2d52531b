"""A random model and random ids for the tests of this folder."""

import pytest
import torch

from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default, Dynamic

torch.set_num_threads(1)  # tiny tensors: a second thread would only be waited for

VOCABULARY = 50


@pytest.fixture(scope="session", params=["default", "dynamic"])
def model(request) -> Llama:
    """A random model with opinions, context 64 (dynamic: 32 stretched to 64)."""
    dynamic = request.param == "dynamic"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=Dynamic(10000.0, 8, 2.0, 32) if dynamic else Default(10000.0, 8),
        max_position_embeddings=32 if dynamic else 64,
    )
    model = Llama(config).eval()
    initialize(model, seed=0, std=0.3)
    return model


@pytest.fixture
def draw():
    """Return random ids: `draw(length, seed)`."""

    def drawn(length: int, seed: int = 0) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    return drawn
