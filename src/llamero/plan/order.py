"""Who computes what in which order in a pipeline, and how long all of it takes: torch's schedules, played with times.

The orders are those that `torch.distributed.pipelining` runs: GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B
(arXiv:2104.04473), zero bubble (arXiv:2401.10241, ZB1P).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from llamero.parallel.config import Schedule
from llamero.parallel.spread import SEVERAL

Kind = Literal["F", "B", "I", "W"]
"""Forward; backward; its half that gives gradients of inputs; its half that gives gradients of weights."""


class Action(NamedTuple):
    """One pass of one micro-batch through one piece of the model."""

    kind: Kind
    piece: int
    micro: int


class Durations(NamedTuple):
    """Seconds of the passes of a micro-batch through one piece."""

    forward: float
    inputs: float
    """Backward, gradients of inputs and what is recomputed."""
    weights: float
    """Backward, gradients of weights."""

    def of(self, kind: Kind) -> float:
        """Return the seconds of one kind of pass."""
        halves = {"I": self.inputs, "W": self.weights}
        return self.forward if kind == "F" else halves.get(kind, self.inputs + self.weights)


@cache
def orders(schedule: Schedule, ranks: int, pieces: int, micros: int) -> tuple[tuple[Action, ...], ...]:
    """Return what each rank of a pipeline does, in order.

    Args:
        schedule: Its name in a recipe.
        ranks: Devices along the pipeline.
        pieces: Pieces of the model; rank r has r, r + ranks and so on.
        micros: Micro-batches of a step.
    """
    if schedule in SEVERAL:
        return tuple(_of_torch(SEVERAL[schedule], ranks, pieces, micros, rank) for rank in range(ranks))
    ahead = micros if schedule == "gpipe" else 0
    return tuple(_single(rank, micros, warm=min(micros, ahead or ranks - rank)) for rank in range(ranks))


_KINDS: Mapping[str, Kind] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def _single(rank: int, micros: int, *, warm: int) -> tuple[Action, ...]:
    """Return the order of a rank with one piece: some forward passes, then backward and forward in turn."""
    done = [Action("F", rank, micro) for micro in range(warm)]
    for micro in range(micros):
        done.append(Action("B", rank, micro))
        if micro + warm < micros:
            done.append(Action("F", rank, micro + warm))
    return tuple(done)


def _of_torch(kind: type[Any], ranks: int, pieces: int, micros: int, rank: int) -> tuple[Action, ...]:
    """Return the order of a rank that torch computes; the schedule is asked without the processes it would run on."""
    schedule = object.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages, schedule.rank = ranks, pieces // ranks, rank
    schedule._n_microbatches = micros
    schedule.number_of_rounds = max(1, micros // ranks)
    schedule.microbatches_per_round = micros // schedule.number_of_rounds
    planned = schedule._calculate_single_rank_operations(rank)
    return tuple(
        Action(_KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)
        for action in planned
        if action is not None
    )


def seconds(
    schedule: Schedule, ranks: int, micros: int, durations: Sequence[Durations], *, hop: float
) -> tuple[float, list[float]]:
    """Return how long a step's passes take, and how long each rank of the pipeline computes in that time.

    Args:
        schedule: Its name in a recipe.
        ranks: Devices along the pipeline.
        micros: Micro-batches of a step.
        durations: Of each piece.
        hop: Seconds from one rank to the next.
    """
    pieces = len(durations)
    plans = orders(schedule, ranks, pieces, micros)
    done: dict[Action, float] = {}
    at, free = [0] * ranks, [0.0] * ranks
    left = sum(map(len, plans))
    while left:
        before = left
        for rank, plan in enumerate(plans):
            while at[rank] < len(plan):
                action = plan[at[rank]]
                ready = _ready(action, done, pieces, hop)
                if ready is None:
                    break
                free[rank] = max(free[rank], ready) + durations[action.piece].of(action.kind)
                done[action._replace(kind="B") if action.kind == "I" else action] = free[rank]
                at[rank] += 1
                left -= 1
        assert left < before, f"{schedule} over {ranks} ranks waits for itself"
    busy = [sum(durations[action.piece].of(action.kind) for action in plan) for plan in plans]
    return max(free), busy


def _ready(action: Action, done: Mapping[Action, float], pieces: int, hop: float) -> float | None:
    """Return when what an action needs is there, or nothing while that is not known."""
    if action.kind == "W":
        return done.get(Action("B", action.piece, action.micro))
    if action.kind == "F":
        return 0.0 if action.piece == 0 else _after(done, Action("F", action.piece - 1, action.micro), hop)
    if action.piece == pieces - 1:
        return done.get(Action("F", action.piece, action.micro))
    return _after(done, Action("B", action.piece + 1, action.micro), hop)


def _after(done: Mapping[Action, float], action: Action, hop: float) -> float | None:
    return None if action not in done else done[action] + hop
