"""The fastest layouts that a model can have on a cluster and that fit its memory.

All legal layouts are ranked by the time of a step; from the fastest on each is weighed (`memory`) until as many fit as
are asked for. A rough count, which runs low, says which need not be weighed, and never that one fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.parallel.config import ParallelConfig
from llamero.parallel.layout import refuse_impossible
from llamero.plan.order import orders
from llamero.plan.time import Layout, Parts, Work, layer_weights, step_time

if TYPE_CHECKING:
    from llamero.model.config import LlamaConfig
    from llamero.plan.cluster import Cluster
    from llamero.plan.memory import Memory

Refuse = Callable[[ParallelConfig], None]
"""Raises a `LlameroError` where a model cannot have a layout."""
Weigh = Callable[[ParallelConfig], "Memory"]
"""Returns what the fullest device holds under a layout."""

ROOM = 0.94
"""Share of a device's memory that a plan may fill: the rest is what the allocator cannot use. What the driver and the
communication library take is counted (`memory.RUNTIME`)."""

MOST_LOW = 1.25
"""The rough count is raised by what it was low by, in layouts of the same kind that were weighed; at most by this."""


@dataclass(frozen=True)
class Candidate:
    """A layout, how long its step takes and what it needs."""

    parallel: ParallelConfig
    parts: Parts
    memory: Memory | None = None
    """Of the fullest device."""

    def fits(self, capacity: float) -> bool:
        """Return whether it was weighed and fits."""
        return self.memory is not None and self.memory.total <= ROOM * capacity


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: Sequence[Candidate]
    """Those that fit, the fastest first."""
    legal: int
    """Layouts that the model can have."""
    hopeless: int
    """Those that were passed over because already a rough count of their bytes is more than what is there."""
    weighed: int
    gave_up: bool = False
    """Whether it stopped weighing before it found as many as were asked for."""


def possible(
    config: LlamaConfig, cluster: Cluster, *, batch: int, like: ParallelConfig, refuse: Refuse | None = None
) -> Iterator[ParallelConfig]:
    """Yield every layout that the model can have, in no order.

    Args:
        config: The model.
        cluster: Its devices; tensor parallelism stays inside a node.
        batch: Rows of a step.
        like: Gives what is not searched: compilation, precision of sums.
        refuse: Refuses what the model cannot have; `refuse_impossible` by default.
    """
    refuse = refuse or partial(refuse_impossible, config=config, batch=batch)
    gpus = cluster.gpus
    for tensor, pipeline in product(_divisors(cluster.per_node), _divisors(gpus)):
        if gpus % (tensor * pipeline) or tensor * pipeline > gpus:
            continue
        data = gpus // (tensor * pipeline)
        if data > batch or pipeline > config.num_layers:
            continue
        for keys in _keys(data, pipeline, rows=-(-batch // data)):
            made = _made({**like.model_dump(), **keys, "gpus": gpus, "tensor": tensor, "pipeline": pipeline})
            if made is not None and _legal(made, refuse):
                yield made


def _keys(data: int, pipeline: int, *, rows: int) -> Iterator[dict[str, Any]]:
    """Yield the other keys of layouts whose data axes have as many devices, each with some rows of a step."""
    copies = [number for number in _divisors(data) if number == 1 or data // number >= 2]
    schedules = [("1f1b", 2)] if pipeline == 1 else [("1f1b", 2), ("interleaved", 2), ("zero-bubble", 2)]
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= rows]
    for replicate, (schedule, stages), size, recompute in product(
        copies, schedules, sizes, ("none", "selective", "full")
    ):
        several = size < rows
        zeros: list[int | None] = [None] if data == 1 or not several else [3, 1] if pipeline > 1 else [3, 2, 1]
        for zero in zeros:
            yield {
                "replicate": replicate,
                "shard": data // replicate,
                "schedule": schedule,
                "stages_per_rank": stages,
                "micro_batch": size,
                "recompute": recompute,
                "zero": zero,
                "offload": False,
                "sequence_parallel": True,
            }


def _made(keys: dict[str, Any]) -> ParallelConfig | None:
    try:
        return ParallelConfig.model_validate(keys)
    except ValidationError:
        return None


def _legal(parallel: ParallelConfig, refuse: Refuse) -> bool:
    try:
        refuse(parallel)
    except LlameroError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def search(
    work: Work,
    cluster: Cluster,
    *,
    batch: int,
    like: ParallelConfig,
    weigh: Weigh,
    refuse: Refuse | None = None,
    count: int = 3,
    most: int = 10,
) -> Found:
    """Return the fastest layouts that fit.

    Args:
        work: What a step computes.
        cluster: On what.
        batch: Rows of a step.
        like: Gives what is not searched.
        weigh: Tells what a layout needs.
        refuse: Refuses what the model cannot have; `refuse_impossible` by default.
        count: How many are wanted; of those that differ only in what changes little, the fastest.
        most: How many are weighed at most; three times as many while none of them fits.
    """
    config, capacity = work.config, cluster.accelerator.memory_gib * 2**30
    layouts = possible(config, cluster, batch=batch, like=like, refuse=refuse)
    legal = list(progress.track(layouts, "layouts", unit="layouts"))
    hopeful = [parallel for parallel in legal if rough_bytes(work, parallel, batch) <= ROOM * capacity]
    ranked = [
        Candidate(parallel, step_time(work, Layout.of(parallel, batch), cluster))
        for parallel in progress.track(hopeful, "time", unit="layouts")
    ]
    ranked.sort(key=lambda candidate: candidate.parts.total)
    best: list[Candidate] = []
    too_large: list[ParallelConfig] = []
    low: dict[tuple[bool, str], float] = {}
    weighed = 0
    with progress.Line("memory", total=most, unit="layouts") as line:
        for candidate in ranked:
            if len(best) == count or weighed >= (most if best else 3 * most):
                break
            parallel = candidate.parallel
            if any(_alike(parallel, other.parallel) for other in best):
                continue
            if any(_needs_more(parallel, other) for other in too_large):
                continue
            rough, kind = rough_bytes(work, parallel, batch), (parallel.pipeline > 1, parallel.recompute)
            if rough * min(MOST_LOW, low.get(kind, 1.0)) > ROOM * capacity:
                continue
            memory = weigh(parallel)
            candidate = replace(candidate, memory=memory)
            low[kind] = min(low.get(kind, math.inf), memory.total / rough)
            weighed += 1
            line.advance(1, brief(parallel))
            if candidate.fits(capacity):
                best.append(candidate)
            else:
                too_large.append(parallel)
    gave_up = weighed >= most and len(best) < count
    return Found(best, len(legal), len(legal) - len(hopeful), weighed, gave_up)


def _alike(one: ParallelConfig, other: ParallelConfig) -> bool:
    """Return whether two layouts have the same axes and schedule, and differ in what trades memory for time."""
    return _axes(one) == _axes(other)


def _axes(parallel: ParallelConfig) -> tuple[object, ...]:
    schedule = parallel.schedule if parallel.pipeline > 1 else None
    return (parallel.replicate, parallel.sharded, parallel.tensor, parallel.pipeline, schedule)


_MEMORY = ("full", "selective", "none")


def _needs_more(one: ParallelConfig, other: ParallelConfig) -> bool:
    """Return whether a layout needs no less than another with the same axes, which did not fit."""
    return (
        _axes(one) == _axes(other)
        and one.micro_batch >= other.micro_batch
        and _MEMORY.index(one.recompute) >= _MEMORY.index(other.recompute)
        and one.zero_stage <= other.zero_stage
    )


def rough_bytes(work: Work, parallel: ParallelConfig, batch: int) -> float:
    """Return about how many bytes the first device holds; fewer than it does, to pass over what is too large.

    16 bytes a trained parameter for weight, gradient and AdamW's moments in fp32; in a layer for each token what
    products put out in 16 bits (Korthikanti et al. 2022, arXiv:2205.05198, section 4) and the residual in fp32.
    """
    c, t = work.config, parallel.tensor
    layout = Layout.of(parallel, batch)
    ends = c.vocab_size * c.hidden_size * (2 if parallel.pipeline == 1 else 1)
    whole = (c.num_layers * layer_weights(c) / parallel.pipeline + ends) / t
    resting = whole * (2 if work.frozen else 16) / layout.fsdp
    if layout.fsdp > 1 and parallel.zero_stage < 3:
        resting += whole * (2 if parallel.zero_stage == 2 or work.frozen else 6)
    inner, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    token = 4 * c.hidden_size / (t if parallel.sequence_parallel else 1)
    if parallel.recompute != "full":
        token += (4 * inner + 4 * kv + 4 * c.intermediate_size) / t + 4 * c.hidden_size
    if parallel.recompute == "none":
        token += 12 * c.hidden_size + 4 * c.intermediate_size / t
    here = c.num_layers / parallel.pieces
    kept = layout.rows * work.sequence * token * here * _in_flight(parallel, layout.micros)
    return resting + kept


def _in_flight(parallel: ParallelConfig, micros: int) -> int:
    """Return how many micro-batches of a piece the first device holds at most."""
    if parallel.pipeline == 1:
        return 1
    most = flying = 0
    for action in orders(parallel.schedule, parallel.pipeline, parallel.pieces, micros)[0]:
        flying += action.kind == "F"
        most = max(most, flying)
        flying -= action.kind in ("B", "W")
    return most


def brief(parallel: ParallelConfig) -> str:
    """Return a layout in a few words, what is 1 or usual left out."""
    axes = [(name, getattr(parallel, name)) for name in ("tensor", "pipeline", "replicate")]
    said = [f"{name} {size}" for name, size in axes if size > 1]
    if parallel.sharded > 1:
        said.append(f"shard {parallel.sharded}")
    if parallel.pipeline > 1:
        said.append(parallel.schedule)
    if parallel.recompute != "none":
        said.append(f"recompute {parallel.recompute}")
    if parallel.micro_batch:
        said.append(f"micro_batch {parallel.micro_batch}")
    if parallel.sharded > 1 and parallel.zero is not None:
        said.append(f"zero {parallel.zero}")
    return ", ".join([*said, *(["offload"] if parallel.offload else []), *(["compile"] if parallel.compile else [])])


def less(parallel: ParallelConfig, *, micro: int) -> Iterator[ParallelConfig]:
    """Yield layouts with the same axes that need less memory, those that cost least time first.

    Args:
        parallel: The layout.
        micro: Rows of its micro-batches.
    """
    trials: list[dict[str, Any]] = [{"recompute": "selective"}, {"micro_batch": 1}]
    trials += [{"recompute": "selective", "micro_batch": 1}, {"recompute": "full"}]
    trials += [{"recompute": "full", "micro_batch": 1}, {"recompute": "full", "micro_batch": 1, "zero": 3}]
    trials += [{"recompute": "full", "micro_batch": 1, "zero": 3, "offload": True}]
    seen = [parallel.model_dump()]
    for keys in trials:
        weaker = _MEMORY.index(str(keys.get("recompute", parallel.recompute))) > _MEMORY.index(parallel.recompute)
        if micro == 1:
            keys.pop("micro_batch", None)
        made = _made({**parallel.model_dump(), **keys})
        if made is not None and not weaker and made.model_dump() not in seen:
            seen.append(made.model_dump())
            yield made
