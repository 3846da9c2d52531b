"""How much memory does the calibration of a 70B model take?

    python benchmarks/quantize_memory.py [--layers 2] [--tokens 2048] [--variant rtn-4bit-128g]

Writes a model with the layer shapes of Llama-2-70B, few layers, a small vocabulary and random weights, walks through it
and prints the peak of resident memory after each layer beside what `quantize/needs.py` promises. More layers change
nothing, more tokens only what waits between layers: beyond 2 GiB in a file. Without --variant nothing is solved.
Needs 3.4 GB of disk for two layers.
"""

import argparse
import resource
import tempfile
from pathlib import Path

import torch

from llamero.checkpoint import hf
from llamero.model.config import LlamaConfig
from llamero.model.load import empty_model, write_config
from llamero.model.rope import Default
from llamero.quantize.calibrate import Walk
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.needs import needs
from llamero.quantize.run import run


def shape(layers: int) -> LlamaConfig:
    """Return Llama-2-70B with fewer layers and words."""
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=layers,
        num_heads=64,
        num_kv_heads=8,
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


def peak() -> str:
    """Return the peak of resident memory so far."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30:.2f} GiB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--variant", action="append", default=[])
    asked = parser.parse_args()
    config = shape(asked.layers)
    tokens = list(torch.randint(0, config.vocab_size, (max(1, asked.tokens // 2048), min(asked.tokens, 2048))))
    promised = needs(config, [len(ids) for ids in tokens], solve=bool(asked.variant))
    print(f"promised: {promised.memory / 2**30:.2f} GiB of memory, {promised.file / 2**30:.2f} GiB in a file")
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        write(config, model)
        print(f"the model is written: peak {peak()}", flush=True)
        if asked.variant:
            how = QuantizeConfig(variants=tuple(asked.variant), calibration=Calibration(text=Path("-")), sensitivity=0)
            run(how, model=model, out=lambda variant: Path(name) / variant.name, tokens=tokens)
        else:
            for layer in Walk(model, config, tokens, dtype=torch.bfloat16, spill=Path(name)):
                print(f"layer {layer.number}: peak {peak()}", flush=True)
                del layer
        print(f"peak {peak()}")


if __name__ == "__main__":
    main()
