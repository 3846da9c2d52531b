"""How the loss feels the outputs of linear layers: a walk through the model and back, a decoder layer at a time.

The loss is the KL divergence from the unquantized model's predictions. Its second derivative by outputs is the second
moment of the gradients of the log-likelihood of tokens drawn from those predictions (the Fisher information).
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamero.checkpoint import hf
from llamero.core import artifact, files, progress
from llamero.core.artifact import Artifact, Identity
from llamero.core.errors import LlameroError
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block, RMSNorm
from llamero.model.load import EMBEDDING, HEAD, empty_model, load_block, stored_names
from llamero.model.rope import rotations
from llamero.parallel.world import World
from llamero.quantize.agreed import AgreedSums, added_up
from llamero.quantize.calibrate import INPUTS, alone, check_tokens
from llamero.quantize.problem import finite_weight

COUPLED = 2048
"""Neighbouring outputs of which it is told how their errors add up; those further apart count for themselves."""

VERSION = 3
"""Raised when the same model and tokens give other measurements."""

CHUNK = 512
"""Tokens whose logits are in memory at a time."""


def set_size(outputs: int) -> int:
    """Return how many neighbouring outputs are coupled: all of them, or a divisor of their number."""
    sets = next(n for n in range(1, outputs + 1) if outputs % n == 0 and outputs // n <= COUPLED)
    return outputs // sets


def some(tokens: Sequence[Tensor], wanted: int) -> list[Tensor]:
    """Return sequences from all over the calibration text, with as many tokens as wanted or a little more."""
    chosen = _chosen([len(ids) for ids in tokens], wanted)
    return [tokens[i] for i in chosen]


def some_lengths(lengths: Sequence[int], wanted: int) -> list[int]:
    """Return the lengths of what `some` returns, of the lengths of all sequences."""
    return [lengths[i] for i in _chosen(lengths, wanted)]


def _chosen(lengths: Sequence[int], wanted: int) -> list[int]:
    mean = sum(lengths) / len(lengths)
    count = min(len(lengths), math.ceil(wanted / mean))
    return [i * len(lengths) // count for i in range(count)]


@dataclass(frozen=True)
class Sensitivity:
    """What the loss feels of each decoder layer, in the files of a directory."""

    path: Path

    def of(self, number: int, source: str) -> Float[Tensor, "sets size size"]:
        """Return the second moments of the gradients by outputs in a decoder layer.

        Args:
            number: Of the decoder layer.
            source: A key of `INPUTS`. Outputs of linear layers with the same inputs lie one after the other, in sets of
                neighbours.
        """
        with safe_open(self.path / f"{number}.safetensors", "pt") as file:
            return file.get_tensor(source)

    def put(self, number: int, moments: dict[str, Tensor]) -> None:
        """Remember a decoder layer's."""
        save_file(moments, self.path / f"{number}.safetensors")


def identity(statistics: Identity, tokens: Sequence[Tensor]) -> Identity:
    """Return what decides what is measured.

    Args:
        statistics: Of all calibration tokens of the same model.
        tokens: Those that are measured on, of these.
    """
    how = {"sequences": len(tokens), "coupled": COUPLED}
    return Identity("sensitivity", "sensitivity", how, statistics.parents, VERSION)


def kept(root: Path, who: Identity, make: Callable[[Sensitivity], None], world: World | None = None) -> Sensitivity:
    """Return what an earlier run has measured, or measure and keep it.

    Args:
        root: Where it is kept.
        who: What decides it.
        make: Measures it, on all processes.
        world: The processes, all of which call this; without it this one is alone.

    Raises:
        LlameroError: What is kept is damaged.
    """
    world = alone() if world is None else world
    place = who.path(root)
    if not world.told(artifact.find(root, who) is not None):
        with world.together():
            if world.speaks:  # of a run that was cut off
                shutil.rmtree(artifact.partial(root, who), ignore_errors=True)
        if world.speaks:
            with artifact.build(root, who) as build:
                make(Sensitivity(build.path))
                files_made = build.path.glob("*.safetensors")
                build.summary = {"sha256": {path.name: files.sha256(path) for path in files_made}}
        else:
            make(Sensitivity(artifact.partial(root, who)))
        world.barrier()
        return Sensitivity(place)
    with world.together():
        if world.speaks:
            _check(artifact.read(place))
    return Sensitivity(place)


