"""How many samples per CPU-second does packing take in, and how full are its rows, against TRL's best-fit packing?

The lengths are those of real instruction data (every file of a folder whose rows have a known layout, rendered as
ChatML, tokenized), drawn with replacement until there are enough; samples longer than a row are cut to it first, as
TRL's `bfd` does. Both sides pack the same samples.

TRL's `pack_dataset(strategy="bfd")` runs twice: as users call it, which packs windows of 1,000 samples, and with
`batch_size=None`, which packs the whole set at once. It returns a data set whose tokens lie in packed order;
llamero returns which samples make up each row, and tokens are fetched when a batch is assembled. So llamero is measured
twice too: the rows alone, and with the tokens of all samples (one byte each, as on TRL's side) laid in packed order.

Measured: CPU time (user + system, all threads) of the call, the sides taking turns, of which the fastest counts.
Not measured: tokenizing, making TRL's data set, memory.

    python benchmarks/packing.py [--data DIR] [--tokenizer DIR] [--samples 1000000] [--capacity 4096 512] [--repeat 3]
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from record import append

from llamero.core.errors import LlameroError
from llamero.corpus.packing import best_fit_decreasing
from llamero.corpus.samples import Chat
from llamero.data.config import FileSource
from llamero.data.read import Reading
from llamero.text.render import render
from llamero.text.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


class Packed(NamedTuple):
    """What one call came to."""

    seconds: float
    """CPU time, user and system."""
    rows: int


def real_lengths(folder: Path, tokenizer_path: Path) -> np.ndarray:
    """Return the tokens of every sample of the files of a folder."""
    tokenizer = load_tokenizer(tokenizer_path).with_tokens(["<|im_start|>", "<|im_end|>"])
    lengths: list[int] = []
    for path in sorted(path for path in folder.rglob("*.json*") if path.is_file()):
        try:
            found = Reading(FileSource(source=path.stem, path=str(path), on_error="skip"), folder).samples()
            samples = [sample for _, sample in found]
        except LlameroError as error:
            print(f"left out: {error.problem} ({path.name})")
            continue
        for sample in samples:
            if isinstance(sample, Chat):
                lengths.append(len(render(sample.messages, template="chatml", tokenizer=tokenizer).ids))
            else:
                lengths.append(len(tokenizer.encode(sample.text)))
    return np.asarray(lengths)


def llamero(lengths: np.ndarray, capacity: int) -> Packed:
    """Return the rows of all samples."""
    began = time.process_time()
    rows = best_fit_decreasing(lengths, capacity)
    return Packed(time.process_time() - began, len(rows))


def llamero_with_tokens(lengths: np.ndarray, capacity: int) -> Packed:
    """Return the rows of all samples, and lay their tokens in this order."""
    tokens = np.zeros(lengths.sum(), dtype=np.uint8)
    began = time.process_time()
    rows = best_fit_decreasing(lengths, capacity)
    stops = np.cumsum(lengths)
    order = rows.documents
    starts = (stops - lengths)[order].tolist()
    laid = np.concatenate([tokens[a:b] for a, b in zip(starts, stops[order].tolist(), strict=True)])
    seconds = time.process_time() - began
    assert laid.size == tokens.size
    return Packed(seconds, len(rows))


def trl(lengths: np.ndarray, capacity: int) -> Packed:
    """Pack windows of 1,000 samples with TRL."""
    return _trl(lengths, capacity, 1000)


def trl_whole(lengths: np.ndarray, capacity: int) -> Packed:
    """Pack the whole set with TRL."""
    return _trl(lengths, capacity, None)


def _trl(lengths: np.ndarray, capacity: int, window: int | None) -> Packed:
    import datasets
    import pyarrow as pa
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.uint8))
    dataset = datasets.Dataset(pa.table({"input_ids": tokens}))
    how = {"batch_size": window, "keep_in_memory": True}
    began = time.process_time()
    packed = pack_dataset(dataset, capacity, strategy="bfd", map_kwargs=how)
    return Packed(time.process_time() - began, len(packed))


SIDES: dict[str, Callable[[np.ndarray, int], Packed]] = {
    "llamero": llamero,
    "llamero, tokens laid out": llamero_with_tokens,
    "TRL, windows of 1,000": trl,
    "TRL, whole set": trl_whole,
}


def compare(lengths: np.ndarray, capacity: int, *, repeat: int, seed: int) -> None:
    """Measure one capacity, print a row for each side and keep the results."""
    runs: dict[str, list[Packed]] = {side: [] for side in SIDES}
    for _ in range(repeat):
        for side, pack in SIDES.items():
            runs[side].append(pack(lengths, capacity))
    for side, of in runs.items():
        speed = len(lengths) / min(run.seconds for run in of)
        fill = float(lengths.sum() / (of[0].rows * capacity))
        print(f"| {capacity} | {side} | {speed:,.0f} | {fill:.2%} | {of[0].rows:,} |", flush=True)
        append(
            "packing",
            value=round(speed),
            unit="samples per CPU-second",
            libraries=("trl", "datasets", "pyarrow"),
            side=side,
            capacity=capacity,
            samples=len(lengths),
            tokens=int(lengths.sum()),
            fill=round(fill, 5),
            rows=of[0].rows,
            seed=seed,
            repetitions=[round(run.seconds, 3) for run in of],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Packing speed and fill beside TRL's best-fit packing.")
    parser.add_argument("--data", type=Path, default=SHARED / "instruct", help="folder of instruction data")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "llama2")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096, 512], help="tokens of a row")
    parser.add_argument("--repeat", type=int, default=3, help="calls of each side; the fastest counts")
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    real = real_lengths(args.data, args.tokenizer)
    drawn = np.random.default_rng(args.seed).choice(real, args.samples)
    print(f"{real.size:,} samples, {real.sum():,} tokens, median {np.median(real):.0f}, longest {real.max():,}")
    for capacity in args.capacity:
        once = real.clip(max=capacity)
        rows = len(best_fit_decreasing(once, capacity))
        print(f"each once, rows of {capacity}: {rows:,} rows, {once.sum() / rows / capacity:.2%} filled")
    print("| row | side | samples per CPU-second | filled | rows |\n|---|---|---|---|---|")
    for capacity in args.capacity:
        compare(drawn.clip(max=capacity), capacity, repeat=args.repeat, seed=args.seed)


if __name__ == "__main__":
    main()
