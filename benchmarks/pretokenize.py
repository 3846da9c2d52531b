"""How fast do dialogues become tokens and roles on disk, against a plain loop and against `datasets.map`?

All sides read the same JSON lines (`messages`), write ChatML and use the same tokenizer: Llama-2 with `<|im_start|>`
and `<|im_end|>` added. The dialogues are those of Alpaca, LIMA, Orca, ShareGPT and Dolly samples, over
and over with variations, so that nobody profits from texts seen before: in each, one word in twenty is another
word of the samples and one in a hundred is misspelt, in a way of its own.

- `loop` is what the Open-Assistant pretokenizer does, in one process: a line is parsed, its turns are written and
  tokenized one by one through `tokenizers`, every token of a turn gets its role, both go to `.bin` and `.idx`.
- `loop+check` also tokenizes the whole dialogue and compares, as the original does.
- `datasets.map` has two processes, batches, and one `encode_batch_fast` for all turns of a batch; it writes Arrow.
- `llamero` is the stage of a recipe, alone and with two workers: statistics, checks and resumability included.

Every run must find the same number of tokens. Measured in processes of their own that take turns, the median counts:
CPU time (user + system, of all processes) and wall time from the file of dialogues to the files of tokens; imports
of the first process and loading the tokenizer for the loops are left out, starting workers is not.
Not measured: memory, more than two processes, other tokenizers.

    python benchmarks/pretokenize.py [--dialogues 50000] [--repeat 3] [--data ../shared/data]
    python benchmarks/pretokenize.py --dialogues 2500  # every dialogue once: many words are new
"""

import argparse
import json
import os
import random
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

EXTRA = ["<|im_start|>", "<|im_end|>"]
ROLES = {"system": 0, "user": 1, "assistant": 2}


@dataclass(frozen=True)
class Run:
    """What one process measured."""

    cpu: float
    wall: float
    tokens: int


