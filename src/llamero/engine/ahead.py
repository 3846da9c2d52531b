"""What the next step needs, made while the device is busy with this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes the work of the next step in a thread.

    It is a function of the step's number alone, so that nothing is lost when a run stops.

    Args:
        make: Returns the work of a step; called for one step at a time.
        steps: The steps, one after the other.
    """

    def __init__(self, make: Callable[[int], T], steps: range) -> None:
        self._make, self._steps = make, steps
        self._next: Future[T] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def take(self, step: int) -> T:
        """Return the work of a step, and begin with that of the next; what went wrong in the thread is raised here."""
        work = self._make(step) if self._next is None else self._next.result()
        self._next = self._thread.submit(self._make, step + 1) if step + 1 in self._steps else None
        return work

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
