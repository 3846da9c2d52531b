"""Bytes that a stage of training needs on each device, weighed on the model itself and not by a formula beside it.

The model is on the meta device, spread as the run spreads it (`parallel.imagined`). Weights are the shards that a
process then has, the optimizer's state is what the optimizer makes of them, and activations are what is alive between
the forward and the backward pass of one micro-batch, counted operation by operation. Layers of one part are alike, so
only the first few of them are run; a pipeline's micro-batches in flight are those of torch's own schedule.
"""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
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
from llamero.parallel.adapted import packed_layers, refuse_cuts
from llamero.parallel.config import ParallelConfig
from llamero.parallel.imagined import first_of, imagined
from llamero.parallel.layout import layers_of, refuse_impossible
from llamero.parallel.part import Micro, Part
from llamero.parallel.spread import Spread
from llamero.parallel.world import local
from llamero.plan import base
from llamero.plan.order import orders
from llamero.plan.weigh import GATHERED, Weigh, nbytes

FEW = (2, 3)
"""Layers of a piece that are run: the third is one that repeats, and what it adds every further one adds."""

FEW_SHARDED = (3, 4)
"""The same where layers are fetched from other devices: with fewer, not as many are fetched ahead."""

LOGITS = "logits"

RUNTIME = 1 << 30
"""Bytes that a process has on each device before it has a model: CUDA's context, its kernels, workspaces of its
libraries, buffers of the communication library. The context is 0.5 to 1 GiB on an A100 or H100."""


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
    runtime: int = 0
    """What a process has on a GPU without any model: `RUNTIME`."""
    host: int = 0
    """In the host's memory, not the device's: what `offload` moves there."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


class Parameters(NamedTuple):
    """How many numbers a model has."""

    all: int
    """Those of an adapter included; a packed weight counts as what it stands for."""
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
    whole: int
    """Those of them that stay from one micro-batch to the next."""
    forward: int
    """The most of all that counts at a time while it goes forward."""
    backward: int
    """The same while it goes backward."""
    handed: int
    """What comes in from the piece before and, as its gradient, from the piece after: for each micro-batch."""
    parameters: int
    """Numbers here."""


class Pieces:
    """Pieces of models that were weighed, kept for other layouts and stages in which they are the same."""

    def __init__(self) -> None:
        self.known: dict[Hashable, _Piece] = {}


def memory(
    config: LlamaConfig,
    stage: StageConfig,
    parallel: ParallelConfig,
    *,
    device: str = "cuda",
    pieces: Pieces | None = None,
) -> list[Memory]:
    """Return what each place of the pipeline needs at its worst moment; one place where there is no pipeline.

    Args:
        config: The model, its vocabulary as it is trained.
        stage: How it is trained. Every row is taken to be full, one document of which everything is learned.
        parallel: Over what devices. Nothing of it has to be there.
        device: `cuda`, or `cpu` for what processes on a CPU hold.
        pieces: What was weighed before, so that it is not weighed again; what is weighed now is added to it.

    Raises:
        LlameroError: If the model cannot have the layout.
    """
    found = []
    count, _ = parallel.share(stage.batch)
    for place, here in enumerate(_places(config, stage, parallel, device=device, pieces=pieces)):
        passes = orders(parallel.schedule, parallel.pipeline, parallel.pieces, count)[place]
        worst = _at_worst(here, [(kind, piece // parallel.pipeline) for kind, piece, _ in passes], parallel, stage)
        found.append(replace(worst, runtime=RUNTIME if device == "cuda" else 0))
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


def parameters(
    config: LlamaConfig,
    stage: StageConfig,
    parallel: ParallelConfig,
    *,
    device: str = "cuda",
    pieces: Pieces | None = None,
) -> Parameters:
    """Return how many numbers a model has in a stage: in all, trained, and on the device that has most.

    Args:
        config: The model.
        stage: How it is trained; with an adapter its factors are all that is.
        parallel: Over what devices.
        device: As of `memory`.
        pieces: As of `memory`.

    Raises:
        LlameroError: If the model cannot have the layout.
    """
    whole, trained = base.parameters(config, stage)
    places = _places(config, stage, parallel, device=device, pieces=pieces)
    return Parameters(whole, trained, max(sum(piece.parameters for piece in here) for here in places))


def _places(
    config: LlamaConfig, stage: StageConfig, parallel: ParallelConfig, *, device: str, pieces: Pieces | None
) -> list[list[_Piece]]:
    """Return the pieces that each place of the pipeline has."""
    refuse_impossible(parallel, config, batch=stage.batch)
    weighed = _Weighed(config, stage, parallel, device, Pieces() if pieces is None else pieces)
    return [
        [weighed.piece(number) for number in range(place, parallel.pieces, parallel.pipeline)]
        for place in range(parallel.pipeline)
    ]


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


class _Size(NamedTuple):
    """What tells pieces of a layout apart."""

    first: bool
    """With the embedding."""
    last: bool
    """With the head."""
    layers: int


_WEIGHS_NOTHING = {
    "name", "mixture", "objective", "learn", "init_from", "overlong", "batch", "batch_tokens", "batch_samples", "steps",
    "epochs", "lr", "min_lr", "warmup", "schedule", "decay", "betas", "eps", "weight_decay", "weight_decay_embeddings",
    "optimizer", "clip", "dropout", "neftune", "eval_every", "probe", "save_every", "keep", "keep_best", "export_best",
    "export", "export_optimizer",
}  # fmt: skip
"""Keys of a stage in which two may differ whose pieces weigh the same. Of rows and noise it counts how many there are,
and of what kind: `_Weighed.about`."""

_DECIDES = ("sharded", "replicate", "tensor", "sequence_parallel", "recompute", "zero_stage", "offload", "reduce_dtype")
"""What of a layout a piece depends on, but for whether it is one of a pipeline."""


class _Weighed:
    """The pieces of one layout, each weighed when it is asked for, if nobody has before."""

    def __init__(
        self, config: LlamaConfig, stage: StageConfig, parallel: ParallelConfig, device: str, pieces: Pieces
    ) -> None:
        self.config, self.stage, self.parallel, self.device = config, stage, parallel, device
        self.known = pieces.known
        count, rows = parallel.share(stage.batch)
        self.about: Hashable = (
            repr(replace(config, num_layers=1)),
            stage.model_dump_json(exclude=_WEIGHS_NOTHING),
            tuple(map(bool, rates(stage))),
            device,
            (count > 1, rows),
            parallel.pipeline > 1,
            tuple(getattr(parallel, key) for key in _DECIDES),
        )
        cuts = [layers_of(piece, pieces=parallel.pieces, layers=config.num_layers) for piece in range(parallel.pieces)]
        self.sizes = [_Size(n == 0, n == parallel.pieces - 1, len(layers)) for n, layers in enumerate(cuts)]
        self.few = FEW if parallel.data == 1 else FEW_SHARDED
        repeats = max(size.layers for size in self.sizes) > self.few[1]
        self.repeats = repeats
        """Whether not all layers are run."""
        wanted = dict.fromkeys(each for size in self.sizes for each in self._needed(size))
        self._weigh([size for size in wanted if (self.about, size) not in self.known])

    def _needed(self, size: _Size) -> tuple[_Size, ...]:
        """Return what has to be run for a piece: itself; or one with few layers, and two that differ in one layer."""
        if not self.repeats:
            return (size,)
        # layers add the same to every piece; only casts of factors are not kept everywhere
        like = size if self.stage.adapter is not None else self.sizes[min(1, len(self.sizes) - 1)]
        few, more = self.few
        return size._replace(layers=more), like._replace(layers=few), like._replace(layers=more)

    def piece(self, number: int) -> _Piece:
        """Return the bytes of a piece: those of one with a few layers, and for every further one what a layer adds."""
        size = self.sizes[number]
        run = [self.known[self.about, each] for each in self._needed(size)]
        if not self.repeats:
            return run[0]
        more = size.layers - self.few[1]
        return _Piece(*(start + more * (b - a) for start, a, b in zip(*run, strict=True)))

    def _weigh(self, wanted: Iterable[_Size]) -> None:
        """Run pieces, layer by layer."""
        missing, last = set(wanted), self.parallel.pipeline - 1
        with _looking_at_what_is_new():
            for layers in sorted({size.layers for size in missing}):
                for place in dict.fromkeys((0, last, min(1, last))):
                    numbers = range(place, self.parallel.pieces, self.parallel.pipeline)
                    if missing & {self.sizes[number]._replace(layers=layers) for number in numbers}:
                        self._weigh_place(place, layers, missing)

    def _weigh_place(self, place: int, layers: int, missing: set[_Size]) -> None:
        """Run those pieces of a place that are missing, each with some layers."""
        # compiled, it keeps rather less: this is an upper bound, and needs no compiler here
        plain = self.parallel.model_copy(update={"compile": False, "device": "cpu"})
        config = replace(self.config, num_layers=plain.pieces * layers)
        precision = autocast(self.stage, torch.device(self.device))
        with imagined(plain, rank=first_of(plain, place)) as world:
            model = _model(config, self.stage.adapter, half=precision is not None)
            spread = Spread(model, world, batch=self.stage.batch, sequence=self.stage.sequence, autocast=precision)
            with _without_numbers(self.device):
                spread.allocate()
                for part in spread.parts:
                    size = _Size(part.first, part.last, layers)
                    if size in missing:
                        self.known[self.about, size] = _weigh(part, spread, self.stage)
                        missing.remove(size)


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


def _worst(pieces: Sequence[_Piece], passes: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Return activations, logits, gathered and other at the worst moment of a step."""
    flying = [0] * len(pieces)
    worst: dict[str, int] = {"total": -1}
    for what, number in passes:
        here = pieces[number]
        flying[number] += what == "F"
        kept = sum(count * piece.kept for count, piece in zip(flying, pieces, strict=True))
        logits = sum(count * piece.logits_kept for count, piece in zip(flying, pieces, strict=True))
        most = here.forward if what == "F" else here.backward
        beside = sum(piece.whole for piece in pieces) - here.whole
        total = kept + logits - here.kept - here.logits_kept + most + beside
        if total > worst["total"]:
            logits += here.logits - here.logits_kept
            gathered = here.gathered + beside
            other = max(0, total - kept - logits - gathered)
            worst = {"activations": kept, "logits": logits, "gathered": gathered, "other": other, "total": total}
        flying[number] -= what in ("B", "W")
    del worst["total"]
    return worst


