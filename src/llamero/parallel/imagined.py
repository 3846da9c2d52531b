"""One process of a layout that nobody started, so that what it would hold can be weighed on any machine.

Its model is on the meta device, or has tensors of `FakeTensorMode`. Its process group is the `fake` one of torch:
collectives return at once and move nothing, so shapes and dtypes are those of the real run and there are no numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # pyright: ignore[reportPrivateUsage]

from llamero.parallel.config import ParallelConfig
from llamero.parallel.mesh import device_mesh
from llamero.parallel.world import World

T = TypeVar("T")


class Imagined(World):
    """A process as seen by itself, whose others are not there: what it asks of them it answers itself.

    Made by `imagined`, which also takes it down again.

    Args:
        parallel: The layout.
        rank: Which of its processes.
    """

    def __init__(self, parallel: ParallelConfig, rank: int) -> None:
        self.parallel = parallel
        self.device = torch.device("cpu")
        self.rank, self.size = rank, parallel.gpus
        self.mesh = device_mesh(parallel, "cpu") if parallel.gpus > 1 else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values, as if the others had zeros."""
        return list(values)

    def gather(self, value: T) -> list[T]:
        """Return the value as often as there are processes."""
        return [value] * self.size


@contextmanager
def imagined(parallel: ParallelConfig, *, rank: int = 0) -> Iterator[Imagined]:
    """Be one process of a layout for a while; several can be tried one after the other.

    Args:
        parallel: The layout.
        rank: Which of its processes.

    Raises:
        ValueError: If this process is one of a real run, or already imagines to be one.
    """
    if dist.is_initialized():
        raise ValueError("this process is one of a run already, so it cannot imagine to be one of another")
    if not 0 <= rank < parallel.gpus:
        raise ValueError(f"there is no rank {rank} of {parallel.gpus}")
    if parallel.gpus == 1:
        yield Imagined(parallel, rank)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.gpus)
    try:
        yield Imagined(parallel, rank)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it knows the groups of a mesh by names that are gone now


def first_of(parallel: ParallelConfig, pipeline: int) -> int:
    """Return the first rank of a place on the pipeline axis: where shards are uneven, it has the largest."""
    return pipeline * (parallel.gpus // parallel.pipeline)
