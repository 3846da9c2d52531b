"""How far is a quantized model from the original, and what does a variant cost beside the first?

KL(original || variant) in nats per token on text that was neither trained nor calibrated on. Every variant is made
twice, without and with the measurement of how the loss feels outputs (`sensitivity`). Costs are CPU-seconds of one
thread, as multiples of what the walk over the calibration text takes.

    python benchmarks/quantize_quality.py [--model DIR] [--tokens 32768] [--held-out 8192] [--variant NAME ...]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llamero.model.load import DTYPES, load_config, load_model
from llamero.quantize import calibrate
from llamero.quantize.config import Calibration, QuantizeConfig
from llamero.quantize.run import run
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"

VARIANTS = (
    "rtn-4bit-128g",
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-128g-actorder_static",
    "gptq-3bit-128g-actorder_True",
    "gptq-3bit-128g-actorder_static",
    "gptq-2bit-128g-actorder_static",
    "gptq-2bit-32g-actorder_static",
)


def read(model: Path, text: Path, count: int, *, sequence: int = 512) -> list[Tensor]:
    """Return the first tokens of a text in sequences."""
    ids = load_tokenizer(model).encode(text.read_text(encoding="utf-8")[: 16 * count])[:count]
    return list(torch.tensor(ids).split(sequence))


@torch.no_grad()
def predictions(model: Path, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return log-probabilities (tokens, vocabulary) of each sequence, in float32."""
    loaded = load_model(model, dtype=torch.float32)
    return [F.log_softmax(loaded(ids[None])[0], -1) for ids in tokens]


def divergence(original: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the mean KL divergence per token."""
    total = sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in zip(original, other, strict=True))
    return total / sum(len(p) for p in original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "weights" / "ref-7m-hf")
    parser.add_argument("--calibrate", type=Path, default=SHARED / "longtext" / "wikitext2" / "valid.txt")
    parser.add_argument("--test", type=Path, default=SHARED / "longtext" / "wikitext2" / "test.txt")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--held-out", type=int, default=8_192)
    parser.add_argument("--sensitivity", type=int, nargs="*", default=[0, 4_096])
    parser.add_argument("--variant", nargs="*", default=VARIANTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    tokens, held_out = (
        read(chosen.model, chosen.calibrate, chosen.tokens),
        read(chosen.model, chosen.test, chosen.held_out),
    )
    original = predictions(chosen.model, held_out)
    started = time.process_time()
    arithmetic = DTYPES[Calibration(mixture="-").arithmetic]
    for layer in calibrate.Walk(chosen.model, load_config(chosen.model), tokens, dtype=arithmetic):
        del layer
    walk = time.process_time() - started
    print(
        f"{chosen.model.name}: {chosen.tokens} tokens of {chosen.calibrate.name}, "
        f"KL on {chosen.held_out} of {chosen.test.name}"
    )
    for sensitivity in chosen.sensitivity:
        with tempfile.TemporaryDirectory() as place:
            config = QuantizeConfig(
                variants=tuple(chosen.variant), calibration=Calibration(mixture="-"), sensitivity=sensitivity
            )
            started = time.process_time()
            reports = run(config, model=chosen.model, out=lambda v, at=place: Path(at) / v.name, tokens=tokens)
            spent = time.process_time() - started
            print(
                f"sensitivity {sensitivity}: {len(reports)} variants cost {spent / walk:.2f} walks, the walk included"
            )
            for report in reports:
                kl = divergence(original, predictions(report.path, held_out))
                print(f"  {report.variant.name:40} {report.bits_per_weight:.2f} bits  KL {kl:.3e}", flush=True)


if __name__ == "__main__":
    main()
