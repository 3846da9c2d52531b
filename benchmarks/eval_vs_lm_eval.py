"""How many times the CPU-seconds of ours does lm-eval's hf backend take for the log-likelihoods of H4?

A Llama of 58 M parameters with random weights (hidden 512, intermediate 1376, 8 layers, 8 heads, 32,000 tokens) and
the tokenizer of Llama 2 are asked the requests of the 2023 leaderboard: MMLU 3 subjects of 40 documents (5-shot), ARC
24 documents (25-shot), HellaSwag 40 (10-shot), TruthfulQA 100 (mc2), each distinct request once. Both sides get the
same ids and the same dtype, with one thread, each task in a process of its own; lm-eval 0.4 runs
`_loglikelihood_tokens` of its HFLM with batch size 1, the cheapest on a CPU.

Measured: CPU-seconds (user + system) of scoring alone (loading and tokenizing left out), tokens that went through the
model, tokens of the prefix tree (what has to be computed at least), the largest difference of a log-likelihood,
questions whose likeliest answer is another, and how far the peak of memory rose while scoring.

    python benchmarks/eval_vs_lm_eval.py [--dtype float32 bfloat16] [--tasks mmlu arc …] [--data DIR] [--tokenizer DIR]
    python benchmarks/eval_vs_lm_eval.py --count [--limit 20]      # tokens of all of H4, nothing is scored
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import append, single_thread_environment

from llamero.evaluate import h4, tokens
from llamero.infer.likelihood import PASS_TOKENS, log_likelihoods, prepare
from llamero.model.config import LlamaConfig
from llamero.model.load import load_model
from llamero.model.rope import Default
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"

SETS: dict[str, tuple[tuple[str, ...], int]] = {
    "mmlu": (("anatomy", "astronomy", "college_physics"), 40),
    "arc": (("arc_challenge",), 24),
    "hellaswag": (("hellaswag",), 40),
    "truthfulqa": (("truthfulqa_mc",), 100),
}
"""Tasks, and documents of each."""

SHAPE = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1376,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    rope=Default(10000.0, 64),
    max_position_embeddings=4096,
)

Pairs = list[tuple[list[int], list[int]]]


def make_model(directory: Path, seed: int) -> None:
    """Write the model, as transformers initializes it."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        max_position_embeddings=SHAPE.max_position_embeddings,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def asked(
    data: Path, tokenizer: Path, task: str, limit: int | None, subjects: int | None = None
) -> tuple[Pairs, list[int]]:
    """Return the distinct requests of a task as ids, and how many of them each document has."""
    names, documents = SETS[task]
    names = names[:subjects]
    encode = load_tokenizer(tokenizer)
    known = [h4.MMLU_PREFIX["leaderboard-2023"] + name if task == "mmlu" else name for name in names]
    pairs: Pairs = []
    counts: list[int] = []
    for one in h4.tasks(data, known, limit=limit or documents):
        for number, document in enumerate(one.documents):
            mine = [request for request in one.requests if request.doc == number]
            mine = mine[len(document.choices) - len(document.mc2_labels) :] if document.mc2_labels else mine
            pairs += [tokens.pair(encode, request.context, request.continuation, bos=False) for request in mine]
            counts.append(len(mine))
    return pairs, counts


