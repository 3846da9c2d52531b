"""The processes of a run: who is there, what they agree on, and who is missed when one falls silent."""

import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from llamero.core import world as environment
from llamero.core.errors import LlameroError
from llamero.parallel.config import ParallelConfig
from llamero.parallel.mesh import device_mesh

log = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds that are left to others to find by themselves that a process has ended."""
AT_ONCE = 1 << 23
"""Numbers that are summed over processes at a time."""
T = TypeVar("T")


class World:
    """All processes of a run, seen from one of them; of one process, where it is alone.

    Args:
        parallel: Their layout.
        longest: Seconds that a process which lives may keep the others waiting; without it `parallel.timeout`.

    Raises:
        LlameroError: If there are not as many processes as the layout has devices.
    """

    def __init__(self, parallel: ParallelConfig, *, longest: int | None = None) -> None:
        self.parallel = parallel
        self.device = device(parallel)
        self.rank, self.size = environment.rank(), environment.size()
        environment.refuse_other_size(parallel.gpus)
        if self.device.type == "cuda":  # events, pinned copies and NCCL go by the current device
            torch.cuda.set_device(self.device.index or 0)
        self.mesh: DeviceMesh | None = None
        self._group: dist.ProcessGroup | None = None
        """Whose members wait for each other, where not all those of the run as it began."""
        if self.size > 1:
            _join(parallel, self.device)
            self.mesh = device_mesh(parallel, self.device.type)
            if longest is not None:
                group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * longest))
                assert isinstance(group, dist.ProcessGroup)
                self._group = group
            assert _watch is not None
            _watch.longest = parallel.timeout if longest is None else longest

    def along(self, axis: str) -> int:
        """Return this process's place on an axis of the mesh."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        """Return which share of the rows is this process's."""
        return self.along("replicate") * self.parallel.sharded + self.along("shard")

    @property
    def speaks(self) -> bool:
        """Return whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over all processes, in float64; the same bits on each."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _meeting():
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether it is so on any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Return what every process has to say."""
        if self.size == 1:
            return [value]
        said: list[T | None] = [None] * self.size
        with _meeting():
            dist.all_gather_object(said, value, group=self._group)
        return said  # type: ignore[return-value]

    def told(self, value: T) -> T:
        """Return the first process's value."""
        if self.size == 1:
            return value
        said: list[T | None] = [value if self.speaks else None]
        with _meeting():
            dist.broadcast_object_list(said, 0, group=self._group)
        return said[0]  # type: ignore[return-value]

    def add_up(self, *tensors: Tensor) -> None:
        """Replace the numbers of each tensor, of one shape on all, by their sums over all processes."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def take_largest(self, *tensors: Tensor) -> None:
        """Replace the numbers of each tensor, of one shape on all, by the largest of any process."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Sequence[Tensor], how: dist.ReduceOp.RedOpType) -> None:
        if self.size == 1:
            return
        for part in (part for tensor in tensors for part in tensor.view(-1).split(AT_ONCE)):
            with _meeting():
                dist.all_reduce(part, how, group=None if part.is_cuda else self._group)

    def send(self, tensor: Tensor, *, source: int) -> None:
        """Replace the numbers of a tensor, of one shape and dtype on all, by those that one process has."""
        if self.size > 1:
            with _meeting():
                dist.broadcast(tensor, source, group=None if tensor.is_cuda else self._group)

    def claims(self, count: int) -> Iterator[int]:
        """Yield the numbers below `count`, each on one process only: on whichever asks for the next first.

        All processes call this as often as each other, and ask until there are no more.
        """
        if self.size == 1:
            return iter(range(count))
        global _shared_out
        _shared_out += 1
        return _claimed(f"{_shared_out}", count)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what one process refuses end all of them with its message; within, none may wait for another.

        Raises:
            LlameroError: What the first process that refuses has to say; an error of another kind is raised as it is
                where it happened, and named on the others.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, when the others know
            own = error
        said = own
        if own is not None and not isinstance(own, LlameroError):
            said = LlameroError(f"{type(own).__name__}: {own}", where=f"rank {self.rank}")
        first = next((problem for problem in self.gather(said) if problem is not None), None)
        if own is not None and said is not own:
            raise own
        if first is not None:
            raise first

    def in_turn(self, make: Callable[[], T]) -> T:
        """Return what is made, on the first process before the others: they take part in what it begins."""
        made: list[T] = []
        for first in (True, False):
            with self.together():
                if self.speaks == first:
                    made.append(make())
        return made[0]

    def barrier(self) -> None:
        """Wait for all."""
        self.sum([0.0])  # of nothing gloo makes no sum, and nobody would wait

    def beat(self, step: int) -> None:
        """Tell the others how far this process is."""
        if _watch is not None:
            _watch.step = step

    @contextmanager
    def missing_named(self) -> Iterator[None]:
        """Turn what goes wrong because a process is gone into an error that names it; everything else passes.

        Meanwhile no process may end by itself: a collective on CUDA would wait for it.
        """
        try:
            if _watch is not None:
                _watch.needs_all = True
            yield
        except RuntimeError as error:  # what gloo and NCCL raise
            gone = [] if _watch is None else _watch.silent()
            if not gone:
                raise
            who = ", ".join(f"rank {rank} (host {host}, last at step {step})" for rank, host, step in gone)
            raise LlameroError(
                f"{who} is gone: {str(error).partition(chr(10))[0]}",
                where="parallel",
                fix="see what it said last; the same command goes on from the last checkpoint",
            ) from error
        finally:
            if _watch is not None:
                _watch.needs_all = False


