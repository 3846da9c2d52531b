"""A model over the processes of a run: its passes, its gradients, and its whole tensors again.

Pipeline schedules: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B and interleaved (Narayanan et al. 2021,
arXiv:2104.04473), zero-bubble (Qi et al. 2023, arXiv:2401.10241), all by `torch.distributed.pipelining`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llamero.checkpoint.hf import Region, Spec
from llamero.core import progress
from llamero.model.llama import Llama
from llamero.model.load import EMBEDDING
from llamero.model.weights import Weights, everything
from llamero.parallel.adapted import (
    Plain,
    adapted_layers,
    fill_codes,
    packed_layers,
    plain_specs,
    refuse_cuts,
    whole,
)
from llamero.parallel.layout import layers_of, refuse_impossible
from llamero.parallel.part import Micro, Part
from llamero.parallel.shard import shard
from llamero.parallel.world import World, local

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {"interleaved": ScheduleInterleaved1F1B, "zero-bubble": ScheduleInterleavedZeroBubble}


@dataclass(frozen=True)
class Passes:
    """How often and how large a step goes through the model on one process."""

    count: int
    """Micro-batches."""
    rows: int
    """Packed rows of each, at most."""
    tokens: int
    """Tokens of a packed row, at most."""


class Spread:
    """A model over the processes of a run; over one, it is the model itself.

    Args:
        model: Whole, with the same weights on every process, or on the meta device: then `allocate` and `fill` give
            it this process's share of them. Its modules are taken over.
        world: The processes.
        batch: Rows of a step.
        sequence: Tokens of a row.
        autocast: Precision of products; `None` is that of the weights.

    Raises:
        LlameroError: If the model or the batch does not fit the layout.
    """

    def __init__(
        self, model: Llama, world: World, *, batch: int, sequence: int, autocast: torch.dtype | None = None
    ) -> None:
        parallel = world.parallel
        refuse_impossible(parallel, model.config, batch=batch)
        refuse_cuts(parallel, model)
        self.config, self.world = model.config, world
        self.specs = {name: Spec(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        """Every parameter of the whole model."""
        self.trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        """Those that are not frozen."""
        self.plain_specs = plain_specs(model)
        """Every tensor of the plain model that this one stands for."""
        self.passes = Passes(*parallel.share(batch), sequence)
        pieces, layers = parallel.pieces, model.config.num_layers
        self._mine = range(world.along("pipeline"), pieces, parallel.pipeline)
        self._cuts = [layers_of(piece, pieces=pieces, layers=layers) for piece in range(pieces)]
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        self._ends = _ends(world) if tied and pieces > 1 else None
        self.parts = [Part(model, self._cuts[number], autocast=autocast) for number in self._mine]
        for part in self.parts:
            if not _without_storage(part):
                part.to(world.device)
            shard(part, world, precision=autocast)
        self.module = nn.ModuleList(self.parts)
        self._schedule = self._pipeline() if pieces > 1 else None
        self._total = 1.0

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this process under their names in the whole model."""
        return {name: parameter for part in self.parts for name, parameter in part.named().items()}

    # -- weights

    def allocate(self) -> None:
        """Give a model from the meta device storage for this process's share; nothing is in it yet."""
        parallel = self.world.parallel
        on_cpu = parallel.offload and parallel.data > 1
        for part in self.parts:
            if _without_storage(part):
                part.to_empty(device=torch.device("cpu") if on_cpu else self.world.device)
                if part.tied:
                    part.lm_head.weight = part.embed_tokens.weight

    @torch.no_grad()
    def fill(self, weights: Weights, *, trained: bool = True) -> None:
        """Read this process's share of every parameter, one after the other.

        Args:
            weights: Where from.
            trained: Also those that are not frozen.
        """
        packed = {name: layer for part in self.parts for name, layer in packed_layers(part).items()}
        for name, layer in packed.items():
            fill_codes(name, layer, weights)
        named = {
            name: p
            for name, p in self.named().items()
            if (trained or name not in self.trained) and name.rpartition(".")[0] not in packed
        }
        for name, parameter in progress.track(named.items(), "load", unit="tensors"):
            put_share(parameter, partial(weights.part, name))

    # -- passes

    def losses(
        self,
        micros: Sequence[Micro],
        *,
        total: float = 1.0,
        z_loss: float = 0.0,
        backward: bool = True,
        tally: Float[Tensor, "kinds sources"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return Σ weight·nll / total of this process's micro-batches, or 0 where the last layers are another's.

        It stays on the device, in float64: nobody waits for it here.

        Args:
            micros: As many on every process.
            total: Weight of the whole step.
            z_loss: How much large logits cost.
            backward: Whether to add the gradients to `.grad`.
            tally: In float64, on the device: Σ weight·nll of each source, without z-loss, is added to its first row,
                and how many targets are the likeliest token to its second, if it has one.
        """
        ready = [self._even(micro).to(self.world.device) for micro in micros]
        for part in self.parts:
            part.micros, part.z_loss, part.tally = ready, z_loss, tally
        with torch.set_grad_enabled(backward):
            if self._schedule is not None:
                loss = self._scheduled(total, backward=backward)
            else:
                loss = self._direct(len(ready), total, backward=backward)
        for module in self._sharded():
            module.reshard()  # a forward pass alone leaves the outermost weights whole, or all of them
        return loss

    def _sharded(self) -> Iterator[FSDPModule]:
        """Yield what FSDP spreads: every layer, then all else of a part."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                yield module

    def _direct(self, count: int, total: float, *, backward: bool) -> Tensor:
        (part,) = self.parts
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number in range(count):
            self.accumulate(last=number == count - 1)
            share = part(None, number).sum() / total
            if backward:
                share.backward()
            loss += share.detach()
        return loss

    def accumulate(self, *, last: bool) -> None:
        """Say what the backward pass of a micro-batch does with weights and gradients: see `zero`.

        A pipeline says the same to its parts by itself.
        """
        zero = self.world.parallel.zero_stage if self._schedule is None else 1
        for part in self.parts:
            if isinstance(part, FSDPModule):
                part.set_is_last_backward(last or zero > 1)
                part.set_requires_gradient_sync(last or zero > 1)
                part.set_requires_all_reduce(last)  # between copies, sums of shards are enough
                part.set_reshard_after_backward(last or zero == 3)

    def _scheduled(self, total: float, *, backward: bool) -> Tensor:
        assert self._schedule is not None
        self._total = total
        numbers = torch.arange(self.passes.count)
        heads, tails = (any(getattr(part, end) for part in self.parts) for end in ("first", "last"))
        said: list[Tensor] = []
        keys: dict[str, Any] = {"target": numbers} if tails else {}
        run = self._schedule.step if backward else self._schedule.eval
        run(*((numbers,) if heads else ()), losses=said if tails else None, number=numbers, **keys)
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for share in said:
            loss += share.detach().sum()
        return loss

    def _even(self, micro: Micro) -> Micro:
        """Pad a micro-batch: pipelines send tensors of one shape, and the tensor axis shares tokens evenly."""
        if self._pieces > 1:
            return micro.padded(self._tokens)
        size = self.world.parallel.tensor
        return micro.padded(-(-len(micro.ids) // size) * size)

    @property
    def _pieces(self) -> int:
        return self.world.parallel.pieces

    @property
    def _tokens(self) -> int:
        """Tokens of every micro-batch in a pipeline."""
        size = self.world.parallel.tensor
        return -(-self.passes.rows * self.passes.tokens // size) * size

    def residual(self) -> Tensor:
        """Return what a piece of a pipeline hands on to the next, on the meta device."""
        parallel = self.world.parallel
        tokens = self._tokens // (parallel.tensor if parallel.sequence_parallel else 1)
        return torch.empty(tokens, self.config.hidden_size, device="meta").requires_grad_()

    def orders(self, place: int) -> list[Any]:
        """Return what a place of the pipeline does, pass after pass: torch's `_Action`s; nothing without one."""
        if self._schedule is None:
            return []
        return [action for action in self._schedule.pipeline_order[place] if action is not None]

    def _pipeline(self) -> Any:
        parallel, world = self.world.parallel, self.world
        assert world.mesh is not None
        residual = self.residual()
        number = torch.empty(1, dtype=torch.int64, device="meta")
        stages = []
        for place, part in zip(self._mine, self.parts, strict=True):
            out = torch.empty(1, device="meta").requires_grad_() if part.last else residual
            stages.append(
                PipelineStage(
                    part,
                    place,
                    parallel.pieces,
                    world.device,
                    input_args=(number if part.first else residual,),
                    output_args=(out,),
                    group=world.mesh["pipeline"].get_group(),
                )
            )
        keys: dict[str, Any] = {
            "n_microbatches": self.passes.count,
            "loss_fn": lambda output, target: output.sum() / self._total,
            "scale_grads": False,
        }
        if parallel.schedule in SINGLE:
            return SINGLE[parallel.schedule](stages[0], **keys)
        return SEVERAL[parallel.schedule](stages, **keys)

    # -- gradients

    def clip(self, limit: float, *beside: Float[Tensor, ""]) -> list[float]:
        """Scale the gradients down to a norm of `limit` over all processes.

        Those of a tied table that both ends of a pipeline hold are summed first, so that it stays the same on both.
        This is the one moment of a step in which a process waits for its device.

        Args:
            limit: Largest norm.
            beside: Numbers to be summed over all processes on the way.

        Returns:
            The norm that the gradients had, then the sums.
        """
        by_copies: dict[int, list[Tensor]] = {}
        for name, parameter in self.named().items():
            if parameter.grad is not None:
                grad = parameter.grad = _summed(parameter)
                copies = _copies(grad)
                if self._ends is not None and name == EMBEDDING:
                    dist.all_reduce(local(grad), group=self._ends)  # of two summands, so in no order but one
                    copies *= 2
                by_copies.setdefault(copies, []).append(local(grad))
        norms = [torch.nn.utils.get_total_norm(grads).double() for grads in by_copies.values()]
        numbers = torch.stack([number.to(self.world.device) for number in (*norms, *beside)]).tolist()
        squares = sum(norm**2 / copies for norm, copies in zip(numbers, by_copies, strict=False))
        square, *sums = self.world.sum([squares, *numbers[len(norms) :]])
        norm = math.sqrt(square)
        if limit < norm + 1e-6:
            for grad in (grad for grads in by_copies.values() for grad in grads):
                grad.mul_(limit / (norm + 1e-6))
        return [norm, *sums]

    # -- whole tensors

    def whole(
        self, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter, *, trained: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter whole, one at a time, on the first process; the others take part and get nothing.

        Args:
            of: What is wanted of each, such as the optimizer's moments: of its shape, or one number.
            trained: Leave out frozen parameters.
        """
        named = self.named()
        names = [name for name in self.specs if not trained or name in self.trained]
        yield from self._gathered(names, lambda name, wanted: whole(of(named[name])))

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the plain model as `whole` yields parameters: updates are added, codes decoded."""
        mesh = self.world.mesh["tensor"] if self.world.mesh is not None and self.world.parallel.tensor > 1 else None
        found = {name: layer for part in self.parts for name, layer in adapted_layers(part).items()}
        layers, named = {name: Plain(layer, name, mesh) for name, layer in found.items()}, self.named()

        def value(name: str, wanted: bool) -> Tensor | None:
            owner, _, leaf = name.rpartition(".")
            return layers[owner].tensor(leaf, wanted=wanted) if owner in layers else whole(named[name])

        yield from self._gathered(self.plain_specs, value)

    def _gathered(
        self, names: Iterable[str], value: Callable[[str, bool], Tensor | None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors on the first process, one at a time.

        Args:
            names: Of tensors.
            value: Gathers one from the processes that have parts of it, for those that are told to want it.
        """
        here, world = self.world.along("pipeline"), self.world
        for name in names:
            world.barrier()  # nobody is ahead of the first process by more than a tensor, however slowly it writes
            owner, tensor = self._pipeline_rank(name), None
            if owner == here:
                tensor = value(name, self._sends(owner))
            if owner != 0 and self._sends(owner):
                tensor = self._sent(tensor, owner)
            if world.speaks:
                assert tensor is not None
                yield name, tensor

    def _sends(self, owner: int) -> bool:
        """Return whether this process is the first of the owner's, or the first of all."""
        return self.world.speaks or (owner != 0 and self.world.rank == self._first_of(owner))

    def _first_of(self, pipeline: int) -> int:
        assert self.world.mesh is not None
        return int(self.world.mesh.mesh[pipeline].flatten()[0])

    def _sent(self, value: Tensor | None, owner: int) -> Tensor | None:
        """Bring a tensor to the first process."""
        source = self._first_of(owner)
        if self.world.speaks:
            about: list[Any] = [None]
            dist.recv_object_list(about, src=source)
            value = torch.empty(about[0][0], dtype=about[0][1])
            dist.recv(value, src=source)
            return value
        assert value is not None
        dist.send_object_list([(tuple(value.shape), value.dtype)], dst=0)
        dist.send(value.cpu().contiguous(), dst=0)
        return None

    def _pipeline_rank(self, name: str) -> int:
        """Return which place on the pipeline axis has a parameter."""
        pieces = self._cuts
        kind, *rest = name.removeprefix("model.").split(".")
        if kind == "embed_tokens":
            piece = 0
        elif kind == "layers":
            piece = next(number for number, layers in enumerate(pieces) if int(rest[0]) in layers)
        else:
            piece = len(pieces) - 1
        return piece % self.world.parallel.pipeline


def _ends(world: World) -> dist.ProcessGroup | None:
    """Return the group of a process at one end of the pipeline and the one in its place at the other end.

    They hold the same share of a tied table (Megatron's embedding group). In between there is none; every process must
    ask for it.
    """
    assert world.mesh is not None
    ranks, found = world.mesh.mesh, None
    for pair in zip(ranks[0].flatten().tolist(), ranks[-1].flatten().tolist(), strict=True):
        group = dist.new_group(list(pair))
        if isinstance(group, dist.ProcessGroup):  # it is in this one
            found = group
    return found


def _without_storage(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def put_share(parameter: Tensor, read: Callable[[Region], Tensor]) -> None:
    """Fill what a process holds of a parameter, by a function that reads a rectangle of it."""
    region = region_of(parameter)
    if region is None:
        local(parameter).copy_(local(lying_as(parameter, read(everything(parameter.shape)))))
    else:
        local(parameter).copy_(read(region))


def region_of(parameter: Tensor) -> Region | None:
    """Return which rectangle of a parameter is this process's; `None` where its shard is not one."""
    start, size = [0] * parameter.dim(), list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, place in enumerate(parameter.placements):
            if type(place) is Shard:
                each = -(-size[place.dim] // mesh.size(axis))
                before = min(each * mesh.get_local_rank(axis), size[place.dim])
                start[place.dim] += before
                size[place.dim] = min(each, size[place.dim] - before)
            elif not isinstance(place, Replicate):
                return None
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


def lying_as(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return of a whole tensor what a process holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _summed(parameter: nn.Parameter) -> Tensor:
    """Return a gradient that lies as its parameter does; sums that are still to be made are made.

    That of an embedding over the tensor axis comes whole to every process.
    """
    grad = parameter.grad
    assert grad is not None
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        return grad.redistribute(placements=parameter.placements)
    return grad


def _copies(tensor: Tensor) -> int:
    """Return how many processes hold the same values of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for place, size in sizes if isinstance(place, Replicate))
