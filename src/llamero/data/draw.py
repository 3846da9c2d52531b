"""Chances that depend on a sample alone: whoever draws, in whatever order, draws the same.

The mixing function is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WITHIN = 1 << 20
"""Samples that one unit may hold."""


def keys(
    seed: int, source: str, purpose: str, units: NDArray[Any], index: NDArray[Any] | int = 0
) -> NDArray[np.uint64]:
    """Return an evenly spread number in [0, 2⁶⁴) for each sample.

    Args:
        seed: Of the recipe.
        source: Name of the source.
        purpose: What is drawn; different purposes are independent.
        units: Number of each sample's unit within its source.
        index: Its number within the unit.
    """
    start = int.from_bytes(hashlib.blake2b(f"{seed}/{source}/{purpose}".encode(), digest_size=8).digest())
    number = np.asarray(units, dtype=np.uint64) * np.uint64(_WITHIN) + np.asarray(index, dtype=np.uint64)
    return _mix(np.uint64(start) + (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic is modulo 2⁶⁴
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def below(found: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Return which of some keys fall into the lowest `share` of all."""
    return found.astype(np.float64) < share * 2.0**64


def lowest(found: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Return which keys are the `count` lowest; of equal ones the first."""
    if count >= found.size:
        return np.ones(found.size, dtype=np.bool_)
    if count == 0:
        return np.zeros(found.size, dtype=np.bool_)
    chosen = found <= np.partition(found, count - 1)[count - 1]
    too_many = int(np.count_nonzero(chosen)) - count
    if too_many:
        equal = np.flatnonzero(chosen & (found == found[chosen].max()))
        chosen[equal[-too_many:]] = False
    return chosen