def device(parallel: ParallelConfig) -> torch.device:
    """Return the device to work on."""
    if parallel.device.startswith("cuda") and not torch.cuda.is_available():
        raise LlameroError("there is no CUDA device", where="parallel.device", fix="set it to `auto` or `cpu`")
    if parallel.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if environment.size() > 1:
        return torch.device("cuda", environment.local_rank())
    return torch.device("cuda" if parallel.device == "auto" else parallel.device)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _claimed(name: str, count: int) -> Iterator[int]:
    assert _claims is not None
    while (number := _claims.add(name, 1) - 1) < count:
        yield number


def _join(parallel: ParallelConfig, where: torch.device) -> None:
    """Meet the other processes, once in a run."""
    global _watch, _claims
    if dist.is_initialized():
        return
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=parallel.timeout)))
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    timeout = timedelta(seconds=2 * parallel.timeout)  # the watch speaks first
    meeting = PrefixStore("group", store)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=timeout)
    _claims = PrefixStore("claims", store)
    _watch = _Watch(PrefixStore("watch", store), rank, size, parallel.timeout)
    _watch.start()
    atexit.register(_watch.leave)


class _Watch(threading.Thread):
    """Tells the others that this process lives, and ends it with a name when another keeps it waiting too long.

    A collective that waits for a dead process cannot be broken off, so this thread ends the process.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: int) -> None:
        super().__init__(daemon=True)
        self.step = self.meetings = 0
        self.waiting_since: float | None = None
        self.longest = timeout
        """Seconds that a process which lives may keep the others waiting."""
        self.needs_all = False
        """Whether this process is in the midst of what all of them do together."""
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._seen: dict[int, tuple[str, float]] = {}
        self._left = threading.Event()
        self._pause = min(5.0, timeout / 10)
        self._patience = min(timeout, PATIENCE)
        store.set(f"host{rank}", socket.gethostname())
        store.set(f"beat{rank}", "0 0 0")

    def run(self) -> None:
        """Look around until the process ends."""
        count = 0
        try:
            while not self._left.wait(self._pause):
                count += 1
                self._look_around(count)
        except dist.DistError as error:
            log.warning("rank 0, which holds the store, is gone: %s", str(error).partition("\n")[0])
            if not self._left.wait(self._patience) and self.needs_all:
                log.error("rank 0 has ended, and the others cannot go on without it; rank %d ends", self._rank)
                os._exit(70)

    def _look_around(self, count: int) -> None:
        self._store.set(f"beat{self._rank}", f"{count} {self.meetings} {self.step}")
        for other in range(self._size):
            if other != self._rank:
                self._look(other)

    def leave(self) -> None:
        """Tell the others that this process ends as it should."""
        self._left.set()
        self._store.set(f"beat{self._rank}", "left")

    def silent(self) -> list[tuple[int, str, str]]:
        """Return rank, host and last step of those that say nothing for a while."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            said = {rank: self._said(rank) for rank in others}
            time.sleep(3 * self._pause)
            quiet = [rank for rank in others if said[rank] == self._said(rank) not in ("", "left")]
            return [(rank, self._store.get(f"host{rank}").decode(), said[rank].split()[2]) for rank in quiet]
        except dist.DistError:
            return [(0, os.environ.get("MASTER_ADDR", "unknown"), str(self.step))]  # it held the store

    def _said(self, rank: int) -> str:
        key = f"beat{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _look(self, other: int) -> None:
        said, now = self._said(other), time.monotonic()
        before, since = self._seen.get(other, ("", now))
        if said == before == "left":
            if self.needs_all and now - since > self._patience:
                self._end(other, "has ended, and the others cannot go on without it")
        elif said != before or not said:
            self._seen[other] = said, now
        elif now - since > self._timeout:
            self._end(other, f"has been silent for {now - since:.0f} s, since step {said.split()[2]}")
        waiting = self.waiting_since
        if waiting is not None and now - waiting > self.longest and said not in ("", "left"):
            _, meetings, step = said.split()
            if int(meetings) < self.meetings:
                self._end(other, f"keeps the others waiting for {now - waiting:.0f} s, at step {step}")

    def _end(self, other: int, problem: str) -> None:
        host = self._store.get(f"host{other}").decode()
        log.error("rank %d (host %s) %s; rank %d ends", other, host, problem, self._rank)
        os._exit(70)


_watch: _Watch | None = None
_claims: Store | None = None
_shared_out = 0
"""How often work was shared out."""


@contextmanager
def _meeting() -> Iterator[None]:
    """Note that this process waits for the others."""
    assert _watch is not None
    _watch.meetings += 1
    _watch.waiting_since = time.monotonic()
    try:
        yield
    finally:
        _watch.waiting_since = None