def samples(instruct: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the dialogues there are: (role, text) of each turn."""

    def rows(path: str) -> list[dict[str, Any]]:
        text = (instruct / path).read_text()
        return json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]

    for path in ("alpaca/alpaca_en_demo.json", "lima/lima.json"):
        for row in rows(path):
            asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
            yield [("user", asked), ("assistant", row["output"])]
    for row in rows("orca/validation.jsonl"):
        yield [(turn["role"], turn["content"]) for turn in row["input"]["messages"] + row["preferred_output"]]
    for row in rows("sharegpt/sharegpt_sample.json"):
        names: dict[str, str] = {"human": "user", "gpt": "assistant"}
        yield [(names[turn["from"]], turn["value"]) for turn in row["conversations"]]
    for row in rows("dolly/dolly.jsonl"):
        yield [("user", row["prompt"]), ("assistant", row["answer"])]


def write_dialogues(instruct: Path, count: int, path: Path, *, seed: int) -> None:
    """Write so many dialogues, each different."""
    chance = random.Random(seed)
    found = [dialogue for dialogue in samples(instruct) if all(text.strip() for _, text in dialogue)]
    words = [word for dialogue in found for _, text in dialogue for word in text.split()]
    with path.open("w") as file:
        for number in range(count):
            dialogue = found[number % len(found)]
            varied = number >= len(found)
            turns = [
                {"role": role, "content": vary(text, words, chance) if varied else text} for role, text in dialogue
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def vary(text: str, words: list[str], chance: random.Random) -> str:
    """Return a text with some words exchanged and some misspelt."""
    parts = text.split(" ")
    for place in chance.sample(range(len(parts)), -(-len(parts) // 20)):
        parts[place] = chance.choice(words)
    for place in chance.sample(range(len(parts)), len(parts) // 100 + (chance.random() < len(parts) % 100 / 100)):
        letters = list(parts[place])
        chance.shuffle(letters)
        parts[place] = "".join(letters)
    return " ".join(parts)


def turn_text(turn: dict[str, str]) -> str:
    return f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"


class PlainWriter:
    """A Megatron pair, written as it was in 2023: each document at once, the index at the end."""

    def __init__(self, stem: Path) -> None:
        self.stem, self.lengths = stem, []
        self.bin = Path(f"{stem}.bin").open("wb")  # noqa: SIM115

    def add(self, values: list[int]) -> None:
        self.bin.write(np.array(values, dtype=np.uint16).tobytes())
        self.lengths.append(len(values))

    def close(self) -> None:
        self.bin.close()
        lengths = np.array(self.lengths, dtype=np.int32)
        offsets = np.concatenate([[0], lengths[:-1].cumsum(dtype=np.int64)]) * 2
        with Path(f"{self.stem}.idx").open("wb") as file:
            file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
            for array in (lengths, offsets.astype(np.int64), np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(array.tobytes())


def loop(dialogues: Path, tokenizer: Path, out: Path, *, check: bool = False) -> int:
    """Tokenize in a plain loop."""
    backend = _backend(tokenizer)
    with clocked():
        text, role = PlainWriter(out / "text"), PlainWriter(out / "role")
        with dialogues.open() as lines:
            for line in lines:
                turns = json.loads(line)["messages"]
                ids, roles = [], []
                for turn in turns:
                    found = backend.encode(turn_text(turn), add_special_tokens=False).ids
                    ids += found
                    roles += [ROLES[turn["role"]]] * len(found)
                if check:
                    whole = backend.encode("".join(map(turn_text, turns)), add_special_tokens=False).ids
                    assert whole == ids
                text.add(ids)
                role.add(roles)
        text.close()
        role.close()
    return sum(text.lengths)


def loop_check(dialogues: Path, tokenizer: Path, out: Path) -> int:
    """Tokenize in a plain loop that compares turns with whole dialogues."""
    return loop(dialogues, tokenizer, out, check=True)


def datasets_map(dialogues: Path, tokenizer: Path, out: Path) -> int:
    """Tokenize with two processes of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    with clocked():
        rows = datasets.load_dataset("json", data_files=str(dialogues), split="train", cache_dir=str(out))
        made = rows.map(
            MapTurns(tokenizer), batched=True, num_proc=2, remove_columns=rows.column_names, load_from_cache_file=False
        )
    return sum(map(len, made["input_ids"]))


class MapTurns:
    """Tokens and roles of a batch of dialogues."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer, self.backend = tokenizer, None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        self.backend = self.backend or _backend(self.tokenizer)
        turns = [turn for turns in batch["messages"] for turn in turns]
        encoded = iter(self.backend.encode_batch_fast(list(map(turn_text, turns)), add_special_tokens=False))
        ids, roles = [], []
        for turns in batch["messages"]:
            ids.append([])
            roles.append([])
            for turn in turns:
                found = next(encoded).ids
                ids[-1] += found
                roles[-1] += [ROLES[turn["role"]]] * len(found)
        return {"input_ids": ids, "roles": roles}


def llamero(dialogues: Path, tokenizer: Path, out: Path, *, team: int = 1) -> int:
    """Tokenize with llamero."""
    from llamero.data.config import MixtureConfig
    from llamero.data.run import tokenize_mixture

    source = {"source": "dialogues", "path": dialogues.name, "layout": "messages"}
    mixture = MixtureConfig.model_validate({"sources": [source]})
    with clocked():
        tokenize_mixture(
            "benchmark",
            mixture,
            tokenizer=tokenizer,
            template="chatml",
            root=dialogues.parent,
            seed=1,
            out=out,
            team=team,
        )
    return (out / "train-text.bin").stat().st_size // 2


def llamero_2(dialogues: Path, tokenizer: Path, out: Path) -> int:
    """Tokenize with two workers of llamero."""
    return llamero(dialogues, tokenizer, out, team=2)


SIDES = {
    "loop": loop,
    "loop+check": loop_check,
    "datasets.map, 2 processes": datasets_map,
    "llamero": llamero,
    "llamero, 2 workers": llamero_2,
}


def _backend(tokenizer: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer / "tokenizer.json"))


class clocked:  # noqa: N801
    """Measures what is done within, child processes included."""

    cpu = wall = 0.0

    def __enter__(self) -> None:
        self._cpu, self._wall = _cpu(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        clocked.cpu, clocked.wall = _cpu() - self._cpu, time.perf_counter() - self._wall


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def alone(side: str, directory: Path) -> Run:
    """Return what one side measured in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--directory", str(directory)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def run_side(side: str, directory: Path) -> None:
    """Measure one side, in this process."""
    with tempfile.TemporaryDirectory(dir=directory) as out:
        tokens = SIDES[side](directory / "dialogues.jsonl", directory / "tokenizer", Path(out))
    print(json.dumps(asdict(Run(clocked.cpu, clocked.wall, tokens))))


def compare(data: Path, dialogues: int, *, repeat: int, seed: int) -> None:
    """Measure all sides, print a row for each and keep the results."""
    from record import append

    from llamero.text.tokenizer import load_tokenizer

    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_dialogues(data / "instruct", dialogues, directory / "dialogues.jsonl", seed=seed)
        load_tokenizer(data / "tokenizers/llama2").with_tokens(EXTRA).save(directory / "tokenizer")
        for _ in range(repeat):
            for side in SIDES:
                runs[side].append(alone(side, directory))
    if len({run.tokens for each in runs.values() for run in each}) > 1:
        raise SystemExit(f"the sides do not agree: { {side: each[0].tokens for side, each in runs.items()} }")
    cpu = {side: statistics.median(run.cpu for run in each) for side, each in runs.items()}
    wall = {side: statistics.median(run.wall for run in each) for side, each in runs.items()}
    tokens = runs["loop"][0].tokens
    print(
        "| | dialogues | tokens | CPU-s | wall, s | dialogues per CPU-s | ratio to loop | wall ratio to datasets.map |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for side in SIDES:
        speed, ratio = dialogues / cpu[side], cpu["loop"] / cpu[side]
        wall_ratio = wall["datasets.map, 2 processes"] / wall[side]
        print(
            f"| {side} | {dialogues:,} | {tokens:,} | {cpu[side]:.1f} | {wall[side]:.1f} | {speed:,.0f} "
            f"| {ratio:.2f}× | {wall_ratio:.2f}× |"
        )
        append(
            "pretokenize",
            value=round(speed, 1),
            unit="dialogues per CPU-second",
            libraries=("tokenizers", "datasets"),
            seed=seed,
            side=side,
            dialogues=dialogues,
            tokens=tokens,
            cpu=[round(run.cpu, 2) for run in runs[side]],
            wall=[round(run.wall, 2) for run in runs[side]],
            ratio=round(ratio, 3),
            wall_ratio=round(wall_ratio, 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Dialogues to tokens, beside a plain loop and `datasets.map`.")
    shared = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data", help="folder with `instruct` and `tokenizers`")
    parser.add_argument("--dialogues", type=int, default=50_000)
    parser.add_argument("--repeat", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # these two: a process of its own
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.directory)
        return
    compare(args.data, args.dialogues, repeat=args.repeat, seed=args.seed)


if __name__ == "__main__":
    main()
