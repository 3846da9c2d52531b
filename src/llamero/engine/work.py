"""How much arithmetic a training step asks for, and what share of a device's peak that is (MFU).

Model FLOPs, as PaLM counts them (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 for each weight of a matrix
and token, 12 · layers · width for each pair of tokens that attention compares. What is computed again (activations), is
padding, or attends nothing does not count. Three things are counted as they are here: a token is compared with those
before it in its own document only; the head sees supervised tokens only; a frozen weight has no gradient of its own,
which leaves 4 of its 6.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from llamero.checkpoint.hf import Spec
from llamero.core.hardware import Arithmetic, of_device
from llamero.model.config import LlamaConfig


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward pass."""

    per_token: float
    per_pair: float
    """For a token and one that it attends to, itself included."""
    per_supervised: float
    """For a token whose successor is learned, beside what it costs as a token."""

    def of(self, *, tokens: float, pairs: float, supervised: float) -> float:
        """Return the FLOPs of a step."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_supervised * supervised


def work_of(config: LlamaConfig, specs: Mapping[str, Spec], trained: Collection[str]) -> Work:
    """Return what the training of a model asks for.

    Args:
        config: Its shape.
        specs: Its parameters, adapters included.
        trained: Names of those that are not frozen.
    """
    inner, inner_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * inner + 2 * inner_kv + 3 * config.intermediate_size)
    sizes = {name: spec.shape[0] * spec.shape[1] for name, spec in specs.items() if len(spec.shape) == 2}
    adapters = sum(size for name, size in sizes.items() if "lora_" in name)
    in_layers = {name for name in trained if ".layers." in name and name in sizes and "lora_" not in name}
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head_factor = 6 if any(name == head or name.startswith("lm_head.") for name in trained) else 4
    return Work(
        per_token=4.0 * layer * config.num_layers + 2.0 * sum(sizes[name] for name in in_layers) + 6.0 * adapters,
        per_pair=12.0 * config.num_layers * inner,
        per_supervised=float(head_factor * config.hidden_size * config.vocab_size),
    )


def pairs_of(lengths: Sequence[int]) -> int:
    """Return how many pairs of tokens attention compares in documents of some lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def peak_of(device: torch.device, precision: torch.dtype | None) -> float | None:
    """Return the peak of a device in FLOPs a second; None for a CPU, and for a device that is not in the table.

    Args:
        device: Which one.
        precision: Of matrix products; None is float32.
    """
    if device.type != "cuda":
        return None
    found = of_device(torch.cuda.get_device_name(device))
    kinds: dict[torch.dtype | None, Arithmetic] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    tflops = None if found is None else found.tflops.get(kinds.get(precision, "fp32"))
    return None if tflops is None else tflops * 1e12
