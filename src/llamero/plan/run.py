"""plan: a recipe and a cluster in, what each stage needs and how long it takes out; without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llamero.core.errors import LlameroError
from llamero.core.hardware import ACCELERATORS, Accelerator, of_device
from llamero.engine.stage import DropoutConfig, StageConfig
from llamero.model.config import LlamaConfig
from llamero.parallel.config import ParallelConfig
from llamero.plan import base
from llamero.plan.cluster import Cluster
from llamero.plan.data import Data, Said, of_stage
from llamero.plan.memory import Memory, Pieces, memory, parameters, refusal
from llamero.plan.search import ROOM, Candidate, Found, less, search
from llamero.plan.serving import least, serving
from llamero.plan.time import Layout, Parts, Work, peak, step_time
from llamero.recipe.schema import Recipe


@dataclass(frozen=True)
class Figures:
    """What a step's time comes to."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Operations that the tokens need, over those that the devices have."""
    hours: float | None
    """Of all steps; nothing where their number is not known."""
    gpu_hours: float | None


@dataclass(frozen=True)
class Planned:
    """A layout of a stage, what it needs and how long it takes."""

    parallel: ParallelConfig
    parts: Parts
    figures: Figures
    memory: tuple[Memory, ...]
    """Of each place of the pipeline."""
    fits: bool
    parameters_per_rank: int
    """Numbers on the device that has most of them."""

    @property
    def fullest(self) -> int:
        """Return the place of the pipeline that needs most."""
        return max(range(len(self.memory)), key=lambda place: self.memory[place].total)


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs on a cluster."""

    name: str
    parameters: int
    """Those of an adapter included."""
    trained: int
    data: Data
    resized: str
    """What of the recipe's layout is other here, where the cluster has another number of devices."""
    own: Planned | None
    """With the recipe's own layout."""
    refused: str
    """Why the recipe's layout cannot be had, if it cannot."""
    ways: tuple[Planned, ...]
    """If the recipe's layout does not fit: the first with its axes that does."""
    found: Found
    best: tuple[Planned, ...]


@dataclass(frozen=True)
class Served:
    """What a release needs to run in one form."""

    form: str
    memory: Memory | None
    """On one device, as if it were large enough; nothing where it is not foretold."""
    least: Mapping[str, int | None]
    """Fewest devices of each kind, by its name; nothing where none are enough."""
    unknown: str = ""
    """Why nothing is foretold."""


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a cluster."""

    name: str
    cluster: Cluster
    config: LlamaConfig
    known_from: str
    stages: tuple[StagePlan, ...]
    served: tuple[Served, ...]
    """The release as it is exported, then its variants."""
    context: int
    """Tokens of the one sequence that is served."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        device = self.cluster.accelerator
        return {
            "recipe": self.name,
            "cluster": {
                "accelerator": device.name,
                "memory_gib": device.memory_gib,
                "gpus": self.cluster.gpus,
                "per_node": self.cluster.per_node,
                "network_gbit_s_per_gpu": self.cluster.network_gbit_s,
            },
            "model": {**self.config.to_hf(dtype="bfloat16"), "known_from": self.known_from},
            "stages": [_stage_json(stage) for stage in self.stages],
            "to_run": {"context": self.context, "sequences": 1, "forms": [_served_json(form) for form in self.served]},
        }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return {
        "name": stage.name,
        "parameters": stage.parameters,
        "trained_parameters": stage.trained,
        "data": {**asdict(stage.data), "tokens": stage.data.tokens},
        "resized": stage.resized or None,
        "own": None if stage.own is None else _planned_json(stage.own),
        "refused": stage.refused or None,
        "would_fit": [_planned_json(way) for way in stage.ways],
        "best": [_planned_json(one) for one in stage.best],
        "search": {
            "legal": stage.found.legal,
            "passed_over": stage.found.hopeless,
            "weighed": stage.found.weighed,
            "gave_up": stage.found.gave_up,
        },
    }


def _served_json(served: Served) -> dict[str, Any]:
    if served.memory is None:
        return {"form": served.form, "unknown": served.unknown}
    memory = {**asdict(served.memory), "total": served.memory.total}
    return {"form": served.form, "memory_bytes": memory, "least": dict(served.least)}


