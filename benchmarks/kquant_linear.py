"""How many weights of a GGUF file are best decoded together, and what does resting as blocks cost a single token?

A 4096 × 4096 layer of each type is applied to one token, decoded in parts of so many weights. The columns are ratios of
CPU-seconds (one thread, the fastest of several runs, sides take turns): of decoding the whole layer at once over
decoding it in parts, and of that over the same layer in float32.

    python benchmarks/kquant_linear.py [--width 4096] [--repeat 5]
"""

import argparse
import time
from collections.abc import Callable

import torch

from llamero.model import kquant_linear, kquants
from llamero.model.kquant_linear import KQuantLinear

PARTS = (17, 18, 19, 20, 22)


def seconds(work: Callable[[], object], least: float) -> float:
    """Return the CPU-seconds of a run, or the least so far if they are fewer."""
    started = time.process_time()
    work()
    return min(least, time.process_time() - started)


def main() -> None:
    """Print one row per type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| type | " + " | ".join(f"2^{part}" for part in PARTS) + " | over float32 |")
    print("|---" * (len(PARTS) + 2) + "|")
    for kind in kquants.KINDS:
        print(f"| {kind} | " + " | ".join(f"{ratio:.1f}" for ratio in row(kind, given.width, given.repeat)) + " |")


@torch.no_grad()
def row(kind: str, width: int, repeat: int) -> list[float]:
    """Return the ratios of a type."""
    layer, x = KQuantLinear(width, width, kind=kind, bias=False), torch.randn(1, width)
    layer.blocks.copy_(kquants.encode(torch.randn(64, width), kind).repeat(width // 64, 1))
    plain = layer.dense(torch.float32)
    sides: dict[int, float] = dict.fromkeys((width * width, *(1 << part for part in PARTS)), float("inf"))
    dense = float("inf")
    for _ in range(repeat):
        for side in sides:
            kquant_linear.AT_ONCE["cpu"] = side
            sides[side] = seconds(lambda: layer(x), sides[side])
        dense = seconds(lambda: plain(x), dense)
    whole = sides.pop(width * width)
    return [*(whole / side for side in sides.values()), sides[1 << 19] / dense]


if __name__ == "__main__":
    main()
