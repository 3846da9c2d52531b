"""The accelerators: found by the names their drivers give, and with figures that fit together."""

import re

import pytest

from llamero.core.errors import LlameroError
from llamero.core.hardware import ACCELERATORS, accelerator, of_device

DRIVERS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA A10G": "a10g",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "Tesla T4": "t4",
    "AMD Instinct MI250X": "mi250x",
    "AMD Instinct MI300X": "mi300x",
}
OTHERS = ("NVIDIA L40", "NVIDIA A10", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GB200", "NVIDIA A100-SXM4-80GB MIG 1g.10gb")


def test_every_accelerator_is_found_by_its_drivers_name():
    assert {name: of_device(name) for name in DRIVERS} == {name: ACCELERATORS[key] for name, key in DRIVERS.items()}
    assert set(DRIVERS.values()) == set(ACCELERATORS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_in_the_table_has_no_figures(name: str):
    assert of_device(name) is None


def test_only_one_pattern_finds_a_name():
    for name in DRIVERS:
        assert sum(bool(re.search(each.pattern, name)) for each in ACCELERATORS.values()) == 1


@pytest.mark.parametrize("key", ACCELERATORS)
def test_figures_are_of_plausible_order(key: str):
    one = ACCELERATORS[key]
    half, full = one.tflops["fp16"], one.tflops["fp32"]
    assert one.tflops.get("bf16", half) == half
    assert one.tflops.get("fp8", 2 * half) == pytest.approx(2 * half, rel=0.02)
    assert 1.9 < half / full < 35
    # operations per byte of memory: none has its bandwidth in other units than the rest
    assert 70 < half * 1000 / one.bandwidth_gb_s < 430
    assert one.network_gbit_s / 8 < one.link_gb_s < one.bandwidth_gb_s


def test_by_name():
    assert accelerator("A100_80GB").memory_gib == pytest.approx(79.2)
    with pytest.raises(LlameroError, match="h100"):
        accelerator("h1000")
