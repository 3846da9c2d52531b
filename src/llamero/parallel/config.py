"""How the work is spread over devices; never decides the result, so it stays outside every digest."""

from __future__ import annotations

from pydantic import Field

from llamero.core.config import Strict


class ParallelConfig(Strict):
    """One process today; the axes of a device mesh join here."""

    gpus: int = Field(default=1, ge=1, le=1)
    """Devices; one until the parallel layouts are in."""
    micro_batch: int = Field(default=0, ge=0)
    """Packed rows that go through the model at a time; 0 takes the whole batch. Changes memory, not the result."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` takes CUDA where there is one."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that read and tokenize data; one per core where it is not stated."""
