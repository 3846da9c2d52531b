"""Bytes that a stage of training needs on each device, weighed on the model itself and not by a formula beside it.

The model is on the meta device, spread as the run spreads it (`parallel.imagined`). Weights are the shards that a
process then has, the optimizer's state is what the optimizer makes of them, and activations are what is alive between
the forward and the backward pass of one micro-batch, counted operation by operation. Layers of one part are alike, so
only the first few of them are run; a pipeline's micro-batches in flight are those of torch's own schedule.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llamero.engine.loop import autocast
from llamero.engine.noise import rates
from llamero.engine.optimizer import adamw
from llamero.engine.stage import StageConfig
from llamero.kernels.attention import as_on_cuda
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import attach
from llamero.model.config import LlamaConfig
from llamero.model.dropout import Noise
from llamero.model.linear import shells
from llamero.model.llama import Llama
from llamero.parallel.adapted import refuse_cuts
from llamero.parallel.config import ParallelConfig
from llamero.parallel.imagined import first_of, imagined
from llamero.parallel.layout import layers_of, refuse_impossible
from llamero.parallel.part import Micro, Part
from llamero.parallel.spread import Spread
from llamero.parallel.world import local
from llamero.plan.weigh import GATHERED, Weigh, nbytes

FEW = (3, 4)
"""Layers of a piece that are run: the fourth is one that repeats, and what it adds every further one adds. With fewer,
first and last are not alike, and not as many are fetched ahead."""

LOGITS = "logits"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of a step when they are most."""

    weights: int = 0
    """Its shards of the parameters, frozen and packed ones included."""
    gradients: int = 0
    """Those of what is trained."""
    optimizer: int = 0
    """The optimizer's state."""
    activations: int = 0
    """What backward passes still need, over all micro-batches in flight."""
    logits: int = 0
    """What head and loss hold."""
    gathered: int = 0
    """Whole weights of layers that are otherwise in shards."""
    other: int = 0
    """What passes by: gradients of activations, a layer that is computed again, buffers of a pipeline."""
    kv: int = 0
    """Keys and values of earlier tokens, where a model is served."""
    host: int = 0
    """In the host's memory, not the device's: what `offload` moves there."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has."""

    all: int
    trained: int
    per_rank: int
    """On the device that has most."""


class _Piece(NamedTuple):
    """Bytes of a piece of the model on one device, and of one micro-batch that goes through it."""

    weights: int
    gradients: int
    optimizer: int
    kept: int
    """Activations between the forward and the backward pass."""
    logits_kept: int
    """Of head and loss, the same."""
    logits: int
    """The most of head and loss at a time."""
    gathered: int
    """The most of whole weights at a time."""
    forward: int
    """The most of all that counts at a time while it goes forward."""
    backward: int
    """The same while it goes backward."""
    handed: int
    """What comes in from the piece before and, as its gradient, from the piece after: for each micro-batch."""
    parameters: int
    """Numbers here."""


def memory(config: LlamaConfig, stage: StageConfig, parallel: ParallelConfig, *, device: str = "cuda") -> list[Memory]:
    """Return what each place of the pipeline needs at its worst moment; one place where there is no pipeline.

    Args:
        config: The model, its vocabulary as it is trained.
        stage: How it is trained. Every row is taken to be full, one document of which everything is learned.
        parallel: Over what devices. Nothing of it has to be there.
        device: `cuda`, or `cpu` for what processes on a CPU hold.

    Raises:
        LlameroError: If the model cannot have the layout.
    """
    refuse_impossible(parallel, config, batch=stage.batch)
    kinds, orders = _kinds(config, stage, parallel, device=device)
    found = []
    for place, passes in enumerate(orders):
        pieces = [
            kinds[_kind(piece, parallel)].with_layers(len(layers))
            for piece in range(place, parallel.pieces, parallel.pipeline)
            for layers in [layers_of(piece, pieces=parallel.pieces, layers=config.num_layers)]
        ]
        found.append(_at_worst(pieces, passes, parallel, stage))
    return found


def refusal(config: LlamaConfig, stage: StageConfig) -> Callable[[ParallelConfig], None]:
    """Return what refuses a layout that the model of a stage cannot have.

    Args:
        config: The model, its vocabulary as it is trained.
        stage: Its batch, and the form that a frozen base rests in.
    """
    packed = stage.adapter is not None and stage.adapter.base is not None
    model = _model(replace(config, num_layers=1), stage.adapter, half=False) if packed else None

    def refuse(parallel: ParallelConfig) -> None:
        refuse_impossible(parallel, config, batch=stage.batch)
        if model is not None:
            refuse_cuts(parallel, model)

    return refuse


