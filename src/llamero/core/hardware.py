"""The accelerators that figures are told of: memory, peak arithmetic and bandwidths, as their makers state them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

Arithmetic = Literal["fp32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class Accelerator:
    """One kind of device, as a process sees it."""

    name: str
    """What people call it."""
    memory_gib: float
    """Memory that the driver reports, GiB: somewhat less than the data sheet's GB."""
    tflops: Mapping[Arithmetic, float]
    """Peak of dense matrix products with fp32 sums, 10¹² operations a second; a kind that it lacks is missing. fp32 is
    true fp32, not TF32."""
    bandwidth_gb_s: float
    """Of its memory, 10⁹ bytes a second."""
    link_gb_s: float
    """To its neighbours in the node in one direction, 10⁹ bytes a second: NVLink or its like, else PCIe."""
    network_gbit_s: float
    """To other nodes for each device, 10⁹ bits a second, in machines that are usually built with it."""
    pattern: str
    """Regular expression that finds it in the name its driver gives."""


def _arithmetic(**tflops: float) -> dict[Arithmetic, float]:
    return {name: value for name, value in tflops.items() if name in ("fp32", "fp16", "bf16", "fp8")}


_AMPERE = _arithmetic(fp32=19.5, fp16=312, bf16=312)
_HOPPER = _arithmetic(fp32=66.9, fp16=989.4, bf16=989.4, fp8=1978.9)
_HOPPER_NVL = _arithmetic(fp32=60, fp16=835.5, bf16=835.5, fp8=1671)

ACCELERATORS: dict[str, Accelerator] = {
    "a100-40gb": Accelerator("A100 SXM 40 GB", 39.4, _AMPERE, 1555, 300, 200, r"A100-SXM.*-40GB"),
    "a100-80gb": Accelerator("A100 SXM 80 GB", 79.2, _AMPERE, 2039, 300, 200, r"A100-SXM.*-80GB"),
    "a100-pcie-40gb": Accelerator("A100 PCIe 40 GB", 39.4, _AMPERE, 1555, 32, 100, r"A100-PCIE-40GB"),
    "a100-pcie-80gb": Accelerator("A100 PCIe 80 GB", 79.2, _AMPERE, 1935, 32, 100, r"A100 80GB PCIe"),
    "h100": Accelerator("H100 SXM", 79.2, _HOPPER, 3350, 450, 400, r"H100 80GB HBM3|H100 SXM"),
    "h100-pcie": Accelerator(
        "H100 PCIe",
        79.2,
        _arithmetic(fp32=51.2, fp16=756.5, bf16=756.5, fp8=1513),
        2039,
        64,
        200,
        r"H100 PCIe",
    ),
    "h100-nvl": Accelerator("H100 NVL", 93.1, _HOPPER_NVL, 3938, 64, 200, r"H100 NVL"),
    "h200": Accelerator("H200 SXM", 139.8, _HOPPER, 4800, 450, 400, r"H200(?! NVL)"),
    "h200-nvl": Accelerator("H200 NVL", 139.8, _HOPPER_NVL, 4800, 64, 200, r"H200 NVL"),
    "b200": Accelerator("B200", 178.4, _arithmetic(fp32=75, fp16=2250, bf16=2250, fp8=4500), 7700, 900, 400, r"\bB200"),
    "l40s": Accelerator("L40S", 44.4, _arithmetic(fp32=91.6, fp16=362, bf16=362, fp8=733), 864, 32, 50, r"L40S"),
    "l4": Accelerator("L4", 22.0, _arithmetic(fp32=30.3, fp16=121, bf16=121, fp8=242.5), 300, 32, 12.5, r"\bL4\b"),
    "a10g": Accelerator("A10G", 22.0, _arithmetic(fp32=35, fp16=70, bf16=70), 600, 32, 12.5, r"A10G"),
    "a6000": Accelerator("RTX A6000", 47.5, _arithmetic(fp32=38.7, fp16=154.8, bf16=154.8), 768, 32, 25, r"RTX A6000"),
    "rtx4090": Accelerator(
        "RTX 4090", 23.5, _arithmetic(fp32=82.6, fp16=165.2, bf16=165.2, fp8=330.3), 1008, 32, 10, r"RTX 4090(?! D)"
    ),
    "rtx3090": Accelerator("RTX 3090", 23.6, _arithmetic(fp32=35.6, fp16=71, bf16=71), 936, 32, 10, r"RTX 3090(?! Ti)"),
    "v100-16gb": Accelerator("V100 SXM2 16 GB", 15.8, _arithmetic(fp32=15.7, fp16=125), 900, 150, 12.5, r"V100-.*16GB"),
    "v100-32gb": Accelerator("V100 SXM2 32 GB", 31.7, _arithmetic(fp32=15.7, fp16=125), 900, 150, 12.5, r"V100-.*32GB"),
    "t4": Accelerator("T4", 14.6, _arithmetic(fp32=8.1, fp16=65), 320, 16, 12.5, r"\bT4\b"),
    "mi250x": Accelerator(  # a module is two devices, and this is one
        "MI250X, one of its two dies", 64.0, _arithmetic(fp32=47.9, fp16=191.5, bf16=191.5), 1638, 200, 100, r"MI250X"
    ),
    "mi300x": Accelerator(
        "MI300X", 192.0, _arithmetic(fp32=163.4, fp16=1307.4, bf16=1307.4, fp8=2614.9), 5300, 448, 400, r"MI300X"
    ),
}
"""Every accelerator that is known, by the name that a command line takes.

Sources: the data sheets of NVIDIA (A100, H100, H200, HGX B200, L40S, L4, A10G, RTX A6000, V100, T4; the Ampere GA102
and Ada whitepapers for the GeForce cards, whose peaks are those with fp32 sums) and AMD (MI250X, MI300X). Where a sheet
has only figures with sparsity, half of them. PCIe cards that a bridge can join in pairs are stated with PCIe."""


def accelerator(name: str) -> Accelerator:
    """Return an accelerator by its name in the table.

    Raises:
        LlameroError: If there is none of that name.
    """
    key = name.lower().replace("_", "-")
    if key not in ACCELERATORS:
        problem = f"no accelerator `{name}` is known"
        raise LlameroError(problem, fix=did_you_mean(key, ACCELERATORS))
    return ACCELERATORS[key]


def of_device(driver_name: str) -> Accelerator | None:
    """Return what a driver calls by a name (`NVIDIA A100-SXM4-80GB`); nothing where it is unknown or a slice (MIG)."""
    if "MIG" in driver_name:
        return None
    found = (each for each in ACCELERATORS.values() if re.search(each.pattern, driver_name))
    return next(found, None)
