"""The calibration text as sequences of equal length, from as many sources as there are."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.corpus import hub, layouts, oasst, rows
from llamero.corpus.dataset import Dataset
from llamero.corpus.megatron import Reader
from llamero.corpus.rows import Located, Raw
from llamero.corpus.samples import BadRowError, Chat, Document, LeftOut
from llamero.quantize.config import Calibration, CalibrationSource
from llamero.text.render import render
from llamero.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceReport:
    """What was taken of a source."""

    source: str
    split: str
    layout: str
    """Of its rows; `tokenized` of a mixture."""
    samples: int
    """Conversations and documents that were read."""
    empty: int
    """Of these, how many had no token."""
    left_out: Mapping[str, int]
    """Samples that a rule of the layout kept out, by reason."""
    tokens: int
    """That are calibrated on."""
    sequences: int
    unused: int
    """Tokens of the last sample that was read, beyond the last sequence."""
    digest: str
    """SHA-256 of the tokens that are calibrated on, as little-endian int64."""
    file: str | None
    """SHA-256 of the file, where it is one."""


@dataclass(frozen=True)
class Drawn:
    """Sequences to calibrate on, and where they are from."""

    sequences: list[Int[Tensor, " time"]]
    sources: tuple[SourceReport, ...]
    sequence: int
    """Tokens of each."""

    @property
    def tokens(self) -> int:
        """Return how many there are."""
        return sum(source.tokens for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Return what the card and a report say of it: `source` names all with their splits."""
        return {
            "source": " + ".join(f"{source.source} ({source.split})" for source in self.sources),
            "sequence": self.sequence,
            "tokens": self.tokens,
            "sources": [asdict(source) for source in self.sources],
        }


