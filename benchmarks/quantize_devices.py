"""How much sooner are quantized variants there when several processes share the work, and are they the same bytes?

Seven GPTQ variants, AWQ and five k-quants of one model, made by one process and by several, of one thread each, in
turns, of which the fastest counts. Imports are left out: the clock runs from when all have met. Printed are ratios:

- `wall`: seconds of one process over those of several. It is only true of a machine with a core for each, which the
  load average says, printed beside it: the number of processes that wanted to run, these and others;
- `busiest`: CPU-seconds of one process over those of the busiest of several, which load changes little: how much sooner
  they are done where each has a core, but for the time in which they wait for each other;
- `all`: CPU-seconds of all of them over those of one process: what sharing costs.

    python benchmarks/quantize_devices.py [--model DIR] [--processes 2 4] [--tokens 65536] [--repeat 2]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantize_quality import SHARED, read
from record import append, single_thread_environment

VARIANTS = (
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit--1g-actorder_True",
    "gptq-4bit-128g-actorder_False",
    "gptq-8bit-128g-actorder_True",
    "gptq-3bit-128g-actorder_True",
    "gptq-2bit-128g-actorder_True",
    "awq-4bit-128g",
    "gguf-Q2_K",
    "gguf-Q3_K_M",
    "gguf-Q4_K_M",
    "gguf-Q5_K_M",
    "gguf-Q6_K",
)


def child(order: dict[str, Any]) -> None:
    """Make the variants, with the other processes, and print seconds and CPU-seconds of it."""
    from llamero.quantize.config import Calibration, QuantizeConfig
    from llamero.quantize.run import processes, run

    tokens = read(Path(order["model"]), Path(order["text"]), order["tokens"])
    config = QuantizeConfig(variants=tuple(order["variants"]), calibration=Calibration(mixture="-"))
    world = processes()
    world.barrier()
    began, spent = time.perf_counter(), time.process_time()
    run(config, model=Path(order["model"]), out=lambda v: Path(order["out"]) / v.name, tokens=tokens, world=world)
    print(json.dumps([time.perf_counter() - began, time.process_time() - spent]), flush=True)
    os._exit(0)


def timed(order: dict[str, Any], count: int) -> tuple[float, list[float]]:
    """Return seconds of the slowest and CPU-seconds of each of several processes."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": str(count)}
    environment = {**single_thread_environment(), **about}
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    running = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed; what it said stands above")
    found = [json.loads(each) for each in said]
    return max(wall for wall, _ in found), [cpu for _, cpu in found]


def content(root: Path) -> dict[str, bytes]:
    """Return all files."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "weights" / "ref-7m-hf")
    parser.add_argument("--calibrate", type=Path, default=SHARED / "longtext" / "wikitext2" / "valid.txt")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--variant", nargs="*", default=VARIANTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        child(json.loads(chosen.child))
    order = {"model": str(chosen.model), "text": str(chosen.calibrate), "tokens": chosen.tokens}
    order["variants"] = list(chosen.variant)
    counts = [1, *chosen.processes]
    walls: dict[int, list[float]] = {count: [] for count in counts}
    cpus: dict[int, list[list[float]]] = {count: [] for count in counts}
    made: dict[int, dict[str, bytes]] = {}
    load: list[float] = []
    for _ in range(chosen.repeat):
        for count in counts:
            with tempfile.TemporaryDirectory() as out:
                wall, cpu = timed({**order, "out": out}, count)
                walls[count].append(wall)
                cpus[count].append(cpu)
                made[count] = content(Path(out))
                load.append(os.getloadavg()[0])
    print(f"load average {min(load):.1f} to {max(load):.1f} on {os.cpu_count()} cores")
    print("| processes | wall | busiest | all | same bytes |\n|---|---|---|---|---|")
    alone = min(sum(cpu) for cpu in cpus[1])
    for count in chosen.processes:
        faster = min(walls[1]) / min(walls[count])
        busiest = alone / min(max(cpu) for cpu in cpus[count])
        cost = min(sum(cpu) for cpu in cpus[count]) / alone
        same = made[count] == made[1]
        print(f"| {count} | {faster:.2f}× | {busiest:.2f}× | {cost:.2f}× | {'yes' if same else 'NO'} |")
        append(
            "quantize_devices",
            value=round(faster, 3),
            unit="times as fast as one process, wall",
            seed=0,
            processes=count,
            busiest=round(busiest, 3),
            all=round(cost, 3),
            same_bytes=same,
            tokens=chosen.tokens,
            variants=len(chosen.variant),
            model=chosen.model.name,
            load=[round(min(load), 1), round(max(load), 1)],
            cores=os.cpu_count(),
            repeat=chosen.repeat,
        )


if __name__ == "__main__":
    main()