def _at_worst(
    pieces: Sequence[_Piece], passes: Sequence[tuple[str, int]], parallel: ParallelConfig, stage: StageConfig
) -> Memory:
    """Return what a place needs that has some pieces, and goes through them in some order."""
    count, _ = parallel.share(stage.batch)
    resting = {name: sum(getattr(piece, name) for piece in pieces) for name in ("weights", "gradients", "optimizer")}
    moment = _worst(pieces, passes)
    moment["other"] += count * sum(piece.handed for piece in pieces)
    if parallel.offload:
        return Memory(host=sum(resting.values()), **moment)
    return Memory(**resting, **moment)


class _Kind(NamedTuple):
    """Pieces that differ in nothing but the number of their layers."""

    small: _Piece
    large: _Piece
    """With one layer more."""
    layers: int
    """Of the larger."""

    def with_layers(self, layers: int) -> _Piece:
        """Return the bytes of a piece with some number of layers."""
        more = layers - self.layers
        return _Piece(*(large + more * (large - small) for small, large in zip(self.small, self.large, strict=True)))


def _kind(piece: int, parallel: ParallelConfig) -> tuple[bool, bool]:
    """Return whether a piece has the embedding, and whether the head."""
    return piece == 0, piece == parallel.pieces - 1


def _kinds(
    config: LlamaConfig, stage: StageConfig, parallel: ParallelConfig, *, device: str
) -> tuple[dict[tuple[bool, bool], _Kind], list[list[tuple[str, int]]]]:
    """Weigh a piece of each kind; return them, and in what order each place goes through its own."""
    number = parallel.pieces
    lengths = {len(layers_of(piece, pieces=number, layers=config.num_layers)) for piece in range(number)}
    few = FEW if max(lengths) > FEW[1] else sorted(lengths)
    weighed = [_weighed(replace(config, num_layers=number * each), stage, parallel, device=device) for each in few]
    (small, _), (large, orders) = weighed[0], weighed[-1]
    return {kind: _Kind(small[kind], large[kind], few[-1]) for kind in small}, orders


def _weighed(
    config: LlamaConfig, stage: StageConfig, parallel: ParallelConfig, *, device: str
) -> tuple[dict[tuple[bool, bool], _Piece], list[list[tuple[str, int]]]]:
    """Run a piece of each kind, layer by layer."""
    # compiled, it keeps rather less: this is an upper bound, and needs no compiler here
    plain = parallel.model_copy(update={"compile": False, "device": "cpu"})
    precision = autocast(stage, torch.device(device))
    wanted = {_kind(piece, parallel) for piece in range(parallel.pieces)}
    found: dict[tuple[bool, bool], _Piece] = {}
    orders: list[list[tuple[str, int]]] = []
    with _looking_at_what_is_new():
        for place in dict.fromkeys((0, parallel.pipeline - 1, min(1, parallel.pipeline - 1))):
            if found.keys() == wanted:
                break
            with imagined(plain, rank=first_of(plain, place)) as world:
                model = _model(config, stage.adapter, half=precision is not None)
                spread = Spread(model, world, batch=stage.batch, sequence=stage.sequence, autocast=precision)
                orders = orders or [_orders(spread, each) for each in range(parallel.pipeline)]
                with _without_numbers(device):
                    spread.allocate()
                    for part in spread.parts:
                        if (part.first, part.last) not in found:
                            found[part.first, part.last] = _weigh(part, spread, stage)
    return found, orders


@contextmanager
def _looking_at_what_is_new() -> Iterator[None]:
    """Let the collection of garbage pass over what is here already, again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _model(config: LlamaConfig, adapter: AdapterConfig | None, *, half: bool) -> Llama:
    """Return the model of a stage on the meta device, with its adapter and its base in the form that it rests in."""
    with torch.device("meta"):
        model = Llama(config)
        if adapter is None:
            return model
        if half:  # what is frozen rests in the precision that it is used in
            model = model.to(torch.bfloat16)
        if adapter.base is not None:
            shells(model, adapter.base)
        attach(model, adapter, seed=0)
    return model


@contextmanager
def _without_numbers(device: str) -> Iterator[None]:
    """Let tensors have shapes and dtypes and nothing else, and attention go the way of a device."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        # FSDP compares addresses once, to see whether weights were moved; there are none, and it goes on rightly
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        if device == "cuda":
            stack.enter_context(as_on_cuda())
        yield


