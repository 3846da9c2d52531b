"""data: a mixture of sources in, a tokenized dataset and its statistics out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llamero.core import files, progress, workers
from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Dataset
from llamero.data import page, select, stats
from llamero.data.config import FileSource, MixtureConfig
from llamero.data.lengthen import ChatCounts
from llamero.data.read import Reading
from llamero.data.select import Selection
from llamero.data.stats import SourceStats
from llamero.data.tokenize import SPLITS, Chunk, Encoder, Parsing, chunks, lengthened
from llamero.data.write import DatasetWriter


def tokenize_mixture(
    name: str,
    mixture: MixtureConfig,
    *,
    tokenizer: Path,
    template: str,
    root: Path,
    seed: int,
    out: Path,
    team: int | None = None,
) -> dict[str, Any]:
    """Write `train` and `val` as Megatron pairs of tokens and roles, with statistics; return these.

    What a killed run had written is gone on from; the files end up the same, and the same for any number of workers.

    Args:
        name: Of the mixture.
        mixture: What goes into it.
        tokenizer: Directory of the tokenizer.
        template: Name of the chat template.
        root: Directory that relative paths start from.
        seed: Decides what is drawn.
        out: Directory to write to.
        team: Processes that read and tokenize; one per core by default.

    Raises:
        LlameroError: A row does not fit, or nothing in the whole mixture would be learned.
    """
    team = team or workers.cores()
    readings = [Reading(source, root) for source in mixture.sources]
    parsing = Parsing(mixture.sources, readings)
    selection = None
    if select.needed(mixture):
        selection = select.select(mixture, readings, parsing, root=root, seed=seed, out=out, team=team)
    encoder = Encoder(mixture, parsing, tokenizer=tokenizer, template=template, seed=seed)

    def empty(split: str, number: int) -> SourceStats:
        source = mixture.sources[number]
        fraction = 1.0 if selection is None or split == "val" else selection.fractions[number]
        return SourceStats(source.source, layout=readings[number].layout, fraction=fraction)

    with DatasetWriter(
        out,
        prefix=mixture.filename_prefix,
        dtype=encoder.dtype,
        empty=empty,
        sources=len(mixture.sources),
        jsonl=mixture.jsonl,
        length=mixture.lengthen.length if mixture.lengthen else None,
        decode=lambda ids: encoder.tokenizer.decode(ids.tolist(), skip_special=False),
    ) as written:
        chats = ChatCounts()
        todo = islice(_chunks(mixture, readings, selection, seed, chats, encoder), written.chunks, None)
        with progress.Line(
            f"tokenize {name}", total=_size(mixture, root), unit="kB", done=written.size // 1000
        ) as line:
            began = time.monotonic()
            tokens = 0
            for encoded in workers.ordered(encoder, todo, workers=team):
                before = written.size // 1000
                tokens += written.add(encoded)
                speed = tokens / (time.monotonic() - began) / 1e6
                line.advance(written.size // 1000 - before, f"{speed:.2f} M tokens/s")
    counts = written.counts
    if stats.total(counts["train"]).supervised_tokens == 0:
        raise LlameroError(
            f"mixture `{name}` has no token to learn: {_why_nothing(counts['train'])}",
            fix="look at the skipped rows, and whether assistants say anything",
        )
    summary: dict[str, Any] = {"mixture": name, **({} if selection is None else selection.report)}
    if mixture.lengthen is not None:
        names = [source.source for source in mixture.sources]
        summary["lengthen"] |= {
            "chats": chats.to_json() | {"overlong": written.overlong},
            "tokens_left_over": written.left_over,
            "went_in": dict(zip(names, written.went_in, strict=True)),
        }
    title = mixture.filename_prefix or name
    for split in SPLITS:
        files.write_atomically(
            out / f"{split}_stats.txt", stats.text(stats.published(f"{title}-{split}*", counts[split]))
        )
        sources = [part.to_json() for part in counts[split]]
        summary[split] = {"sources": sources, "total": stats.total(counts[split]).to_json()}
    files.write_json(out / "stats.json", summary)
    special = {token: encoder.tokenizer.id(token) for token in encoder.tokenizer.special_tokens}
    files.write_json(out / "special_tokens.json", special)
    page.write(out, summary, Dataset(out), encoder.tokenizer, seed=seed)
    written.forget()
    select.forget(out)
    return summary


def _chunks(
    mixture: MixtureConfig,
    readings: Sequence[Reading],
    selection: Selection | None,
    seed: int,
    counts: ChatCounts,
    encoder: Encoder,
) -> Iterator[Chunk]:
    """Yield all chunks of a mixture, each with the fates of its samples."""
    for number, reading in enumerate(readings):
        known = (chunk if selection is None else selection.of(chunk) for chunk in chunks(number, reading))
        if mixture.lengthen is None or reading.of_documents:
            yield from known
        else:
            measure = encoder.characters_per_token
            yield from lengthened(
                number, known, reading.parse, mixture.lengthen, seed=seed, counts=counts, measure=measure
            )


def _size(mixture: MixtureConfig, root: Path) -> int | None:
    """Return the kilobytes that are to be read, None where they are not known: of hub data sets, compressed files."""
    given = [root / source.path for source in mixture.sources if isinstance(source, FileSource) and source.path]
    paths = [file for path in given for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    if len(given) < len(mixture.sources) or not all(path.suffix in _PLAIN for path in paths):
        return None
    return sum(path.stat().st_size for path in paths) // 1000


_PLAIN = (".jsonl", ".ndjson", ".json", ".txt")


def _why_nothing(parts: list[SourceStats]) -> str:
    reasons = sum((part.skipped + part.left_out for part in parts), start=Counter[str]())
    said = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    return f"{sum(part.processed for part in parts)} samples; skipped or left out: {said or 'none'}"
