"""How far are GGUF files from their model, rounded weight by weight, by GPTQ, and by llama.cpp?

KL(original || file) in nats per token on text that was not calibrated on, by our own reading of every file; embedding
and head are those of the original, so that what is compared is how the linear layers are rounded (`--whole`: the file
as it is). llama.cpp quantizes our file of F16 with the importances that ours had; where its environment has not been
made (`make peers`), its column says so.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantize_vs_peers import SHARED, Peer, tokens_of  # pyright: ignore[reportAttributeAccessIssue]
from record import append
from safetensors.torch import save_file

from llamero.checkpoint.gguf_names import to_gguf
from llamero.core import gguf
from llamero.infer import score
from llamero.model.load import load_config, load_model
from llamero.quantize import calibrate, gguf_mix
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run

MIXES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0")


class Judge:
    """Measures files against the unquantized model."""

    def __init__(self, model: Path, ids: list[int], length: int, *, whole: bool) -> None:
        self.reference, self.whole = load_model(model, dtype=torch.float32), whole
        self.ids, self.windows = ids, score.sliding(len(ids), window=length, stride=length)

    def kl(self, file: Path) -> float:
        """Return the divergence of a file, or of a directory."""
        other = load_model(file, dtype=torch.float32)
        if not self.whole:
            other.model.embed_tokens, other.lm_head = self.reference.model.embed_tokens, self.reference.lm_head
        return score.compare(self.reference, other, self.ids, self.windows).kl


def importances(model: Path, tokens: list[torch.Tensor], place: Path) -> Path:
    """Return a file of the mean squares of all inputs, by the names of GGUF tensors."""
    found = {}
    for layer in calibrate.Walk(model, load_config(model), tokens):
        for source, about in layer.statistics.items():
            for name in calibrate.INPUTS[source]:
                tensor = to_gguf(f"model.layers.{layer.number}.{name}.weight")
                found[str(tensor)] = (about.second_moment.diagonal() / about.tokens).contiguous()
    save_file(found, place / "imatrix.safetensors")
    return place / "imatrix.safetensors"


def theirs(args: argparse.Namespace, tokens: list[torch.Tensor], place: Path) -> dict[str, Path] | str:
    """Return llama.cpp's file of each mix; what is to be said where there is no llama.cpp."""
    peer = Peer("llamacpp")
    if peer.absent:
        return peer.absent
    source = gguf.find(place / "gguf-F16")
    files: list[dict[str, Any]] = [
        {"model": source, "out": place / f"{mix}.gguf", "file_type": gguf_mix.MIXES[mix].file_type}
        for mix in args.mixes
    ]
    peer.run("llamacpp_quantize", imatrix=importances(args.model, tokens, place), files=files)
    return {mix: place / f"{mix}.gguf" for mix in args.mixes}


def measure(args: argparse.Namespace, place: Path) -> None:
    """Make the files, print a row for each mix and keep them."""
    tokens = list(tokens_of(args.model, args.calibration, args.sequences, args.length).long())
    held_out = tokens_of(args.model, args.test, args.test_sequences, args.length).flatten().tolist()
    names = [f"gguf-{kind}{mix}" for mix in args.mixes for kind in ("rtn-", "")]
    config = QuantizeConfig.model_validate({"variants": [*names, "gguf-F16"], "calibration": {"text": "given.txt"}})
    run(config, model=args.model, out=lambda variant: place / variant.name, tokens=tokens)
    llamacpp, judge = theirs(args, tokens, place), Judge(args.model, held_out, args.length, whole=args.whole)
    if isinstance(llamacpp, str):
        print(llamacpp)
    found: dict[str, dict[str, float]] = {}
    print("| mix | rounded | GPTQ | share | llama.cpp |\n|---|---|---|---|---|")
    for mix in args.mixes:
        row = found[mix] = {kind: judge.kl(place / f"gguf-{kind}{mix}") for kind in ("rtn-", "")}
        other = "not made"
        if not isinstance(llamacpp, str):
            row["llama.cpp"] = judge.kl(llamacpp[mix])
            other = f"{row['llama.cpp']:.2e}"
        print(f"| {mix} | {row['rtn-']:.2e} | {row['']:.2e} | {row[''] / row['rtn-']:.2f} | {other} |", flush=True)
    append(
        "quantize_gguf",
        value=round(max(row[""] / row["rtn-"] for row in found.values()), 3),
        unit="KL with GPTQ in that of rounding, at most",
        seed=0,
        model=args.model.name,
        tokens=args.sequences * args.length,
        held_out=len(held_out),
        whole=args.whole,
        llamacpp=not isinstance(llamacpp, str),
        kl={f"{kind or 'gptq-'}{mix}": float(f"{kl:.4e}") for mix, row in found.items() for kind, kl in row.items()},
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "weights/ref-7m-hf")
    parser.add_argument("--calibration", type=Path, default=SHARED / "longtext/wikitext2/valid.txt")
    parser.add_argument("--test", type=Path, default=SHARED / "longtext/wikitext2/test.txt")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--test-sequences", type=int, default=24)
    parser.add_argument("--mixes", nargs="+", choices=[*gguf_mix.MIXES], default=list(MIXES))
    parser.add_argument("--whole", action="store_true", help="embedding and head as the file has them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


if __name__ == "__main__":
    main()
