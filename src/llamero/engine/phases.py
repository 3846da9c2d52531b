"""Where the time of a step goes, on the process where each part of it takes longest."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llamero.parallel.world import World

PHASES = ("data", "forward_backward", "clip", "optimizer", "validation", "save", "probe")
"""Data that is waited for; both passes with what they send; the sum and norm of gradients and the wait for the device;
the update; the rest is what its name says."""
ON_HOST = frozenset(("data", "save", "probe"))


class Phases:
    """Seconds by phase, since they were asked for last.

    On CUDA the passes are measured by events in the device's own queue, which nobody waits for: what is not done when
    the seconds are asked for counts the next time, as the update always does.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is done in here."""
        if self._events and phase not in ON_HOST:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._pending.append((phase, before, after))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def taken(self) -> list[float]:
        """Return the seconds of each phase, and begin anew."""
        waiting = []
        for phase, before, after in self._pending:
            if after.query():
                self._seconds[phase] += before.elapsed_time(after) / 1000
            else:
                waiting.append((phase, before, after))
        self._pending = waiting
        taken = [self._seconds[phase] for phase in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return taken


def largest(world: World, values: Sequence[float], flag: bool) -> tuple[list[tuple[float, int]], bool]:
    """Return the largest of each value over all processes with the rank that has it, and whether any raises its flag.

    One sum tells all processes all values: 8 bytes for each of them and process.
    """
    each = [0.0] * (len(values) * world.size)
    each[world.rank :: world.size] = values
    flags, *told = world.sum([float(flag), *each])
    rows = [told[start : start + world.size] for start in range(0, len(told), world.size)]
    return [(max(row), row.index(max(row))) for row in rows], flags > 0


def memory_of(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has had, GiB: on the device, or resident where that is the CPU."""
    if device.type == "cuda":
        taken = {"memory_gib": torch.cuda.max_memory_allocated(device)}
        taken |= {"reserved_gib": torch.cuda.max_memory_reserved(device)}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        taken = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return {name: size / 2**30 for name, size in taken.items()}
