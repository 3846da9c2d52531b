"""How the loss feels the outputs of linear layers: a walk through the model and back, a decoder layer at a time.

The loss is the KL divergence from the unquantized model's predictions. Its second derivative by outputs is the second
moment of the gradients of the log-likelihood of tokens drawn from those predictions (the Fisher information).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamero.checkpoint import hf
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block, RMSNorm
from llamero.model.load import EMBEDDING, HEAD, empty_model, load_block, stored_names
from llamero.model.rope import rotations
from llamero.quantize.calibrate import INPUTS, check_tokens
from llamero.quantize.problem import finite_weight

COUPLED = 2048
"""Neighbouring outputs of which it is told how their errors add up; those further apart count for themselves."""

CHUNK = 512
"""Tokens whose logits are in memory at a time."""


def set_size(outputs: int) -> int:
    """Return how many neighbouring outputs are coupled: all of them, or a divisor of their number."""
    sets = next(n for n in range(1, outputs + 1) if outputs % n == 0 and outputs // n <= COUPLED)
    return outputs // sets


def some(tokens: Sequence[Tensor], wanted: int) -> list[Tensor]:
    """Return sequences from all over the calibration text, with as many tokens as wanted or a little more."""
    mean = sum(map(len, tokens)) / len(tokens)
    count = min(len(tokens), math.ceil(wanted / mean))
    return [tokens[i * len(tokens) // count] for i in range(count)]


class Sensitivity:
    """What the loss feels of each decoder layer, in files of a directory that goes when this is closed."""

    def __init__(self, place: Path) -> None:
        """Begin without any layer.

        Args:
            place: Where the directory is made.
        """
        self._directory = TemporaryDirectory(prefix="sensitivity-", dir=place)
        self.path = Path(self._directory.name)

    def __enter__(self) -> "Sensitivity":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    def of(self, number: int) -> dict[str, Float[Tensor, "sets size size"]]:
        """Return the second moments of the gradients by the outputs of a decoder layer, by the keys of `INPUTS`.

        Outputs of linear layers with the same inputs lie one after the other, in sets of neighbours.
        """
        return load_file(self.path / f"{number}.safetensors")

    def put(self, number: int, moments: dict[str, Tensor]) -> None:
        """Remember a decoder layer's."""
        save_file(moments, self.path / f"{number}.safetensors")


def measure(
    directory: Path,
    config: LlamaConfig,
    tokens: Sequence[Int[Tensor, " time"]],
    *,
    into: Sensitivity,
    device: str | torch.device = "cpu",
) -> None:
    """Measure how the loss feels the outputs of every linear layer; computed in float32.

    Each layer runs twice forward and once backward. The inputs of all layers wait on disk for the way back.

    Args:
        directory: Model directory.
        config: Its shape.
        tokens: Sequences; they do not see each other.
        into: Where the result goes.
        device: Where to compute.

    Raises:
        LlameroError: If weights, activations or gradients are not finite.
    """
    check_tokens(tokens, config)
    tensors = hf.open_tensors(directory)
    stored = stored_names(empty_model(config), tensors)
    embedding = tensors[stored[EMBEDDING]]
    activations = [embedding[ids.long()].float().to(device) for ids in tokens]
    del embedding
    waiting = into.path / "inputs"
    waiting.mkdir()
    for number in progress.track(range(config.num_layers), "sensitivity: forward", unit="layers"):
        block = load_block(config, tensors, number, dtype=torch.float32, device=device)
        save_file({str(i): x for i, x in enumerate(activations)}, waiting / f"{number}.safetensors")
        with torch.no_grad():
            activations = [_run(block, x, config) for x in activations]
        _refuse_broken(block, activations, number)
        del block
    gradients = _at_the_end(activations, config, tensors, stored)
    del activations
    for number in progress.track(range(config.num_layers - 1, -1, -1), "sensitivity: back", unit="layers"):
        block = load_block(config, tensors, number, dtype=torch.float32, device=device).requires_grad_(False)
        file = waiting / f"{number}.safetensors"
        inputs = load_file(file, device=str(device))
        into.put(number, _back(block, inputs, gradients, config, where=f"model.layers.{number}"))
        del inputs, block
        file.unlink()


def _refuse_broken(block: Block, activations: Sequence[Tensor], number: int) -> None:
    """Refuse a layer whose weights, or whose outputs, are no numbers."""
    prefix = f"model.layers.{number}."
    for name in (name for names in INPUTS.values() for name in names):
        finite_weight(block, prefix, name)
    broken = [i for i, x in enumerate(activations) if not bool(x.isfinite().all())]
    if broken:
        raise LlameroError(
            f"what it makes of calibration sequence {broken[0]} is not all finite ({len(broken)} such sequences)",
            where=prefix.rstrip("."),
            fix="see whether the model itself works; its weights may be broken",
        )


def _run(block: Block, x: Tensor, config: LlamaConfig) -> Tensor:
    length = len(x)
    rotation = rotations(torch.arange(length), config.rope.frequencies(length), scale=config.rope.attention_scale)
    return block(x, rotation.to(x.device), Documents((length,)))


def _at_the_end(
    hidden: Sequence[Tensor], config: LlamaConfig, tensors: hf.Tensors, stored: dict[str, str]
) -> list[Tensor]:
    """Return the gradients by the last hidden states, of the log-likelihood of tokens drawn from the predictions."""
    device = hidden[0].device
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).requires_grad_(False).to(device)
    norm.weight.copy_(tensors[stored["model.norm.weight"]])
    head = tensors[stored[EMBEDDING if config.tie_word_embeddings else HEAD]].float().to(device)
    gradients = []
    for number, whole in enumerate(hidden):
        draws = torch.Generator().manual_seed(number)  # the same whatever runs before or beside
        parts = []
        for part in whole.split(CHUNK):
            x = part.detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(norm(x), head)
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draws).flatten()
                loss = F.cross_entropy(logits, drawn.to(device), reduction="sum")
            parts += torch.autograd.grad(loss, x)
        gradients.append(torch.cat(parts))
    return gradients


def _back(
    block: Block, inputs: dict[str, Tensor], gradients: list[Tensor], config: LlamaConfig, *, where: str
) -> dict[str, Tensor]:
    """Go back through a layer, replace the gradients by those by its inputs, and return those by outputs, squared."""
    moments: dict[str, Tensor] = {}
    for i in range(len(gradients)):
        outputs: dict[str, Tensor] = {}
        hooks = [_keep_output(block, name, outputs) for names in INPUTS.values() for name in names]
        x = inputs[str(i)].requires_grad_()
        with torch.enable_grad():
            y = _run(block, x, config)
        for hook in hooks:
            hook.remove()
        names = list(outputs)
        gradients[i], *found = torch.autograd.grad(y, [x, *outputs.values()], gradients[i])
        by_name = dict(zip(names, found, strict=True))
        for source, members in INPUTS.items():
            g = torch.cat([by_name[name] for name in members], dim=1)  # (tokens, outputs)
            g = g.unflatten(1, (-1, set_size(g.shape[1]))).transpose(0, 1)  # (sets, tokens, size)
            moments[source] = moments[source].baddbmm_(g.mT, g) if source in moments else g.mT @ g
    for source, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise LlameroError(
                "the loss's gradients by its outputs on the calibration text are not all finite",
                where=f"{where}.{source}",
                fix="see whether the model itself works; its weights may be broken",
            )
    return moments


def _keep_output(block: Block, name: str, outputs: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return block.get_submodule(name).register_forward_hook(keep)