def _orders(spread: Spread, place: int) -> list[tuple[str, int]]:
    """Return what a place does: F forward, B backward, or I and W its halves, and with which of its pieces."""
    actions, width = spread.orders(place), spread.world.parallel.pipeline
    return [(a.computation_type.value, a.stage_index // width) for a in actions] or [("F", 0), ("B", 0)]


def _worst(pieces: Sequence[_Piece], orders: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Return activations, logits, gathered and other at the worst moment of a step."""
    flying = [0] * len(pieces)
    worst: dict[str, int] = {"total": -1}
    for what, number in orders:
        if what not in ("F", "B", "I", "W"):
            continue
        here = pieces[number]
        flying[number] += what == "F"
        kept = sum(count * piece.kept for count, piece in zip(flying, pieces, strict=True))
        logits = sum(count * piece.logits_kept for count, piece in zip(flying, pieces, strict=True))
        most = here.forward if what == "F" else here.backward
        total = kept + logits - here.kept - here.logits_kept + most
        if total > worst["total"]:
            logits += here.logits - here.logits_kept
            other = max(0, total - kept - logits - here.gathered)
            worst = {"activations": kept, "logits": logits, "gathered": here.gathered, "other": other, "total": total}
        flying[number] -= what in ("B", "W")
    del worst["total"]
    return worst


def _weigh(part: Part, spread: Spread, stage: StageConfig) -> _Piece:
    """Send a micro-batch forward and backward through a part, twice: the first time makes what stays."""
    optimizer = adamw(part, stage)
    part.micros = [_micro(spread, stage)]
    x = None if part.first else torch.empty_like(spread.residual(), device="cpu").requires_grad_()
    resting = list(chain(part.parameters(), part.buffers()))
    weights, numbers = nbytes(resting), sum(local(parameter.detach()).numel() for parameter in part.parameters())
    handed = (0 if x is None else nbytes([x])) + (0 if part.last else nbytes([spread.residual()]))
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    sharded = nbytes(trained)
    with Weigh([*resting, *_tensors(part.micros[0]), *([] if x is None else [x])]) as scale:
        if part.last:
            part.norm.register_forward_hook(lambda *_: setattr(scale, "label", LOGITS))
        _passes(part, x, scale)
        stays = scale.settle()
        if spread.passes.count > 1:  # a micro-batch in the middle: gradients, and even weights, may stay whole
            spread.accumulate(last=False)
            for parameter in trained:
                parameter.grad = None
            _passes(part, x, scale)
            stays = scale.settle()
        kept, forward, backward = _passes(part, x, scale)
        gathered, logits = scale.peaks.get(GATHERED, 0), scale.peaks.get(LOGITS, 0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = nbytes(value for state in optimizer.state.values() for value in state.values())
    gradients = max(stays, sharded)
    return _Piece(
        weights, gradients, state, kept[""], kept[LOGITS], logits, gathered, forward, backward, handed, numbers
    )


def _passes(part: Part, x: Tensor | None, scale: Weigh) -> tuple[dict[str, int], int, int]:
    """Return what is kept between the passes, by label, and the most at a time in each of them."""
    scale.label, scale.peak = "", 0
    out = part(x, 0)
    scale.label = ""
    kept = {"": 0, LOGITS: 0} | scale.alive()
    forward, scale.peak = scale.peak, 0
    out.backward(torch.empty_like(out))
    if x is not None:
        x.grad = None
    return kept, forward, scale.peak


def _micro(spread: Spread, stage: StageConfig) -> Micro:
    """Return a full micro-batch."""
    rows, length = spread.passes.rows, spread.passes.tokens
    tokens = rows * length
    some = torch.zeros(tokens, dtype=torch.int64)
    wanted = rates(stage)
    noise = Noise(some.clone(), some + length, wanted, spread.config.num_layers) if any(wanted) else None
    micro = Micro(some, (length,) * rows, torch.arange(tokens), some, torch.ones(tokens), noise)
    size = spread.world.parallel.tensor
    return micro.padded(-(-tokens // size) * size)


def _tensors(micro: Micro) -> list[Tensor]:
    found = [micro.ids, micro.learned, micro.targets, micro.weights]
    return found if micro.noise is None else [*found, micro.noise.keys, micro.noise.lengths]