def count_passes(model: Any, name: str) -> list[int]:
    """Return a list that gets the tokens of each forward pass from now on."""
    seen: list[int] = []
    forward = getattr(model, name)

    def counted(ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(ids.numel())
        return forward(ids, *rest, **more)

    setattr(model, name, counted)
    return seen


def ours(directory: Path, dtype: torch.dtype, pairs: Pairs) -> tuple[Callable[[], list[float]], list[int]]:
    """Return how we score, and the list of tokens."""
    model = load_model(directory, dtype=dtype)
    seen = count_passes(model, "hidden")
    return (lambda: [scored.log_likelihood for scored in log_likelihoods(model, pairs)]), seen


def theirs(directory: Path, dtype: torch.dtype, pairs: Pairs) -> tuple[Callable[[], list[float]], list[int]]:
    """Return how lm-eval scores, and the list of tokens."""
    import tokenizers
    import transformers
    from lm_eval.models import huggingface

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(SHAPE.vocab_size)}, "t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0")
    made: Any = huggingface.HFLM
    lm = made(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    seen = count_passes(lm, "_model_call")
    requests = [(("", ""), context, continuation) for context, continuation in pairs]
    return (lambda: [found for found, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]), seen


SIDES = {"ours": ours, "theirs": theirs}


def one_side(work: Path, side: str, dtype: str) -> None:
    """Score the requests that lie in a directory, and write what came of it there."""
    torch.set_num_threads(1)
    pairs: Pairs = [(context, continuation) for context, continuation in json.loads((work / "pairs.json").read_text())]
    score, seen = SIDES[side](work / "model", getattr(torch, dtype), pairs)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
    before, start = memory("VmRSS"), time.process_time()
    found = score()
    cost = time.process_time() - start
    rise = (memory("VmHWM") - before) / 1024
    (work / f"{side}.json").write_text(json.dumps({"found": found, "cpu_s": cost, "tokens": sum(seen), "mib": rise}))


def memory(what: str) -> int:
    """Return KiB of this process as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def run_side(work: Path, side: str, dtype: str, *, apart: bool) -> dict[str, Any]:
    """Return what a process with one thread finds: one of its own, or this one."""
    if not apart:
        one_side(work, side, dtype)
        return json.loads((work / f"{side}.json").read_text())
    command = [sys.executable, __file__, "--side", side, "--work", str(work), "--dtype", dtype]
    subprocess.run(command, check=True, env=single_thread_environment())
    return json.loads((work / f"{side}.json").read_text())


def other_answers(counts: Sequence[int], a: Sequence[float], b: Sequence[float]) -> int:
    """Return of how many documents the likeliest answer differs."""
    differ, start = 0, 0
    for count in counts:
        ours_, theirs_ = a[start : start + count], b[start : start + count]
        differ += ours_.index(max(ours_)) != theirs_.index(max(theirs_))
        start += count
    return differ


def compare(work: Path, task: str, dtype: str, counts: list[int], pairs: Pairs, *, apart: bool) -> tuple[float, float]:
    """Print a row, record it, and return both costs."""
    mine, other = (run_side(work, side, dtype, apart=apart) for side in SIDES)
    tree = prepare(SHAPE, pairs, pass_tokens=PASS_TOKENS["cpu"]).tokens
    differences = max(abs(a - b) for a, b in zip(mine["found"], other["found"], strict=True))
    differ = other_answers(counts, mine["found"], other["found"])
    gain = other["cpu_s"] / mine["cpu_s"]
    print(
        f"| {task} | {dtype} | {len(counts)} | {other['tokens']} | {mine['tokens']} | {mine['tokens'] / tree:.3f} "
        f"| {gain:.1f} | {differences:.1e} | {differ} | {other['mib']:.0f} | {mine['mib']:.0f} |",
        flush=True,
    )
    append(
        "eval_vs_lm_eval",
        value=round(gain, 2),
        unit="CPU-seconds of lm-eval's hf backend over ours",
        seed=0,
        libraries=("lm_eval", "transformers"),
        task=task,
        dtype=dtype,
        documents=len(counts),
        requests=len(pairs),
        cpu_s={"ours": round(mine["cpu_s"], 2), "theirs": round(other["cpu_s"], 2)},
        tokens={"ours": mine["tokens"], "theirs": other["tokens"], "tree": tree},
        peak_mib={"ours": round(mine["mib"]), "theirs": round(other["mib"])},
        largest_difference=differences,
        other_answers=differ,
    )
    return mine["cpu_s"], other["cpu_s"]


def count(data: Path, tokenizer: Path, limit: int | None) -> None:
    """Print what H4 comes to."""
    encode, total = load_tokenizer(tokenizer), [0, 0, 0]
    print("| task | requests | tokens of requests | tokens of the tree | computed / tree | passes |")
    print("|---|---|---|---|---|---|")
    for name in h4.BENCHMARKS:
        pairs = [
            tokens.pair(encode, request.context, request.continuation, bos=False)
            for one in h4.tasks(data, (name,), limit=limit)
            for request in one.requests
        ]
        work = prepare(SHAPE, pairs, pass_tokens=PASS_TOKENS["cpu"])
        alone = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        computed = sum(stop - start for start, stop in work.passes)
        distinct = len({ids for context, continuation in pairs for ids in _prefixes(context, continuation)})
        print(f"| {name} | {len(pairs)} | {alone} | {distinct} | {computed / distinct:.4f} | {len(work.passes)} |")
        total = [a + b for a, b in zip(total, (len(pairs), alone, distinct), strict=True)]
    print(f"| all | {total[0]} | {total[1]} | {total[2]} | | |")


def _prefixes(context: list[int], continuation: list[int]) -> list[int]:
    """Return a number for each beginning of a request: what a tree of prefixes has a node for, counted without one."""
    found, state = [], 0
    for token in [*context, *continuation[:-1]]:
        state = hash((state, token))
        found.append(state)
    return found


def main() -> None:
    """Print a row per task and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "benchmarks")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama2")
    parser.add_argument("--tasks", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--limit", type=int, help="documents of each task, fewer than it says above")
    parser.add_argument("--subjects", type=int, help="subjects of MMLU, fewer than it says above")
    parser.add_argument("--together", action="store_true", help="all in one process: less time to start")
    parser.add_argument("--count", action="store_true", help="only count the tokens of all of H4")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        one_side(given.work, given.side, given.dtype[0])
        return
    if given.count:
        count(given.data, given.tokenizer, given.limit)
        return
    print("| task | dtype | documents | tokens hf | ours | / tree | hf : ours | Δ | other answers | MiB hf | ours |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", seed=0)
        for dtype in given.dtype:
            costs = []
            for task in given.tasks:
                pairs, counts = asked(given.data, given.tokenizer, task, given.limit, given.subjects)
                (work / "pairs.json").write_text(json.dumps(pairs))
                costs.append(compare(work, task, dtype, counts, pairs, apart=not given.together))
            mine, other = (sum(column) for column in zip(*costs, strict=True))
            print(f"| all | {dtype} | | | | | {other / mine:.1f} | | | | |", flush=True)


if __name__ == "__main__":
    main()