def _planned_json(planned: Planned) -> dict[str, Any]:
    return {
        "parallel": planned.parallel.model_dump(mode="json"),
        "fits": planned.fits,
        "parameters_per_rank": planned.parameters_per_rank,
        "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in planned.memory],
        "seconds": asdict(planned.parts),
        **asdict(planned.figures),
    }


def accelerator_here() -> Accelerator:
    """Return the device of this machine.

    Raises:
        LlameroError: If there is none that is known.
    """
    fix = f"say --on with one of: {', '.join(ACCELERATORS)}"
    if not torch.cuda.is_available():
        raise LlameroError("for which GPU? There is none here", fix=fix)
    found = of_device(torch.cuda.get_device_name())
    if found is None:
        raise LlameroError(f"`{torch.cuda.get_device_name()}` is not in the table", fix=fix)
    return found


class Planning:
    """A plan in the making, so that each stage can be shown when it is done.

    Args:
        recipe: The recipe.
        root: Directory that its relative paths start from.
        out: Its run directory, in which data may stand tokenized already.
        cluster: The devices, as many as are to be used.
        said: What somebody says of the data of a stage, by its name.
        best: How many layouts are suggested.
        context: Tokens of a sequence when the release is served; the longest that the model has by default.

    Raises:
        LlameroError: If nobody knows the base's shape.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        root: Path,
        out: Path,
        cluster: Cluster,
        said: Mapping[str, Said] | None = None,
        best: int = 3,
        context: int | None = None,
    ) -> None:
        config, self.known_from = base.base_config(recipe, root)
        self.recipe, self.cluster = recipe, cluster
        self.config = base.trained_config(config, recipe) if recipe.train else config
        self.context = self.config.max_position_embeddings if context is None else context
        self._out, self._said, self._best = out, said or {}, best
        self._pieces = Pieces()

    def stage(self, stage: StageConfig) -> StagePlan:
        """Return what one of the recipe's stages needs.

        Raises:
            LlameroError: If the devices lack its precision.
        """
        data = of_stage(stage, self.recipe, self._out, self._said.get(stage.name))
        return _Stage(stage, self.config, data, self.cluster, self._pieces).plan(self.recipe, self._best)

    def served(self) -> tuple[Served, ...]:
        """Return what the release needs to run: as its last stage exports it, and its variants."""
        exported = self.recipe.train[-1].export if self.recipe.train else "bfloat16"
        quantize = self.recipe.quantize
        forms = [exported, *(quantize.variants if quantize else ())]
        sym = quantize is None or quantize.sym
        return tuple(_served(self.config, form, self.context, sym=sym) for form in forms)

    def whole(self, stages: Sequence[StagePlan]) -> Plan:
        """Return all of it."""
        name, cluster, config = self.recipe.name, self.cluster, self.config
        return Plan(name, cluster, config, self.known_from, tuple(stages), self.served(), self.context)


def _served(config: LlamaConfig, form: str, context: int, *, sym: bool) -> Served:
    try:
        memory = serving(config, form, context=context, sym=sym)
        return Served(form, memory, least(config, form, context=context, sym=sym))
    except LlameroError as error:  # a form whose size nobody knows yet is no reason not to plan the rest
        return Served(form, None, {}, error.problem)


class _Stage:
    def __init__(self, stage: StageConfig, config: LlamaConfig, data: Data, cluster: Cluster, pieces: Pieces) -> None:
        self.stage, self.config, self.data, self.cluster = stage, config, data, cluster
        self.precision = "fp32" if stage.precision == "float32" else "bf16"
        peak(cluster.accelerator, self.precision)  # or say that it has none
        self.work = Work(
            config,
            stage.sequence,
            attended=data.attended,
            learned=data.learned,
            precision=self.precision,
            frozen=stage.adapter is not None,
        )
        self.pieces = pieces
        rows = {"batch": data.rows, "batch_samples": None, "batch_tokens": None}
        self.full = stage.model_copy(update=rows)
        """The stage as its largest step is."""
        self.refuse = refusal(config, self.full)

    def plan(self, recipe: Recipe, best: int) -> StagePlan:
        """Return what is needed with the recipe's layout, and with the best ones."""
        own, resized, refused = self._own(recipe.parallel)
        ways = () if own is None or own.fits else self._ways(own.parallel)
        found = search(
            self.work,
            self.cluster,
            batch=self.data.rows,
            like=recipe.parallel,
            weigh=lambda parallel: max(self._weigh(parallel), key=lambda one: one.total),
            refuse=self.refuse,
            count=best,
        )
        whole, trained = base.parameters(self.config, self.stage)
        data = self.data
        if self.stage.dropout != DropoutConfig():
            data = replace(data, notes=(*data.notes, "drawing what is dropped takes time that is not counted here"))
        best_ones = tuple(map(self._of, found.best))
        return StagePlan(self.stage.name, whole, trained, data, resized, own, refused, ways, found, best_ones)

    def _own(self, parallel: ParallelConfig) -> tuple[Planned | None, str, str]:
        """Return the recipe's layout on this cluster, what is other there, and why it cannot be."""
        resized = ""
        try:
            if parallel.gpus != self.cluster.gpus:
                parallel, resized = resize(parallel, self.cluster.gpus)
            self.refuse(parallel)
        except LlameroError as error:
            return None, resized, f"{error.problem}; {error.fix}" if error.fix else error.problem
        return self._planned(parallel), resized, ""

    def _ways(self, parallel: ParallelConfig) -> tuple[Planned, ...]:
        """Return the first layout with the same axes that fits."""
        _, size = parallel.share(self.data.rows)
        for other in less(parallel, micro=size):
            planned = self._planned(other)
            if planned.fits:
                return (planned,)
        return ()

    def _planned(self, parallel: ParallelConfig) -> Planned:
        parts = step_time(self.work, Layout.of(parallel, self.data.rows), self.cluster)
        return self._of(Candidate(parallel, parts))

    def _of(self, candidate: Candidate) -> Planned:
        needs = self._weigh(candidate.parallel)
        room = ROOM * self.cluster.accelerator.memory_gib * 2**30
        fits = max(memory.total for memory in needs) <= room
        numbers = parameters(self.config, self.full, candidate.parallel, pieces=self.pieces).per_rank
        return Planned(candidate.parallel, candidate.parts, self._figures(candidate.parts), needs, fits, numbers)

    def _weigh(self, parallel: ParallelConfig) -> tuple[Memory, ...]:
        return tuple(memory(self.config, self.full, parallel, pieces=self.pieces))

    def _figures(self, parts: Parts) -> Figures:
        gpus, tokens, seconds = self.cluster.gpus, self.data.step_tokens, parts.total
        hours = None if self.data.steps is None else self.data.steps * seconds / 3600
        return Figures(
            step_seconds=seconds,
            tokens_per_second_per_gpu=tokens / seconds / gpus,
            mfu=self.work.flops(tokens) / (seconds * gpus * peak(self.cluster.accelerator, self.precision)),
            hours=hours,
            gpu_hours=None if hours is None else hours * gpus,
        )


def resize(parallel: ParallelConfig, gpus: int) -> tuple[ParallelConfig, str]:
    """Return a layout on another number of devices, and what is other in it.

    Its tensor and pipeline axes stay. Where it has copies (`replicate`), there are more or fewer of them, if that comes
    out even; else `shard` takes what is left.

    Args:
        parallel: The layout.
        gpus: Devices.

    Raises:
        LlameroError: If the axes that stay do not divide them.
    """
    copy = parallel.sharded * parallel.tensor * parallel.pipeline
    copies = parallel.replicate > 1 and gpus % copy == 0
    axes = {"replicate": gpus // copy, "shard": parallel.sharded} if copies else {"shard": None}
    try:
        made = ParallelConfig.model_validate({**parallel.model_dump(), "gpus": gpus, **axes})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise LlameroError(problem, where="parallel") from error
    name, sizes = ("replicate", (parallel.replicate, made.replicate)) if copies else (
        "shard", (parallel.sharded, made.sharded)
    )  # fmt: skip
    said = f"it is for {parallel.gpus} GPUs; on {gpus} `{name}` becomes {sizes[1]} instead of {sizes[0]}"
    return made, said
