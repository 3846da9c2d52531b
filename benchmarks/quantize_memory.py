"""How much memory does the calibration of a 70B model take?

    python benchmarks/quantize_memory.py [--layers 2] [--tokens 2048] [--variant rtn-4bit-128g] [--no-products]

Writes a model with the layer shapes of Llama-2-70B, few layers, a small vocabulary and random weights, walks through it
and prints the peak of resident memory after each layer beside what `quantize/needs.py` promises. More layers change
nothing, more tokens only what waits between layers: beyond 2 GiB in a file. Without --variant nothing is solved.
With --no-products the products and factors of matrices, which take most of the time and no memory beyond what comes
out, come out as zeros; all else is done and held as it is. --shrink makes all widths smaller, to see what that changes.
Needs 3.4 GB of disk for two layers, and what the variants take. Prints a line for benchmarks/results.
"""

import argparse
import json
import resource
import tempfile
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llamero.checkpoint import hf
from llamero.model.config import LlamaConfig
from llamero.model.load import empty_model, write_config
from llamero.model.rope import Default
from llamero.quantize.calibrate import UNQUANTIZED, Walk
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.needs import needs
from llamero.quantize.progress import Progress
from llamero.quantize.run import run


class NoProducts(TorchDispatchMode):
    """Leaves products of matrices, and what is solved with matrices, to be zeros (the factor of any: the identity)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer in place of torch."""
        name, keys = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in {"mm", "bmm"}:
            dtype = keys.get("out_dtype", args[2] if len(args) > 2 else args[0].dtype)
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[-1], dtype=dtype)
        if name in {"addmm_", "addr_", "baddbmm_"}:
            return args[0]
        if name == "linalg_solve_triangular":
            return torch.zeros_like(args[1])
        if name == "linalg_cholesky_ex":
            return torch.eye(len(args[0])), torch.zeros((), dtype=torch.int32)
        return func(*args, **keys)


def shape(layers: int, shrink: int = 1) -> LlamaConfig:
    """Return Llama-2-70B with fewer layers and words, perhaps less wide."""
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=8192 // shrink,
        intermediate_size=28672 // shrink,
        num_layers=layers,
        num_heads=64 // shrink,
        num_kv_heads=8 // shrink,
        head_dim=128,
        rope=Default(10000.0, 128),
        max_position_embeddings=4096,
    )


def write(config: LlamaConfig, directory: Path) -> None:
    """Write random weights, a tensor at a time."""
    parameters = dict(empty_model(config).named_parameters())
    specs = {name: hf.Spec(tuple(parameter.shape), torch.bfloat16) for name, parameter in parameters.items()}

    def tensor(name: str, spec: hf.Spec) -> torch.Tensor:
        made = torch.empty(spec.shape, dtype=spec.dtype)
        return made.fill_(1) if name.endswith("norm.weight") else made.uniform_(-0.02, 0.02)

    hf.write_tensors(directory, specs, ((name, tensor(name, spec)) for name, spec in specs.items()))
    write_config(config, directory, dtype=torch.bfloat16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--sensitivity", type=int, default=8192)
    parser.add_argument("--no-products", action="store_true")
    parser.add_argument("--shrink", type=int, choices=(1, 2, 4, 8), default=1)
    given = parser.parse_args()
    config = shape(given.layers, given.shrink)
    tokens = list(torch.randint(0, config.vocab_size, (max(1, given.tokens // 2048), min(given.tokens, 2048))))
    asked = None
    if given.variant:
        text = Calibration(text=Path("-"), compute="bfloat16")
        asked = QuantizeConfig(variants=tuple(given.variant), calibration=text, sensitivity=given.sensitivity)
    promised = needs(config, [len(ids) for ids in tokens], asked)
    print(f"promised: {gib(promised.memory):.2f} GiB of memory, {gib(promised.file):.2f} GiB in a file")
    peaks: list[float] = []

    def seen(_: object = None) -> None:
        peaks.append(gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        print(f"peak {peaks[-1]:.2f} GiB, now {now():.2f} GiB", flush=True)

    with tempfile.TemporaryDirectory() as name, NoProducts() if given.no_products else nullcontext():
        model = Path(name) / "model"
        model.mkdir()
        write(config, model)
        seen()
        if asked is not None:
            solved = run.__globals__["_solve_layer"]

            def solve(*args: Any) -> None:
                seen()
                solved(*args)
                seen()

            run.__globals__["_solve_layer"] = solve
            run(asked, model=model, out=lambda variant: Path(name) / variant.name, tokens=tokens)
        else:
            with closing(Progress(Path(name) / "progress", {})) as progress:
                waiting = progress.waiting({UNQUANTIZED: 0})
                for layer in Walk(model, config, tokens, dtype=torch.bfloat16, waiting=waiting):
                    seen()
                    del layer
        seen()
    what = "GiB of resident memory at the height" + (", without products" if given.no_products else "")
    row = {"value": round(peaks[-1], 2), "unit": what, "promised": round(gib(promised.memory), 2)}
    print(json.dumps(row | vars(given) | {"layer_by_layer": [round(each, 2) for each in peaks]}))


def gib(size: float) -> float:
    """Return bytes in GiB."""
    return size / 2**30


def now() -> float:
    """Return GiB of resident memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return gib(pages * resource.getpagesize())


if __name__ == "__main__":
    main()
