"""Bringing what is small to a device without waiting for it."""

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; from the CPU to CUDA by way of pinned memory, which the caller does not wait for."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
