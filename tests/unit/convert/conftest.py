"""Random tiny models, and what is the same between two directories."""

import pytest
import torch

from llamero.checkpoint import hf
from llamero.convert.model import open_hf
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.model.load import save_model
from llamero.model.rope import Default


class Models:
    """Writes and compares model directories."""

    @staticmethod
    def config(**changes) -> LlamaConfig:
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 4,
            "rope": Default(12345.0, 4),
            "max_position_embeddings": 64,
        }
        return LlamaConfig(**{**sizes, **changes})

    @staticmethod
    def write(directory, *, dtype=torch.float32, seed=0, std=1.0, **changes) -> LlamaConfig:
        config = Models.config(**changes)
        model = Llama(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
        model.tie()
        directory.mkdir(parents=True, exist_ok=True)
        save_model(model, directory, dtype=dtype)
        return config

    @staticmethod
    def assert_same(one, other):
        """Every parameter has the same bits, and the config says the same."""
        first, second = open_hf(one), open_hf(other)
        assert first.config == second.config
        assert first.tensors.specs == second.tensors.specs
        for name in first.tensors:
            assert torch.equal(first.tensors[name], second.tensors[name]), name
        written = hf.read_config(other)
        assert written["rope_theta"] == first.config.rope.theta


@pytest.fixture
def models() -> Models:
    return Models()
