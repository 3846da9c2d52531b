"""The one device mesh."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamero.parallel.config import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "ring", "ulysses", "tensor")
"""Outermost first: neighbours on the last axis are neighbours on a machine."""


def device_mesh(parallel: ParallelConfig, device: str) -> DeviceMesh:
    """Return the mesh of a layout; every process of the run must ask for it."""
    shape = (parallel.pipeline, parallel.replicate, parallel.sharded, parallel.ring, parallel.ulysses, parallel.tensor)
    return init_device_mesh(device, shape, mesh_dim_names=AXES)
