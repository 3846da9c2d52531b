"""Counts bytes that are alive while a model runs, operation by operation, on tensors that have no numbers."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GATHERED = "gathered"
"""Label of weights that are fetched from other processes for a while."""


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
        self._in_place: WeakSet[UntypedStorage] = WeakSet()
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
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0  # there are no numbers, and any does
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all that is asked, and makes nothing
        made = func(*args, **(kwargs or {}))
        for storage in storages(value for value in tree_iter(made) if isinstance(value, Tensor)):
            if storage not in self._known and storage not in self._seen:
                self._count(storage, self.label)
        if func.namespace == "fsdp" and "all_gather" in func.name():
            self._relabel(value for value in tree_iter(args) if isinstance(value, Tensor))
        self._look()
        return made

    def _relabel(self, buffers: Iterable[Tensor]) -> None:
        """Count what weights are fetched into, or out of, as `gathered`."""
        for number in {id(storage) for storage in storages(buffers)} & self._counted.keys():
            label, size = self._counted[number]
            self._counted[number] = GATHERED, size
            self._alive[label] -= size
            self._alive[GATHERED] = self._alive.get(GATHERED, 0) + size

    def _count(self, storage: UntypedStorage, label: str) -> None:
        size, number = storage.nbytes(), id(storage)
        self._seen.add(storage)
        self._counted[number] = label, size
        self._alive[label] = self._alive.get(label, 0) + size
        finalize(storage, self._gone, number).atexit = False

    def _gone(self, number: int) -> None:
        found = self._counted.pop(number, None)
        if found is not None:
            self._alive[found[0]] -= found[1]

    def _look(self) -> None:
        now = self._now()
        self.peak = max(self.peak, sum(now.values()))
        for label, size in now.items():
            if size > self.peaks.get(label, 0):
                self.peaks[label] = size

    def _now(self) -> dict[str, int]:
        now = dict(self._alive)
        if self._in_place:
            now[GATHERED] = now.get(GATHERED, 0) + sum(storage.nbytes() for storage in self._in_place)
        return now

    def settle(self) -> int:
        """Stop counting what is alive, and return its bytes; forget all peaks.

        FSDP's whole weights keep their storages and only their sizes change: they go on counting, as `gathered`.
        """
        gc.collect()
        stays = 0
        for storage in list(self._seen):
            _, size = self._counted.pop(id(storage), ("", 0))
            if storage in self._in_place or storage in self._known:
                continue
            if storage.nbytes() < size:
                self._in_place.add(storage)
            else:
                self._known.add(storage)
                stays += size
        self._alive, self.peak, self.peaks = {}, 0, {}
        return stays

    def alive(self) -> dict[str, int]:
        """Return the bytes that are alive, by label."""
        gc.collect()
        self._look()
        return self._now()


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