def draw(
    config: Calibration,
    tokenizer: Tokenizer,
    *,
    root: Path,
    template: str = "auto",
    mixtures: Mapping[str, Path] | None = None,
    own: str | None = None,
) -> Drawn:
    """Return the beginning of each source, cut into sequences, as many as its share of the tokens is.

    Conversations are rendered with the template; samples follow each other without padding, and a sequence begins where
    the last one ended.

    Args:
        config: The sources.
        tokenizer: Of the model.
        root: Directory that relative paths start from.
        template: Of conversations.
        mixtures: Directories of the tokenized mixtures that the sources name.
        own: Mixture that the model was last tuned on.

    Raises:
        LlameroError: A source cannot be read, or has fewer tokens than its share.
    """
    parts = config.parts(own)
    counts = _shares([part.share for part in parts], config.tokens // config.sequence)
    sequences: list[Int[Tensor, " time"]] = []
    reports = []
    for part, count in zip(parts, counts, strict=True):
        if part.mixture is not None:
            taking = _Taking.of_mixture((mixtures or {})[part.mixture])
        else:
            taking = _Taking.of_rows(part, root, tokenizer, template)
        found, report = _take(taking, part, count, config.sequence)
        sequences += found
        reports.append(report)
    return Drawn(sequences, tuple(reports), config.sequence)


def token_ids(part: CalibrationSource, root: Path, tokenizer: Tokenizer, template: str = "auto") -> Iterator[int]:
    """Yield the tokens of a source that is no mixture, sample after sample, to measure on.

    Args:
        part: The source.
        root: Directory that relative paths start from.
        tokenizer: Of the model.
        template: Of conversations.
    """
    for ids in _Taking.of_rows(part, root, tokenizer, template).samples:
        yield from ids.tolist()


def _shares(shares: list[float], whole: int) -> list[int]:
    """Return whole numbers in proportion to the shares that add up to the whole (by largest remainders).

    Raises:
        LlameroError: If one would get nothing.
    """
    exact = [share / sum(shares) * whole for share in shares]
    counts = [int(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: whole - sum(counts)]:
        counts[i] += 1
    if not all(counts):
        said = ", ".join(f"{share:g}" for share in shares)
        raise LlameroError(
            f"{whole} sequences are too few for {len(shares)} sources with shares of {said}",
            where="calibration",
            fix="raise `tokens`, or leave sources out",
        )
    return counts


@dataclass
class _Taking:
    """Samples of one source as token ids, counted as they come."""

    samples: Iterator[np.ndarray]
    layout: str
    where: Path | str
    left_out: Counter[str] = field(default_factory=Counter)
    file: str | None = None

    @classmethod
    def of_mixture(cls, directory: Path) -> "_Taking":
        dataset = Dataset(directory)
        documents = Reader(dataset.stem("train", "text"))
        return cls((np.asarray(ids, dtype=np.int64) for ids in documents), "tokenized", directory)

    @classmethod
    def of_rows(cls, part: CalibrationSource, root: Path, tokenizer: Tokenizer, template: str) -> "_Taking":
        if part.path is not None:
            where: Path | str = root / part.path
            read = partial(rows.read, root / part.path)
        else:
            where = str(part.hub)
            read = partial(_of_hub, part)
        layout = part.layout or _layout_of(read(), where)
        left_out: Counter[str] = Counter()
        samples = _encoded(_located(read(), layout, part.limit), layout, tokenizer, template, left_out)
        digest = files.sha256(Path(where)) if isinstance(where, Path) and where.is_file() else None
        return cls(samples, layout, where, left_out, digest)


def _of_hub(part: CalibrationSource) -> Iterator[Raw]:
    """Yield the rows of a hub data set, of one split after the other."""
    for split in part.part.split(","):
        yield from hub.read(str(part.hub), split, subset=part.subset, data_files=part.data_files)


def _layout_of(found: Iterator[Raw], where: Path | str) -> str:
    """Return the layout of the first row."""
    for raw in found:
        located = raw.parse()
        return layouts.detect(_row(located), where=located.where)
    raise LlameroError("there is no row", where=where)


def _row(located: Located) -> Mapping[str, Any]:
    if located.row is None:
        raise LlameroError(located.problem, where=located.where, fix="mend the file")
    return located.row


def _located(found: Iterator[Raw], layout: str, limit: int | None) -> Iterator[Located]:
    """Yield rows; the tables of messages that a tree is spread over, as one."""
    parsed = (raw.parse() for raw in found)
    gathered = oasst.trees(parsed) if layouts.layout_named(layout).gather == "trees" else parsed
    return islice(gathered, limit)


def _encoded(
    found: Iterator[Located], layout: str, tokenizer: Tokenizer, template: str, left_out: Counter[str]
) -> Iterator[np.ndarray]:
    """Yield the tokens of each sample."""
    read = layouts.layout_named(layout).read
    for located in found:
        try:
            samples = read(_row(located), layouts.Options())
        except BadRowError as error:
            raise LlameroError(str(error), where=located.where, fix="mend the row, or state `layout:`") from error
        for sample in samples:
            if isinstance(sample, LeftOut):
                left_out[sample.reason] += 1
            else:
                yield np.asarray(_ids(sample, tokenizer, template, where=located.where), dtype=np.int64)


def _ids(sample: Chat | Document, tokenizer: Tokenizer, template: str, *, where: str) -> list[int]:
    if isinstance(sample, Document):
        return tokenizer.encode(sample.text)
    try:
        return list(render(sample.messages, template, tokenizer).ids)
    except LlameroError as error:
        raise LlameroError(error.problem, where=where, fix=error.fix) from error


def _take(
    taking: _Taking, part: CalibrationSource, count: int, length: int
) -> tuple[list[Int[Tensor, " time"]], SourceReport]:
    """Return the first sequences of a source, and what was read for them."""
    wanted, have, samples, empty = count * length, 0, 0, 0
    taken: list[np.ndarray] = []
    for ids in taking.samples:
        samples += 1
        empty += not len(ids)
        taken.append(ids)
        have += len(ids)
        if have >= wanted:
            break
    if have < wanted:
        whole = f"{part.name} ({part.part})"
        raise LlameroError(
            f"the calibration text {whole} has {have} tokens, {wanted} are asked for of it",
            where=taking.where,
            fix="lower `calibration.tokens` or the `share` of this source, or give more text",
        )
    ids = np.concatenate(taken)[:wanted]
    report = SourceReport(
        source=part.name,
        split=part.part,
        layout=taking.layout,
        samples=samples,
        empty=empty,
        left_out=dict(taking.left_out),
        tokens=wanted,
        sequences=count,
        unused=have - wanted,
        digest=sha256(ids.astype("<i8").tobytes()).hexdigest(),
        file=taking.file,
    )
    return [torch.from_numpy(ids[i * length : (i + 1) * length].copy()) for i in range(count)], report
