"""Counts bytes that are alive while a model runs, operation by operation, on tensors that have no numbers."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet, finalize

from torch import Tensor, UntypedStorage
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GATHERED = "gathered"
"""Label of whole weights that are there for a while only."""


class Weigh(TorchDispatchMode):
    """While it is entered, knows every storage that an operation makes, and the most that was alive at a time.

    A storage counts as long as anything holds it: an activation that the backward pass needs, whichever way it is
    kept (saved by autograd, cached by selective recomputation, an attribute of a function's context), and nothing
    twice. Under `FakeTensorMode` an operation costs no memory and the storages have their true sizes.

    Args:
        known: Tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known: WeakSet[UntypedStorage] = WeakSet(storages(known))
        self._seen: WeakSet[UntypedStorage] = WeakSet()
        self._gathered: WeakSet[UntypedStorage] = WeakSet()
        self._counted: dict[int, tuple[str, int]] = {}
        self._alive: dict[str, int] = {}
        self.label = ""
        """Under which what is made now is counted."""
        self.peak = 0
        """Most bytes alive after an operation."""
        self.peaks: dict[str, int] = {}
        """The same of each label by itself."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # it comes again with the tensors within
        made = func(*args, **(kwargs or {}))
        for storage in storages(value for value in tree_iter(made) if isinstance(value, Tensor)):
            if storage not in self._known and storage not in self._seen:
                self._count(storage)
        self._look()
        return made

    def _count(self, storage: UntypedStorage) -> None:
        size, number = storage.nbytes(), id(storage)
        self._seen.add(storage)
        self._counted[number] = self.label, size
        self._alive[self.label] = self._alive.get(self.label, 0) + size
        finalize(storage, self._gone, number).atexit = False

    def _gone(self, number: int) -> None:
        found = self._counted.pop(number, None)
        if found is not None:
            self._alive[found[0]] -= found[1]

    def _look(self) -> None:
        if self._gathered:  # their sizes change in place
            self._alive[GATHERED] = sum(storage.nbytes() for storage in self._gathered)
        self.peak = max(self.peak, sum(self._alive.values()))
        for label, size in self._alive.items():
            if size > self.peaks.get(label, 0):
                self.peaks[label] = size

    def settle(self) -> None:
        """Stop counting what is alive, but for what comes and goes in place; forget all peaks.

        FSDP's whole weights keep their storages and only their sizes change: from here on they are `gathered`.
        """
        gc.collect()
        for storage in list(self._seen):
            _, size = self._counted.pop(id(storage))
            (self._gathered if storage.nbytes() < size else self._known).add(storage)
        self._seen |= self._gathered
        self._alive, self.peak, self.peaks = {}, 0, {}

    def alive(self) -> dict[str, int]:
        """Return the bytes that are alive, by label."""
        gc.collect()
        self._look()
        return dict(self._alive)


def storages(tensors: Iterable[Tensor]) -> Iterator[UntypedStorage]:
    """Yield the memory of tensors that is in this process; of a tensor that is spread, that of its share."""
    for tensor in tensors:
        while isinstance(tensor, (DTensor, AsyncCollectiveTensor)):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.elem
        yield tensor.untyped_storage()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors in this process; what two of them share counts once."""
    found = {id(storage): storage for storage in storages(tensors)}
    return sum(storage.nbytes() for storage in found.values())