def _check(found: Artifact) -> None:
    for name, digest in found.summary["sha256"].items():
        path = found.path / name
        if not path.exists() or files.sha256(path) != digest:
            raise LlameroError(
                "what an earlier run measured of the loss is damaged", where=path, fix=f"remove {found.path}"
            )


def measure(
    directory: Path,
    config: LlamaConfig,
    tokens: Sequence[Int[Tensor, " time"]],
    *,
    into: Sensitivity,
    dtype: torch.dtype = torch.float32,
    world: World | None = None,
) -> None:
    """Measure how the loss feels the outputs of every linear layer.

    Each layer runs twice forward and once backward. The inputs of all layers wait on disk for the way back. Processes
    have sequences of their own.

    Args:
        directory: Model directory.
        config: Its shape.
        tokens: Sequences; they do not see each other.
        into: Where the result goes.
        dtype: To compute in: float32 or bfloat16.
        world: The processes that share the work, all of which call this; without it this one is alone, on the CPU.

    Raises:
        LlameroError: If weights, activations or gradients are not finite.
    """
    world = alone() if world is None else world
    waiting = into.path / f"inputs-{world.rank}"
    device = world.device
    with world.together():
        check_tokens(tokens, config)
        tensors = hf.open_tensors(directory)
        stored = stored_names(empty_model(config), tensors)
        embedding = tensors[stored[EMBEDDING]]
        mine = range(world.rank, len(tokens), world.size)
        activations = {i: embedding[tokens[i].long()].to(device, dtype) for i in mine}
        del embedding
        waiting.mkdir(parents=True)
        for number in progress.track(range(config.num_layers), "sensitivity: forward", unit="layers"):
            block = load_block(config, tensors, number, dtype=dtype, device=device)
            save_file({str(i): x for i, x in activations.items()}, waiting / f"{number}.safetensors")
            with torch.no_grad():
                activations = {i: _run(block, x, config) for i, x in activations.items()}
            _refuse_broken(block, activations, number)
            del block
        gradients = _at_the_end(activations, config, tensors, stored) if mine else {}
        del activations
    outputs = _outputs(config)
    for number in progress.track(range(config.num_layers - 1, -1, -1), "sensitivity: back", unit="layers"):
        where = f"model.layers.{number}"
        slopes = {source: _Slopes(f"{where}.{source}", count, len(tokens), world) for source, count in outputs.items()}
        with added_up(world, [sums for each in slopes.values() for sums in each.sums]):
            block = load_block(config, tensors, number, dtype=dtype, device=device).requires_grad_(False)
            file = waiting / f"{number}.safetensors"
            _back(block, load_file(file, device=str(device)), gradients, config, slopes)
            del block
            file.unlink()
        found = {source: each.moments() for source, each in slopes.items()}
        with world.together():
            if world.speaks:
                into.put(number, found)
    with world.together():  # what all of this stands in gets its name next
        waiting.rmdir()


def _outputs(config: LlamaConfig) -> dict[str, int]:
    """Return how many outputs linear layers with the same inputs have together."""
    block = empty_model(config).model.layers[0]
    sizes = {name: len(block.get_parameter(f"{name}.weight")) for names in INPUTS.values() for name in names}
    return {source: sum(sizes[name] for name in names) for source, names in INPUTS.items()}


