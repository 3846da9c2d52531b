"""One walk through a model, layer by layer, that records what flows into its linear layers.

One decoder layer is in memory at a time, and each runs once. All variants use the same statistics: those of the
unquantized model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llamero.checkpoint import hf
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block
from llamero.model.load import EMBEDDING, empty_model, load_block, stored_names
from llamero.model.rope import rotations

INPUTS: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The distinct inputs within a decoder layer, each by the first of the linear layers that it flows into."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is remembered of the inputs of a linear layer."""

    second_moment: Float[Tensor, "d d"]
    """Sum of `outer(x, x)` over all tokens, float32."""
    mean_abs: Float[Tensor, " d"]
    """Mean magnitude of each channel."""
    tokens: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer that has been run, and what flowed into its linear layers."""

    number: int
    block: Block
    statistics: dict[str, Statistics]
    """By the keys of `INPUTS`."""


class _Recorder:
    """Sums over the inputs of one linear layer, sequence after sequence."""

    def __init__(self, layer: nn.Module) -> None:
        self.second_moment: Tensor | None = None
        self.sum_abs: Tensor | None = None
        self.tokens = 0
        self.hook: RemovableHandle = layer.register_forward_pre_hook(self._record)

    def _record(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].float()  # (tokens, d)
        if self.second_moment is None or self.sum_abs is None:
            self.second_moment = x.new_zeros(x.shape[1], x.shape[1])
            self.sum_abs = x.new_zeros(x.shape[1])
        self.second_moment.addmm_(x.T, x)
        self.sum_abs += x.abs().sum(0)
        self.tokens += len(x)

    def result(self, where: str) -> Statistics:
        """Return the statistics, or name the layer whose inputs are not numbers."""
        self.hook.remove()
        if self.second_moment is None or self.sum_abs is None:
            raise ValueError(f"{where} was not run")
        if not bool(self.second_moment.isfinite().all()):
            raise LlameroError(
                "its inputs on the calibration text are not all finite",
                where=where,
                fix="see whether the model itself works; its weights may be broken",
            )
        return Statistics(self.second_moment, self.sum_abs / self.tokens, self.tokens)


def stream(
    directory: Path, config: LlamaConfig, tokens: Sequence[Int[Tensor, " time"]], *, device: str | torch.device = "cpu"
) -> Iterator[Layer]:
    """Yield decoder layer after decoder layer with its statistics; computed in float32.

    Args:
        directory: Model directory.
        config: Its shape.
        tokens: Sequences; they do not see each other.
        device: Where to compute; the activations between layers wait in main memory.
    """
    check_tokens(tokens, config)
    tensors = hf.open_tensors(directory)
    stored = stored_names(empty_model(config), tensors)  # anything missing is said before the work begins
    embedding = tensors[stored[EMBEDDING]]
    activations = [embedding[ids.long()].float() for ids in tokens]
    del embedding
    for number in progress.track(range(config.num_layers), "calibrate and solve", unit="layers"):
        block = load_block(config, tensors, number, dtype=torch.float32, device=device)
        recorders = {name: _Recorder(block.get_submodule(name)) for name in INPUTS}
        _run(block, activations, config, device)
        prefix = f"model.layers.{number}."
        statistics = {name: recorder.result(prefix + name) for name, recorder in recorders.items()}
        yield Layer(number, block, statistics)
        del block, recorders, statistics  # before the next layer is read, not after


@torch.no_grad()
def _run(block: Block, activations: list[Tensor], config: LlamaConfig, device: str | torch.device) -> None:
    """Send every sequence through the layer, in place, one at a time and so always in the same order."""
    for i, x in enumerate(activations):
        length = len(x)
        rotation = rotations(torch.arange(length), config.rope.frequencies(length), scale=config.rope.attention_scale)
        activations[i] = block(x.to(device), rotation.to(device), Documents((length,))).cpu()


def check_tokens(tokens: Sequence[Int[Tensor, " time"]], config: LlamaConfig) -> None:
    """Refuse sequences that the model cannot read."""
    if not tokens or any(len(ids) == 0 for ids in tokens):
        raise LlameroError("no calibration tokens, or a sequence without any", fix="give text to calibrate on")
    longest = max(len(ids) for ids in tokens)
    if longest > config.max_position_embeddings:
        raise LlameroError(
            f"calibration sequences of {longest} tokens, the model reads {config.max_position_embeddings}",
            fix=f"set `calibration.sequence` to at most {config.max_position_embeddings}",
        )
    low, high = min(int(ids.min()) for ids in tokens), max(int(ids.max()) for ids in tokens)
    if low < 0 or high >= config.vocab_size:
        raise LlameroError(
            f"calibration tokens {low} to {high}, the model's vocabulary has {config.vocab_size}",
            fix="tokenize with the tokenizer of this model",
        )
