"""How many samples per CPU-second are searched for test questions, and compared for near-duplicates?

Rows of the files given (all their texts together are a sample), against the benchmark folders given:

- passages of 13 and of 8 words: `Index.find` against the loop one would write, a Python set of tuples of words (which
  finds passages of whole length only, and neither short questions nor where a passage stands);
- near-duplicates: `signature` and `find` against datasketch's `MinHash.bulk` with `MinHashLSH`, on the same passages of
  five words, 128 places, threshold 0.8, each sample inserted unless an earlier one resembles it.

Both sides start from the text and split it into words by the same function. One process and one thread; CPU time, of
which the fastest of `--repeat` turns counts.
Not measured: reading files, memory, worker processes; building the index is in the results.

    python benchmarks/decontaminate.py DATA... --against DIR   (`pip install datasketch` for the second comparison)
"""

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import append

from llamero.corpus import overlap, rows
from llamero.data import decontaminate, duplicates
from llamero.data.decontaminate import Index, TestText

CHUNK = 1000
"""Samples at a time, as a worker gets them."""
THRESHOLD = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="files or directories of rows")
    parser.add_argument("--against", required=True, type=Path, help="folder of benchmarks")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    texts = list(samples(options.data))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    print(f"{len(texts):,} samples, {size / 1e6:.1f} MB")
    tests = decontaminate.load_tests({"benchmarks": options.against})

    def show(what: str, peer: str, ours: float, theirs: float, **more: Any) -> None:
        print(f"| {what} | {len(texts) / ours:,.0f} | {len(texts) / theirs:,.0f} ({peer}) | {theirs / ours:.1f} |")
        value = round(len(texts) / ours)
        more |= {"samples": len(texts), "bytes": size, "peer": peer, "peer_value": round(len(texts) / theirs)}
        append("decontaminate", value=value, unit="samples per CPU-second", seed=0, what=what, **more)

    print("| what | samples per CPU-second | peer | times |\n|---|---|---|---|")
    for ngram in (13, 8):
        began = time.process_time()
        index = Index(tests, ngram=ngram)
        built = time.process_time() - began
        ours, found = best(options.repeat, lambda index=index: [m for part in chunks(texts) for m in index.find(part)])
        plain = plain_index(tests, ngram)
        theirs, _ = best(options.repeat, lambda plain=plain, ngram=ngram: plain_find(texts, plain, ngram))
        hits = sum(match is not None for match in found)
        show(f"passages of {ngram} words", "set of tuples", ours, theirs, found=hits, build_seconds=round(built, 2))
    ours, found = best(options.repeat, lambda: near_duplicates(texts))
    if find_spec("datasketch") is None:
        print(f"| near-duplicates | {len(texts) / ours:,.0f} | datasketch is not installed | |")
        return
    theirs, out = best(options.repeat, lambda: by_datasketch(texts))
    show("near-duplicates", "datasketch", ours, theirs, found=found, peer_found=out)


def samples(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for file in sorted(path.glob("**/*.json*")) if path.is_dir() else [path]:
            for located in rows.rows(file):
                if located.row is not None:
                    yield "\n".join(strings(located.row))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def chunks(texts: list[str]) -> Iterator[list[str]]:
    return (texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK))


def best(times: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of the fastest turn, and what it returned."""
    turns, result = [], None
    for _ in range(times):
        began = time.process_time()
        result = work()
        turns.append(time.process_time() - began)
    return min(turns), result


def passages(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]


def plain_index(tests: list[TestText], length: int) -> set[tuple[str, ...]]:
    texts = (text for test in tests for text in test.questions + test.answers)
    return {passage for text in texts for passage in passages(overlap.split(text), length)}


def plain_find(texts: list[str], known: set[tuple[str, ...]], length: int) -> list[bool]:
    return [not known.isdisjoint(passages(overlap.split(text), length)) for text in texts]


def near_duplicates(texts: list[str]) -> int:
    import numpy as np

    signatures = np.vstack([duplicates.signature(part) for part in chunks(texts)])
    return int((duplicates.find(signatures, threshold=THRESHOLD) >= 0).sum())


def by_datasketch(texts: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

    index = MinHashLSH(threshold=THRESHOLD, num_perm=duplicates.PLACES)
    kept: dict[int, Any] = {}
    for at, part in enumerate(chunks(texts)):
        words = [overlap.split(text) for text in part]
        sets = [[" ".join(gram).encode() for gram in passages(its, 5) or [tuple(its)]] for its in words]
        for number, sketch in enumerate(MinHash.bulk(sets, num_perm=duplicates.PLACES), at * CHUNK):
            if not any(kept[other].jaccard(sketch) >= THRESHOLD for other in index.query(sketch)):
                kept[number] = sketch
                index.insert(number, sketch)
    return len(texts) - len(kept)


if __name__ == "__main__":
    main()
