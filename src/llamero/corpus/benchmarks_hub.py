"""Benchmark files from the hub: fetched once as Parquet, and written in the layout that `corpus.benchmarks` reads.

They lie in the hub's own cache, so that a machine without a connection finds what was fetched before.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llamero.core import download, files
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Row = dict[str, Any]


class Source(NamedTuple):
    """Where a file comes from."""

    repo: str
    pattern: str
    """Of its Parquet files in the repository; `{subject}` is any subject of MMLU."""
    file: str
    """In the layout."""
    text: Callable[[Iterable[Row]], str]


def _jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _winogrande(rows: Iterable[Row]) -> str:
    return _jsonl({"qID": str(number), **row} for number, row in enumerate(rows))  # the hub leaves the names out


def _truthfulqa(rows: Iterable[Row]) -> str:
    def targets(row: Row, key: str) -> dict[str, int]:
        return dict(zip(row[key]["choices"], row[key]["labels"], strict=True))

    keys = ("mc1_targets", "mc2_targets")
    return json.dumps([{"question": row["question"], **{key: targets(row, key) for key in keys}} for row in rows])


def _mmlu(rows: Iterable[Row]) -> str:
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(
        [row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows
    )
    return written.getvalue()


SOURCES: dict[str, tuple[Source, ...]] = {
    "arc_challenge": tuple(
        Source("allenai/ai2_arc", f"ARC-Challenge/{split}-*.parquet", f"arc_challenge/{split}.jsonl", _jsonl)
        for split in ("test", "train")
    ),
    "hellaswag": (
        Source("Rowan/hellaswag", "data/validation-*.parquet", "hellaswag/hellaswag_val.jsonl", _jsonl),
        Source("Rowan/hellaswag", "data/train-*.parquet", "hellaswag/hellaswag_train.jsonl", _jsonl),
    ),
    "mmlu": tuple(
        Source("cais/mmlu", "{subject}/" + split + "-*.parquet", f"mmlu/{split}/{{subject}}_{split}.csv", _mmlu)
        for split in ("dev", "test")
    ),
    "truthfulqa": (
        Source(
            "truthfulqa/truthful_qa",
            "multiple_choice/validation-*.parquet",
            "truthfulqa/mc_task.json",
            _truthfulqa,
        ),
    ),
    "winogrande": (
        Source("allenai/winogrande", "winogrande_xl/validation-*.parquet", "winogrande/dev.jsonl", _winogrande),
        Source("allenai/winogrande", "winogrande_xl/train-*.parquet", "winogrande/train_xl.jsonl", _winogrande),
    ),
    "gsm8k": tuple(
        Source("openai/gsm8k", f"main/{split}-*.parquet", f"gsm8k/{split}.jsonl", _jsonl) for split in ("test", "train")
    ),
}
"""By folder of the layout. TruthfulQA is the later edition; the hub does not serve that of 2021."""

_NO_SUBJECT = ("all", "auxiliary_train")


def fetched(folders: Iterable[str]) -> Path:
    """Return a directory that holds the benchmark files of some folders.

    Args:
        folders: Which, of `SOURCES`.

    Raises:
        LlameroError: Neither the hub nor its cache has them.
    """
    to = download.cache() / "llamero" / "benchmarks"
    for folder in folders:
        done = to / folder / ".fetched"
        if not done.exists():
            for source in SOURCES[folder]:
                for path, text in _texts(source):
                    (to / path).parent.mkdir(parents=True, exist_ok=True)
                    files.write_atomically(to / path, text)
            files.write_atomically(done, "")
    return to


def _texts(source: Source) -> Iterator[tuple[str, str]]:
    """Yield the files of the layout that a source becomes, and their text."""
    pattern = source.pattern.replace("{subject}", "*")
    root = download.resolve_dataset(source.repo, pattern)
    folders = sorted({path.parent for path in root.glob(pattern)})
    folders = [folder for folder in folders if folder.name not in _NO_SUBJECT]
    if not folders:
        raise LlameroError(
            f"there is no file `{source.pattern}` in it",
            where=f"{source.repo} on the hub",
            fix="give a directory of benchmark files: --data DIR",
        )
    for folder in folders:
        parts = sorted(folder.glob(Path(pattern).name))
        yield source.file.replace("{subject}", folder.name), source.text(_rows(parts))


def _rows(paths: Iterable[Path]) -> Iterator[Row]:
    from pyarrow import parquet

    for path in paths:
        yield from parquet.read_table(path).to_pylist()
