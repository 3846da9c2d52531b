"""How many tokens per CPU-second does a model on 4-bit codes answer, packed, dequantized each time, and plain?

A stack of decoder layers of the shape of a 1B model (TinyLlama: hidden 2048, intermediate 5632, 32 heads on 4), 4-bit
in groups of 128 with `desc_act`, as a GPTQ directory holds them. Its linear layers are run as decoding runs them: 1 and
8 rows (tokens at a time), and as a prompt does: 512. Each in float32 and bfloat16, in three ways:

- `packed`: as `load_model` prepares them (kernels/low_bit.py);
- `dequantized`: the whole weight for every product, which is what GPTQ layers do without a kernel;
- `dense`: unquantized weights.

Measured: CPU time (user + system) of a pass through the linear layers, one thread, the ways taking turns, of which the
fastest counts, and the bytes of the weights. Attention is left out: it is the same.

    python benchmarks/quantized_decode.py [--layers 1] [--repeat 3]
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from record import append
from torch import Tensor, nn

from llamero.checkpoint import gptq
from llamero.checkpoint.codes import GroupCodes
from llamero.model.linear import GroupLinear, PackedLinear, make_ready

SHAPES = {
    "q_proj": (2048, 2048),
    "k_proj": (2048, 256),
    "v_proj": (2048, 256),
    "o_proj": (2048, 2048),
    "gate_proj": (2048, 5632),
    "up_proj": (2048, 5632),
    "down_proj": (5632, 2048),
}
"""Inputs and outputs of the linear layers of a decoder layer."""

GROUP = 128


class Way(NamedTuple):
    """One way of computing."""

    name: str
    layers: nn.ModuleList
    bytes: int
    """Of its weights."""


def packed_layer(inputs: int, outputs: int, generator: torch.Generator) -> GroupLinear:
    """Return a layer of random codes whose groups lie in no order."""
    shuffled = torch.randperm(inputs, generator=generator)
    weight = GroupCodes(
        torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8),
        (torch.rand(outputs, inputs // GROUP, generator=generator) * 1e-3 + 1e-3).half(),
        torch.full((outputs, inputs // GROUP), 8, dtype=torch.uint8),
        (shuffled // GROUP).to(torch.int32),
        bits=4,
    )
    layer = GroupLinear(inputs, outputs, layout=gptq.Format(4, GROUP), bias=False)
    for name, tensor in layer.layout.encode(weight).items():
        layer.register_buffer(name, tensor)
    return layer


def ways(layers: int, dtype: torch.dtype, seed: int) -> list[Way]:
    """Return the same layers in all three ways."""
    generator = torch.Generator().manual_seed(seed)
    made = [packed_layer(*shape, generator) for _ in range(layers) for shape in SHAPES.values()]
    dense = nn.ModuleList(layer.dense(dtype) for layer in made)
    kept, ready = nn.ModuleList(made), nn.ModuleList(made)
    make_ready(ready, dtype)
    named = {"packed": ready, "dequantized": kept, "dense": dense}
    return [
        Way(name, stack, sum(tensor.nbytes for tensor in [*stack.parameters(), *stack.buffers()]))
        for name, stack in named.items()
    ]


def seconds(run: Callable[[], None]) -> float:
    """Return the CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def main() -> None:
    """Print a row per dtype and number of rows, and append what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| dtype | rows | dense tokens/CPU-s | dequantized | packed | packed : dequantized | packed : dense | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        found = ways(asked.layers, dtype, asked.seed)
        for rows in (1, 8, 512):
            inputs = {width: torch.randn(rows, width).to(dtype) for width in (2048, 5632)}
            report(found, inputs, rows, dtype, asked)


def report(
    found: list[Way], inputs: dict[int, Tensor], rows: int, dtype: torch.dtype, asked: argparse.Namespace
) -> None:
    """Measure all ways with the same inputs, print a row and append it."""
    best = dict.fromkeys((way.name for way in found), float("inf"))

    def through(way: Way) -> None:
        for layer in way.layers:
            assert isinstance(layer, nn.Linear | PackedLinear)
            layer(inputs[layer.in_features])

    for _ in range(asked.repeat):
        for way in found:
            best[way.name] = min(best[way.name], seconds(lambda way=way: through(way)))
    speed = {name: rows / time_ for name, time_ in best.items()}
    size = {way.name: round(way.bytes / 2**20, 1) for way in found}
    gain, to_dense = speed["packed"] / speed["dequantized"], speed["packed"] / speed["dense"]
    name = str(dtype).removeprefix("torch.")
    sizes = f"{size['dense']} → {size['packed']}"
    print(
        f"| {name} | {rows} | {speed['dense']:.0f} | {speed['dequantized']:.0f} | {speed['packed']:.0f} "
        f"| {gain:.1f} | {to_dense:.2f} | {sizes} |"
    )
    append(
        "quantized_decode",
        value=gain,
        unit="tokens per CPU-second, packed over dequantized",
        seed=asked.seed,
        dtype=name,
        rows=rows,
        layers=asked.layers,
        tokens_per_cpu_second={each: round(value, 1) for each, value in speed.items()},
        mib=size,
    )


if __name__ == "__main__":
    main()
