"""What a device is given: small tensors without waiting for them, and one thread where bytes depend on the number."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; from the CPU to CUDA by way of pinned memory, which the caller does not wait for."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: with several, some routines (LAPACK's, some sums) give other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
