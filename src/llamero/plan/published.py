"""Training runs that others measured and published: what the plan's times are fitted to, and what they are checked on.

All are torchtitan's own tables (pytorch/torchtitan, `benchmarks/`), with their settings. Its devices are H100 of 96 GB
(HBM2e, 2.4 TB/s) held at 500 of 700 W, eight to a node by NVLink, 400 Gbit/s for each to other nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llamero.core.hardware import ACCELERATORS, Arithmetic
from llamero.plan.cluster import Cluster
from llamero.plan.known import config_of
from llamero.plan.time import Efficiency, Layout, Work, step_time

FITTED = ("sustained", "product_8", "eager", "link", "network", "hidden")
"""Names of what is fitted, in `Efficiency`."""

DEC_2024 = "llama3_h100_202412_torchtitan.md"
JUNE_2025 = "asyncTP_llama3_h100_2025-06_torchtitan.md"
H200_2025 = "llama3_8b_h200_2025-06_torchtitan_trainy_whitefiber.md"


@dataclass(frozen=True)
class Run:
    """A published run.

    Args:
        name: What it is.
        source: File of torchtitan's `benchmarks/`.
        measured: Tokens a second on each device.
        model: Name in `known`.
        sequence: Tokens of a row.
        precision: Of products.
        layout: As published.
        device: Of the cluster.
        use: Fitted to; checked; or only shown, where nothing is asked of it.
    """

    name: str
    source: str
    measured: float
    model: str
    sequence: int
    precision: Arithmetic
    layout: Layout
    device: Literal["H100 at 500 W", "H200"] = "H100 at 500 W"
    use: Literal["fit", "check", "shown"] = "check"

    @property
    def cluster(self) -> Cluster:
        """Return its machines."""
        gpus = self.layout.gpus
        if self.device == "H200":
            return Cluster(ACCELERATORS["h200"], gpus)
        device = replace(ACCELERATORS["h100"], name="H100 SXM 96 GB", memory_gib=94.5, bandwidth_gb_s=2400)
        return Cluster(device, gpus).at_power(500, of=700)

    def predicted(self, reached: Efficiency | None = None) -> float:
        """Return the tokens a second on each device that the plan expects.

        Args:
            reached: What devices reach; as fitted by default.
        """
        layout = self.layout
        work = Work(config_of(self.model), self.sequence, precision=self.precision)
        tokens = layout.micros * layout.rows * self.sequence * layout.replicate * layout.shard
        return tokens / layout.gpus / step_time(work, layout, self.cluster, reached).total


_8B = Layout(shard=8, rows=2, recompute="selective", compile=True, residual_bytes=2)
_8B_TENSOR = replace(_8B, tensor=8, rows=12)
_8B_RING = replace(_8B, rows=1, recompute="full")
_70B = replace(_8B, shard=32, tensor=8, rows=16, recompute="full")
# torchtitan cuts a batch into as many micro-batches as there are stages; weights and gradients stay whole in a step
_405B = replace(_70B, shard=8, pipeline=8, pieces=8, micros=8, rows=4, hides_tensor=True, zero=1)


def _small(name: str, measured: float, layout: Layout, precision: Arithmetic = "bf16", source: str = DEC_2024) -> Run:
    device = "H200" if source == H200_2025 else "H100 at 500 W"
    return Run(f"8B {name}", source, measured, "llama-3.1-8b", 8192, precision, layout, device, "fit")


def _ring(over: int, measured: float) -> Run:
    layout, length = replace(_8B_RING, shard=8 // over, ring=over), 32_768 * over
    return Run(f"8B fp8, {length:,} over {over}", DEC_2024, measured, "llama-3.1-8b", length, "fp8", layout)


def _large(name: str, measured: float, precision: Arithmetic, source: str, *, hides: bool) -> Run:
    layout = replace(_70B, hides_tensor=hides)
    return Run(f"70B {name}", source, measured, "llama-3.1-70b", 8192, precision, layout)


def _largest(name: str, measured: float, layout: Layout, sequence: int = 8192) -> Run:
    return Run(f"405B {name}", DEC_2024, measured, "llama-3.1-405b", sequence, "fp8", layout, use="shown")


RUNS: tuple[Run, ...] = (
    _small("8 GPUs, eager", 5762, replace(_8B, compile=False)),
    _small("8 GPUs", 6667, _8B),
    _small("8 GPUs, fp8", 8532, _8B, "fp8"),
    _small("128 GPUs, eager", 5605, replace(_8B, shard=128, compile=False)),
    _small("128 GPUs", 6514, replace(_8B, shard=128)),
    _small("128 GPUs, fp8", 8380, replace(_8B, shard=128), "fp8"),
    _small("tensor 8 × shard 8", 4378, _8B_TENSOR, source=JUNE_2025),
    _small("tensor 8 × shard 8, async", 4809, replace(_8B_TENSOR, hides_tensor=True), source=JUNE_2025),
    _small("32 H200, fp8", 10_938, replace(_8B, shard=32, gather_bytes=1), "fp8", H200_2025),
    _small("64 H200, fp8", 10_753, replace(_8B, shard=64, gather_bytes=1), "fp8", H200_2025),
    _large("fp8", 829, "fp8", DEC_2024, hides=False),
    _large("fp8, async", 876, "fp8", DEC_2024, hides=True),
    _large("bf16", 597, "bf16", JUNE_2025, hides=False),
    _large("bf16, async", 652, "bf16", JUNE_2025, hides=True),
    _large("fp8, 2025", 810, "fp8", JUNE_2025, hides=False),
    _large("fp8, async, 2025", 942, "fp8", JUNE_2025, hides=True),
    _ring(1, 3890),
    _ring(2, 2540),
    _ring(4, 1071),
    _ring(8, 548),
    _largest("1F1B", 100, _405B),
    _largest("interleaved", 128, replace(_405B, schedule="interleaved", pieces=16)),
    *(
        _largest(
            f"{32 * over}K over {over}", measured, replace(_405B, shard=8 // over, ring=over, rows=1), 32_768 * over
        )
        for over, measured in ((1, 76), (2, 47), (4, 31), (8, 16))
    ),
)
"""The runs: fitted to are those of 8B models with rows of 8192 tokens, and no others."""


def fit(runs: Sequence[Run] | None = None, start: Efficiency | None = None) -> Efficiency:
    """Return what devices reach, as runs say: least squares of the logarithms of tokens a second (Levenberg-Marquardt).

    Args:
        runs: To fit to; all that are there for it by default.
        start: Where to begin; gives all that is not fitted.
    """
    runs = [run for run in RUNS if run.use == "fit"] if runs is None else runs
    start = Efficiency() if start is None else start

    def reached(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Efficiency:
        return replace(start, **{name: _bounded(name, value) for name, value in zip(FITTED, x, strict=True)})

    def errors(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([math.log(run.predicted(reached(x)) / run.measured) for run in runs])

    x = np.array([_free(name, getattr(start, name)) for name in FITTED])
    damping, step = 1e-3, 1e-4
    for _ in range(100):
        now = errors(x)
        slopes = np.stack([(errors(x + step * unit) - now) / step for unit in np.eye(len(x))], axis=1)
        change = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ now).clip(-1, 1)
        if np.abs(change).max() < 1e-7:
            break
        better = (errors(x + change) ** 2).sum() < (now**2).sum()
        x, damping = (x + change, damping / 3) if better else (x, damping * 5)
    return reached(x)


def _bounded(name: str, value: float) -> float:
    """Return a constant from a number of any size: a share lies between 0 and 1."""
    return math.exp(value) if name == "eager" else 1 / (1 + math.exp(-value))


def _free(name: str, value: float) -> float:
    return math.log(value) if name == "eager" else math.log(value / (1 - value))
