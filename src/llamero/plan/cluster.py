"""The machines that a plan is for, and how fast a group of their devices exchanges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from llamero.core.hardware import Accelerator


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, as many to every node.

    Args:
        accelerator: The kind.
        gpus: Devices in all.
        per_node: Devices of a node.
        network_gbit_s: To other nodes for each device, 10⁹ bits a second; what such machines usually have by default.
    """

    accelerator: Accelerator
    gpus: int
    per_node: int = 8
    network_gbit_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no cluster, and take what is usual where nothing is said."""
        for name, least in (("gpus", 1), ("per_node", 1), ("network_gbit_s", 0)):
            if getattr(self, name) < least:
                raise LlameroError(f"{name} is {getattr(self, name)}", fix=f"give at least {least}")
        if not self.network_gbit_s:
            object.__setattr__(self, "network_gbit_s", self.accelerator.network_gbit_s)

    @property
    def network_gb_s(self) -> float:
        """Return what a device sends to other nodes, 10⁹ bytes a second."""
        return self.network_gbit_s / 8

    @property
    def nodes(self) -> int:
        """Return how many nodes there are."""
        return -(-self.gpus // self.per_node)

    def at_power(self, watts: float, of: float) -> Cluster:
        """Return the cluster with devices that are held below their power: clocks go with its cube root.

        Dynamic power is proportional to frequency times voltage squared, and voltage goes with frequency.
        """
        share = (watts / of) ** (1 / 3)
        slower = {kind: peak * share for kind, peak in self.accelerator.tflops.items()}
        name = f"{self.accelerator.name} at {watts:g} W"
        return replace(self, accelerator=replace(self.accelerator, tflops=slower, name=name))


@dataclass(frozen=True)
class Group:
    """Devices of one axis of a layout.

    Args:
        size: How many.
        stride: Distance between neighbours, in devices of the cluster.
    """

    size: int
    stride: int

    def rate(self, cluster: Cluster, *, link: float, network: float) -> float:
        """Return the bytes a second at which each device takes part in a collective.

        Rings of a collective enter a node as often as it has devices of the group, each through a network card of its
        own (NCCL's channels), and go from device to device inside.

        Args:
            cluster: Where the devices stand.
            link: Share of a link's bandwidth that collectives reach.
            network: Share of the network's.
        """
        inside = cluster.accelerator.link_gb_s * 1e9 * link
        if self.size * self.stride <= cluster.per_node:
            return inside
        together = min(self.size, max(1, cluster.per_node // self.stride))
        outside = together * cluster.network_gb_s * 1e9 * network
        return min(inside, outside) if together > 1 else outside
