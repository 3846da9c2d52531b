"""What do seven GPTQ variants cost in one run, and how good are they, against a run per variant of other programs?

The same model, the same calibration tokens, one thread. Costs are CPU-seconds of whole processes with their children,
and of the work alone, without importing. Every directory is measured by the same code: KL against the unquantized model
on held-out text. auto-round, which tunes each block by gradients, is run for its quality.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import append
from safetensors.torch import save_file

from llamero.infer import score
from llamero.model.load import load_model
from llamero.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from parity.peers import HERE as PEERS  # noqa: E402  # pyright: ignore[reportMissingImports]
from parity.peers import Peer, PeerError  # noqa: E402  # pyright: ignore[reportMissingImports]

SHARED = ROOT.parent / "shared/data"
PROGRAMS = ("gptqmodel", "llmcompressor", "auto-round")


@dataclass(frozen=True)
class Case:
    """A variant, in the words of every program."""

    bits: int
    group_size: int
    ordered: bool = True
    """In the order of activation: `desc_act`, or what a program has instead of it."""

    @property
    def name(self) -> str:
        group = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {group}{'' if self.ordered else ', as they lie'}"

    @property
    def ours(self) -> str:
        return f"gptq-{self.bits}bit-{self.group_size}g-actorder_{self.ordered}"

    def job(self, program: str) -> tuple[str, str, dict[str, Any]] | None:
        """Return in which environment which script does it and with what; `None` where the program cannot."""
        same = {"bits": self.bits, "group_size": self.group_size, "sym": True}
        if program == "gptqmodel":
            return "gptqmodel", "gptqmodel_quantize", {**same, "desc_act": self.ordered}
        if program == "llmcompressor":  # the order is `static` here: it has given up `desc_act`
            return "llmcompressor", "llmcompressor_quantize", {**same, "actorder": "static" if self.ordered else None}
        tuned = self.group_size == 128 and self.ordered and self.bits < 8
        return ("llmcompressor", "autoround_quantize", same) if tuned else None


CASES = (
    Case(4, 128),
    Case(4, 32),
    Case(4, -1),
    Case(4, 128, ordered=False),
    Case(8, 128),
    Case(3, 128),
    Case(2, 128),
)

BESIDE = ("awq-4bit-128g", "gguf-Q2_K", "gguf-Q3_K_M", "gguf-Q4_K_M", "gguf-Q5_K_M", "gguf-Q6_K")
"""AWQ and five k-quants, which the same look at the text should give nearly for nothing."""


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    cpu_seconds: float
    """Of the process and its children."""
    work_seconds: float
    """The same without importing."""
    peak_bytes: int


def cost(program: Peer, script: str, **job: Any) -> Cost:
    done = program.run(script, timeout=6 * 3600, **job)
    imports = done.answer["import_seconds"]
    return Cost(done.cpu_seconds, done.cpu_seconds - imports, done.peak_bytes)


def kept(place: Path, make: Any) -> Cost | str:
    """Return the cost of a directory, made before or now; what went wrong where the program failed."""
    note = place.with_suffix(".json")
    if note.exists():
        noted = json.loads(note.read_text())
        return noted["failed"] if "failed" in noted else Cost(**noted)
    shutil.rmtree(place, ignore_errors=True)
    try:
        found: Cost | str = make()
    except PeerError as error:
        found = str(error).strip().splitlines()[-1][:200]
    note.write_text(json.dumps({"failed": found} if isinstance(found, str) else asdict(found)))
    return found


class Judge:
    """Measures directories against the unquantized model."""

    def __init__(self, model: Path, ids: list[int], window: int) -> None:
        self.reference = load_model(model, dtype=torch.float32)
        self.ids, self.windows = ids, score.sliding(len(ids), window=window, stride=window)

    def kl(self, directory: Path) -> float:
        other = load_model(directory, dtype=torch.float32)
        return score.compare(self.reference, other, self.ids, self.windows).kl


def tokens_of(model: Path, text: Path, count: int, length: int) -> torch.Tensor:
    ids = load_tokenizer(model).encode(text.read_text()[: 16 * count * length])
    if len(ids) < count * length:
        raise SystemExit(f"{text} has {len(ids)} tokens, {count * length} are needed")
    return torch.tensor(ids[: count * length], dtype=torch.int32).view(count, length)


def ours(place: Path, model: Path, tokens: Path, variants: list[str]) -> Cost | str:
    """Run our side once, in a process of its own."""

    def make() -> Cost:
        return cost(Peer("llamero"), "llamero_quantize", model=model, out=place, tokens=tokens, variants=variants)

    return kept(place, make)


def theirs(program: str, case: Case, place: Path, model: Path, tokens: Path) -> Cost | str | None:
    """Run a peer once for a variant."""
    how = case.job(program)
    if how is None:
        return None
    peer, script, job = Peer(how[0]), how[1], how[2]
    if peer.absent:
        return peer.absent
    return kept(place, lambda: cost(peer, script, model=model, out=place, tokens=tokens, **job))


def versions() -> dict[str, str]:
    """Return what the environments pin."""
    found = {}
    for file in PEERS.glob("*.txt"):
        for line in file.read_text().splitlines():
            name, _, version = line.lower().partition("==")
            if name in ("gptqmodel", "llmcompressor", "auto-round", "compressed-tensors"):
                found[name] = version
    return found


def measure(args: argparse.Namespace, place: Path) -> None:
    tokens = place / "calibration.safetensors"
    save_file({"ids": tokens_of(args.model, args.calibration, args.sequences, args.length)}, tokens)
    held_out = tokens_of(args.model, args.test, args.test_sequences, args.length).flatten().tolist()
    cases = [case for case in CASES if not args.bits or case.bits in args.bits]
    together = ours(place / "together", args.model, tokens, [case.ours for case in cases])
    alone = ours(place / "alone", args.model, tokens, [cases[0].ours])
    beside = ours(place / "beside", args.model, tokens, [*(case.ours for case in cases), *BESIDE])
    if isinstance(together, str) or isinstance(alone, str) or isinstance(beside, str):
        raise SystemExit(f"llamero failed: {[run for run in (together, alone, beside) if isinstance(run, str)]}")
    costs = {
        (program, case): theirs(program, case, place / f"{program}-{number}", args.model, tokens)
        for number, case in enumerate(cases)
        for program in args.peers
    }
    judge = Judge(args.model, held_out, args.length)
    kl: dict[tuple[str, Case], float] = {}
    print(f"| variant | llamero, KL | {' | '.join(f'{program}, KL (ratio), CPU-s' for program in args.peers)} |")
    print("|---|---|" + "---|" * len(args.peers))
    for number, case in enumerate(cases):
        kl["llamero", case] = judge.kl(place / "together" / case.ours)
        cells = []
        for program in args.peers:
            spent = costs[program, case]
            if isinstance(spent, Cost):
                kl[program, case] = judge.kl(place / f"{program}-{number}")
                ratio = kl[program, case] / kl["llamero", case]
                cells.append(f"{kl[program, case]:.3e} ({ratio:.3f}×), {spent.cpu_seconds:.1f}")
            else:
                cells.append(spent or "–")
        print(f"| {case.name} | {kl['llamero', case]:.3e} | {' | '.join(cells)} |", flush=True)
    report(args, cases, (together, alone, beside), costs, kl)


def report(
    args: argparse.Namespace,
    cases: list[Case],
    own: tuple[Cost, Cost, Cost],
    costs: dict[tuple[str, Case], Cost | str | None],
    kl: dict[tuple[str, Case], float],
) -> None:
    """Print ratios and keep them; `own` are all variants together, the first alone, and all with `BESIDE`."""
    together, alone, beside = own
    more = beside.work_seconds / together.work_seconds - 1
    print(
        f"\nllamero: {together.cpu_seconds:.1f} CPU-s for {len(cases)} variants ({together.work_seconds:.1f} of work), "
    )
    print(f"{alone.cpu_seconds:.1f} for the first alone ({alone.work_seconds:.1f}); peak {gib(together)} GiB.")
    marginal = (together.work_seconds - alone.work_seconds) / max(1, len(cases) - 1) / alone.work_seconds
    print(f"A further variant costs {marginal:.1%} of the first; {', '.join(BESIDE)} together {more:.1%} of all.")
    ratios: dict[str, Any] = {}
    for program in args.peers:
        made = [spent for case in cases if isinstance(spent := costs[program, case], Cost)]
        if not made:
            continue
        whole, work = sum(each.cpu_seconds for each in made), sum(each.work_seconds for each in made)
        scale = len(cases) / len(made)
        said = "" if len(made) == len(cases) else f" (extrapolated from {len(made)} runs)"
        ratios[program] = {
            "runs": len(made),
            "cpu": round(whole * scale / together.cpu_seconds, 2),
            "work": round(work * scale / together.work_seconds, 2),
            "peak": round(max(each.peak_bytes for each in made) / together.peak_bytes, 2),
        }
        print(
            f"{program}: {len(cases)} runs take {ratios[program]['cpu']}× the CPU of our one{said}, "
            f"{ratios[program]['work']}× without importing, and {ratios[program]['peak']}× its memory."
        )
    recorded = "" if ratios else add_recorded(ratios, together)
    best = {case.name: best_of(kl, case) / kl["llamero", case] for case in cases if best_of(kl, case) < math.inf}
    print("KL of the best peer in ours: " + ", ".join(f"{name} {ratio:.3f}×" for name, ratio in best.items()))
    append(
        "quantize_vs_peers",
        value=min((each["cpu"] for name, each in ratios.items() if name != "auto-round"), default=0.0),
        unit="CPU-seconds of the cheaper peer's runs in those of one run of ours",
        seed=0,
        model=args.model.name,
        tokens=args.sequences * args.length,
        threads=1,
        versions=versions(),
        cpu_seconds=round(together.cpu_seconds, 1),
        work_seconds=round(together.work_seconds, 1),
        marginal=round(marginal, 4),
        beside=round(more, 4),
        peak_gib=gib(together),
        ratios=ratios,
        peers=recorded or "run",
        kl={f"{program}: {case.name}": float(f"{value:.4e}") for (program, case), value in kl.items()},
    )


def add_recorded(ratios: dict[str, Any], together: Cost) -> str:
    """Add what peers cost when they were last run, of which only the sums are kept; return when that was."""
    rows = [json.loads(line) for line in (Path(__file__).parent / "results/quantize_vs_peers.jsonl").open()]
    row = next((row for row in reversed(rows) if row["ratios"] and row.get("peers", "run") == "run"), None)
    if row is None:
        return ""
    for program, kept in row["ratios"].items():
        cpu = round(kept["cpu"] * row["cpu_seconds"] / together.cpu_seconds, 2)
        work = round(kept["work"] * row["work_seconds"] / together.work_seconds, 2)
        ratios[program] = {"runs": 0, "cpu": cpu, "work": work}
        print(f"{program}, as it was run on {row['date']} ({row['cpu']}): {cpu}× the CPU of our one, {work}× of work.")
    return f"as recorded on {row['date']}"


def best_of(kl: dict[tuple[str, Case], float], case: Case) -> float:
    return min((value for (program, of), value in kl.items() if of == case and program != "llamero"), default=math.inf)


def gib(spent: Cost) -> float:
    return round(spent.peak_bytes / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="GPTQ variants beside GPTQModel, llm-compressor and auto-round.")
    parser.add_argument("--model", type=Path, default=SHARED / "weights/ref-7m-hf")
    parser.add_argument("--calibration", type=Path, default=SHARED / "longtext/wikitext2/valid.txt")
    parser.add_argument("--test", type=Path, default=SHARED / "longtext/wikitext2/test.txt")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--test-sequences", type=int, default=32)
    parser.add_argument("--peers", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--bits", type=int, nargs="+", help="only variants of so many bits")
    parser.add_argument("--keep", type=Path, help="directory for what is made; what is there is not made again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        measure(args, args.keep.resolve())
        return
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


if __name__ == "__main__":
    main()
