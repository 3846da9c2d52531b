"""Worker processes: a function applied to many items, its results in the order of the items.

A worker is a program of its own (`python -m llamero.core.workers`) that talks through its standard input and output.
So nothing is forked from a process that has threads, a script that calls llamero is not run again in every worker,
and a worker ends when its parent does, whatever ended that.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")

_LENGTH = struct.Struct("<Q")
_AT_ONCE = 3
"""Items under way per worker: one at work, the others in wait."""
_FIRST = 2
"""Items done before workers are started, which takes a second: a small job never needs them."""


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Generator[R, None, None]:
    """Yield `work(item)` for every item, in their order; few items are held at any time.

    Args:
        work: What to do; with its state it is sent to every worker once, so it must pickle.
        items: Must pickle too.
        workers: Processes; with 1 everything happens in this one.

    Raises:
        LlameroError: A worker was killed.
    """
    waiting = iter(items)
    if workers == 1:
        yield from map(work, waiting)
        return
    yield from map(work, islice(waiting, _FIRST))
    first = list(islice(waiting, 1))
    if not first:
        return
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        team = [_Worker(work) for _ in range(workers)]
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        for worker in team:
            stack.callback(worker.stop)  # before the threads are waited for: they wait for the workers
            idle.put(worker)

        def call(item: T) -> R:
            worker = idle.get()
            try:
                return worker.call(item)
            finally:
                idle.put(worker)

        under_way: deque[Future[R]] = deque(threads.submit(call, item) for item in first)
        for item in waiting:
            under_way.append(threads.submit(call, item))
            if len(under_way) >= _AT_ONCE * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class _Worker:
    """One process that has the work."""

    def __init__(self, work: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamero.core.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C is the parent's business
        )
        self._to = cast("BinaryIO", self._process.stdin)
        self._from = cast("BinaryIO", self._process.stdout)
        self._send(work)

    def call(self, item: Any) -> Any:
        """Return the result for an item, or raise what the work raised."""
        self._send(item)
        try:
            fine, result = _receive(self._from)
        except EOFError as error:
            raise self._died() from error
        if not fine:
            raise result
        return result

    def _send(self, value: object) -> None:
        try:
            _send(self._to, value)
        except BrokenPipeError as error:
            raise self._died() from error

    def _died(self) -> LlameroError:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return LlameroError(
            f"a worker process ended ({how})", fix="if memory was short, set `parallel.workers` to fewer processes"
        )

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._from.close()
        with suppress(BrokenPipeError):  # what was not sent yet is not wanted any more
            self._to.close()


def _send(stream: BinaryIO, value: object) -> None:
    data = pickle.dumps(value, protocol=5)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def _serve() -> None:
    """Do what comes in, until nothing does."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the results
    commands = sys.stdin.buffer
    try:
        work = _receive(commands)
        while True:
            item = _receive(commands)
            try:
                answer = (True, work(item))
            except Exception as error:  # it is raised again in the parent
                error.add_note(traceback.format_exc())
                answer = (False, error)
            _send(results, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone


if __name__ == "__main__":
    _serve()