def _weigh(part: Part, spread: Spread, stage: StageConfig) -> _Piece:
    """Send a micro-batch forward and backward through a part, twice: the first time makes what stays."""
    optimizer = adamw(part, stage)
    part.micros = [_micro(spread, stage)]
    x = None if part.first else torch.empty_like(spread.residual(), device="cpu").requires_grad_()
    resting = list(chain(part.parameters(), part.buffers()))
    weights, here = nbytes(resting), _numbers(part)  # before a pass leaves weights whole
    handed = (0 if x is None else nbytes([x])) + (0 if part.last else nbytes([spread.residual()]))
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    sharded = nbytes(trained)
    with Weigh([*resting, *_tensors(part.micros[0]), *([] if x is None else [x])]) as scale:
        if part.last:
            part.norm.register_forward_hook(lambda *_: setattr(scale, "label", LOGITS))
        spread.accumulate(last=True)  # a part that was weighed before has changed it
        _passes(part, x, scale)
        stays = scale.settle()
        if spread.passes.count > 1 and spread.world.parallel.data > 1:
            # a micro-batch in the middle: gradients, and even weights, may stay whole
            spread.accumulate(last=False)
            for parameter in trained:
                parameter.grad = None
            _passes(part, x, scale)
            stays = scale.settle()
        whole = scale.alive().get(GATHERED, 0)
        kept, forward, backward = _passes(part, x, scale)
        gathered, logits = scale.peaks.get(GATHERED, 0), scale.peaks.get(LOGITS, 0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = nbytes(value for state in optimizer.state.values() for value in state.values())
    gradients = max(stays, sharded)
    return _Piece(
        weights,
        gradients,
        state,
        kept[""],
        kept[LOGITS],
        logits,
        gathered,
        whole,
        forward,
        backward,
        handed,
        here,
    )


def _numbers(part: Part) -> int:
    """Return how many numbers of a part are on this device; a packed layer has those that its codes stand for."""
    packed = packed_layers(part).values()
    codes = {id(getattr(layer, name)) for layer in packed for name in layer.names}
    plain = sum(local(p.detach()).numel() for p in part.parameters() if id(p) not in codes)
    for layer in packed:
        code = getattr(layer, layer.names[0])
        plain += layer.in_features * layer.out_features * local(code).numel() // code.numel()
    return plain


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
