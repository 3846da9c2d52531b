"""A model of a few thousand weights, and documents to train it on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from llamero.engine.batches import Batches
from llamero.engine.stage import StageConfig
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default
from llamero.text.messages import SCAFFOLD, Role

VOCABULARY = 64


@pytest.fixture
def make_model() -> Callable[..., Llama]:
    """Return a tiny Llama."""

    def make(*, seed: int = 0, tied: bool = False, std: float = 0.3, attention_bias: bool = False) -> Llama:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            rope=Default(10000.0, 4),
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
        )
        model = Llama(config)
        initialize(model, seed=seed, std=std)
        return model

    return make


@pytest.fixture
def make_stage() -> Callable[..., StageConfig]:
    """Return a stage with some keys changed."""

    def make(**keys: object) -> StageConfig:
        about = {"name": "tiny", "mixture": "chat", "sequence": 32, "batch": 4, "lr": 1e-2}
        return StageConfig.model_validate(about | ({} if "epochs" in keys else {"steps": 4}) | keys)

    return make


@dataclass(frozen=True)
class Data:
    """Documents: tokens and roles of each."""

    tokens: Sequence[np.ndarray]
    roles: Sequence[np.ndarray]

    def batches(self, stage: StageConfig, *, seed: int = 0) -> Batches:
        """Return the batches of a stage."""
        return Batches(self.tokens, self.roles, stage, seed=seed, where="here")


@pytest.fixture
def make_data() -> Callable[..., Data]:
    """Return chats (and some plain documents) of random tokens and lengths."""

    def make(count: int = 30, *, seed: int = 0, longest: int = 30, texts: float = 0.2) -> Data:
        random = np.random.default_rng(seed)
        tokens, roles = [], []
        for _ in range(count):
            length = int(random.integers(3, longest + 1))
            tokens.append(random.integers(0, VOCABULARY, length))
            roles.append(_text(length) if random.random() < texts else _chat(random, length))
        return Data(tokens, roles)

    return make


def _text(length: int) -> np.ndarray:
    return np.asarray([Role.TEXT + SCAFFOLD] + [Role.TEXT] * (length - 1))


def _chat(random: np.random.Generator, length: int) -> np.ndarray:
    """Turns of random lengths, each begun by a token of markup; the last is an assistant's."""
    said: list[int] = []
    speaker = Role.USER
    while len(said) < length - 2:
        said += [speaker + SCAFFOLD] + [speaker] * int(random.integers(1, 5))
        speaker = Role.ASSISTANT if speaker == Role.USER else Role.USER
    return np.asarray([*said[: length - 2], Role.ASSISTANT + SCAFFOLD, Role.ASSISTANT])