class _Slopes:
    """Second moments of the gradients by the outputs of linear layers with the same inputs, in sets of neighbours."""

    def __init__(self, where: str, outputs: int, sequences: int, world: World) -> None:
        self._where, self._size = where, set_size(outputs)
        self.sums = [AgreedSums(where, sequences, world) for _ in range(outputs // self._size)]

    def add(self, g: Float[Tensor, "tokens outputs"]) -> None:
        """Take in the gradients of a sequence."""
        if not bool(g.isfinite().all()):
            raise LlameroError(
                "the loss's gradients by its outputs on the calibration text are not all finite",
                where=self._where,
                fix="see whether the model itself works; its weights may be broken",
            )
        for sums, part in zip(self.sums, g.split(self._size, dim=1), strict=True):
            sums.add(part)

    def moments(self) -> Float[Tensor, "sets size size"]:
        """Return what all processes have found."""
        return torch.stack([each.sums.statistics(self._where).second_moment for each in self.sums])


def _refuse_broken(block: Block, activations: Mapping[int, Tensor], number: int) -> None:
    """Refuse a layer whose weights, or whose outputs, are no numbers."""
    prefix = f"model.layers.{number}."
    for name in (name for names in INPUTS.values() for name in names):
        finite_weight(block, prefix, name)
    broken = [i for i, x in activations.items() if not bool(x.isfinite().all())]
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
    hidden: Mapping[int, Tensor], config: LlamaConfig, tensors: hf.Tensors, stored: dict[str, str]
) -> dict[int, Tensor]:
    """Return the gradients by the last hidden states, of the log-likelihood of tokens drawn from the predictions."""
    some = next(iter(hidden.values()))
    device, dtype = some.device, some.dtype
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).requires_grad_(False).to(device, dtype)
    norm.weight.copy_(tensors[stored["model.norm.weight"]])
    head = tensors[stored[EMBEDDING if config.tie_word_embeddings else HEAD]].to(device, dtype)
    gradients: dict[int, Tensor] = {}
    for number, whole in hidden.items():
        draws = torch.Generator().manual_seed(number)  # the same whatever runs before or beside
        parts = []
        for part in whole.split(CHUNK):
            x = part.detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(norm(x), head)
            slope = logits.detach().float().softmax(-1)
            slope.scatter_add_(1, _drawn(slope, draws), slope.new_full((len(part), 1), -1))
            parts += torch.autograd.grad(logits, x, slope.to(dtype))
        gradients[number] = torch.cat(parts)
    return gradients


def _drawn(p: Float[Tensor, "tokens vocab"], draws: torch.Generator) -> Int[Tensor, "tokens 1"]:
    """Return a token of each distribution: that at which a random share of the whole has been passed."""
    passed = p.cumsum(1)
    share = torch.rand(len(p), 1, generator=draws).to(p.device) * passed[:, -1:]
    return torch.searchsorted(passed, share).clamp_(max=p.shape[1] - 1)


def _back(
    block: Block,
    inputs: Mapping[str, Tensor],
    gradients: dict[int, Tensor],
    config: LlamaConfig,
    slopes: Mapping[str, _Slopes],
) -> None:
    """Go back through a layer, replace the gradients by those by its inputs, and take in those by outputs."""
    for i, gradient in gradients.items():
        outputs: dict[str, Tensor] = {}
        hooks = [_keep_output(block, name, outputs) for names in INPUTS.values() for name in names]
        x = inputs[str(i)].requires_grad_()
        with torch.enable_grad():
            y = _run(block, x, config)
        for hook in hooks:
            hook.remove()
        names = list(outputs)
        gradients[i], *found = torch.autograd.grad(y, [x, *outputs.values()], gradient)
        by_name = dict(zip(names, found, strict=True))
        for source, members in INPUTS.items():
            slopes[source].add(torch.cat([by_name[name] for name in members], dim=1))


def _keep_output(block: Block, name: str, outputs: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return block.get_submodule(name).register_forward_hook(keep)
