"""Which samples are taken, and for which split: decided before anything is tokenized, in a pass that only reads.

Exact shares need every sample to be counted first, near-duplicates and overlaps need every sample to be seen. A mixture
that asks for none of this is read once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamero.core import progress, workers
from llamero.corpus.samples import Chat, Document
from llamero.data import decontaminate, draw, duplicates, lengthen
from llamero.data.config import DecontaminateConfig, DuplicatesConfig, LengthenConfig, MixtureConfig, SourceConfig
from llamero.data.decontaminate import Index, Match
from llamero.data.read import Reading
from llamero.data.stats import SourceStats
from llamero.data.tokenize import CHARACTERS_PER_TOKEN, FATES, Chunk, Parsing, chunks

_AT_ONCE = 1 << 16
"""Signatures copied at once."""
TRAIN, VAL, NOT_DRAWN, DUPLICATE, CONTAMINATED, SHORTENED = range(len(FATES))


@dataclass(frozen=True)
class Selection:
    """The fate of every sample of a mixture.

    Args:
        fates: Per source, an index into `FATES` for each sample.
        starts: Per source, the number of the first sample of each unit, and the number of all.
        fractions: Share of its training samples that each source gives.
        report: What near-duplicates, overlaps and lengthening came to.
    """

    fates: Sequence[NDArray[np.uint8]]
    starts: Sequence[NDArray[np.int64]]
    fractions: Sequence[float]
    report: Mapping[str, Any]

    def of(self, chunk: Chunk) -> Chunk:
        """Return a chunk that knows the fates of its samples."""
        starts = self.starts[chunk.source]
        first, last = starts[chunk.first], starts[chunk.first + len(chunk.units)]
        return Chunk(chunk.source, chunk.first, chunk.units, self.fates[chunk.source][first:last])


def needed(mixture: MixtureConfig) -> bool:
    """Return whether anything has to be counted or compared before samples can be taken."""
    exact = any(source.val_split or source.fraction or source.size for source in mixture.sources)
    return exact or any((mixture.duplicates, mixture.decontaminate, mixture.lengthen))


def select(
    mixture: MixtureConfig,
    readings: Sequence[Reading],
    parsing: Parsing,
    *,
    root: Path,
    seed: int,
    out: Path,
    team: int,
) -> Selection:
    """Read all samples once and return their fates.

    Args:
        mixture: What is wanted.
        readings: Its sources, opened.
        parsing: Reads their chunks.
        root: Directory that relative paths start from.
        seed: Decides what is drawn.
        out: Where the survey of each finished source waits, so that a killed run need not repeat it.
        team: Worker processes.
    """
    names = [source.source for source in mixture.sources]
    index = None if mixture.decontaminate is None else _index(mixture.decontaminate, root)
    surveys = _survey(readings, Surveyor(mixture, parsing, index), names=names, out=out, team=team)
    fates = [np.full(survey.characters.size, TRAIN, dtype=np.uint8) for survey in surveys]
    report: dict[str, Any] = {}
    if mixture.decontaminate is not None:
        _drop_contaminated(mixture.decontaminate, surveys, fates)
    if mixture.duplicates is not None:
        report["duplicates"] = _duplicates(mixture.duplicates, surveys, fates, names, out)
    fractions = [
        _split(source, survey, fate, seed) for source, survey, fate in zip(mixture.sources, surveys, fates, strict=True)
    ]
    if mixture.lengthen is not None:
        report["lengthen"] = _choose(mixture.lengthen, surveys, fates, seed, names)
    if mixture.decontaminate is not None and index is not None:
        report["decontamination"] = _contamination(mixture.decontaminate, index, surveys, fates)
    return Selection(fates, [survey.starts for survey in surveys], fractions, report)


def forget(out: Path) -> None:
    """Remove the surveys that wait in a directory."""
    for path in out.glob("survey-*"):
        path.unlink()


# -- the survey


@dataclass(frozen=True)
class Seen:
    """What a worker tells of the samples of a chunk."""

    counts: NDArray[np.uint32]
    characters: NDArray[np.int64]
    domains: tuple[str | None, ...]
    signatures: NDArray[Any]
    matches: tuple[tuple[int, str, Match], ...]


@dataclass(frozen=True)
class Survey:
    """What is known of the samples of a source."""

    counts: NDArray[np.uint32]
    """Samples of each unit."""
    characters: NDArray[np.int64]
    """Of each sample."""
    domains: NDArray[np.int32]
    """Number of each document's domain among `names`; -1 for chats."""
    names: tuple[str, ...]
    """Of the domains; empty where rows name none."""
    signatures: NDArray[Any]
    """MinHash of each sample, if near-duplicates are looked for; mapped, because they are large."""
    matches: tuple[tuple[int, str, Match], ...]
    """Overlaps with test sets: the number of the sample, where it stands, and what was found."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Return the number of the first sample of each unit, and the number of all."""
        return np.concatenate(([0], np.cumsum(self.counts, dtype=np.int64)))

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """Return the unit of each sample."""
        return np.repeat(np.arange(self.counts.size), self.counts)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Return the number of each sample within its unit."""
        return np.arange(self.characters.size) - self.starts[self.units]


class Surveyor:
    """Looks at the samples of a chunk; pickles."""

    def __init__(self, mixture: MixtureConfig, parsing: Parsing, index: Index | None) -> None:
        self._parsing, self._index = parsing, index
        self._signs = mixture.duplicates is not None

    def __call__(self, chunk: Chunk) -> Seen:
        """Return what is to be known of its samples."""
        found = list(self._parsing(chunk, SourceStats("")))
        counts = np.zeros(len(chunk.units), dtype=np.uint32)
        for placed in found:
            counts[placed.unit - chunk.first] += 1
        samples = [placed.sample for placed in found]
        matches = self._index.find(list(map(decontaminate.texts_of, samples))) if self._index else []
        return Seen(
            counts,
            np.asarray([_characters(sample) for sample in samples], dtype=np.int64),
            tuple(sample.domain if isinstance(sample, Document) else None for sample in samples),
            duplicates.signature(list(map(duplicates.texts_of, samples)) if self._signs else []),
            tuple((n, found[n].where, match) for n, match in enumerate(matches) if match is not None),
        )


def _characters(sample: Chat | Document) -> int:
    return len(sample.text) if isinstance(sample, Document) else sum(len(m.text) for m in sample.messages)


def _survey(
    readings: Sequence[Reading], surveyor: Surveyor, *, names: Sequence[str], out: Path, team: int
) -> list[Survey]:
    """Return the survey of every source; finished ones wait in files."""
    found: list[Survey] = []
    for number, (reading, name) in enumerate(zip(readings, names, strict=True)):
        path = out / f"survey-{number}.npz"
        if not path.exists():
            seen = workers.ordered(surveyor, chunks(number, reading), workers=team)
            bar = progress.Line(f"look at {name}", unit="rows")
            with bar as line, path.with_suffix(SIGNATURES).open("wb") as signatures:
                _store(path, _together(_told(seen, line), signatures))
        found.append(_stored(path))
    return found


def _told(seen: Iterator[Seen], line: progress.Line) -> Iterator[Seen]:
    for each in seen:
        yield each
        line.advance(each.counts.size)


SIGNATURES = ".signatures"


def _together(seen: Iterator[Seen], signatures: BinaryIO) -> Survey:
    """Return what the chunks of a source tell as one; the signatures go to a file."""
    parts: list[Seen] = []
    domains: list[NDArray[np.int32]] = []
    names: dict[str, int] = {}
    matches: list[tuple[int, str, Match]] = []
    before = 0
    nothing = Seen(np.zeros(0, np.uint32), np.zeros(0, np.int64), (), duplicates.signature([]), ())
    for each in seen:
        codes = [-1 if domain is None else names.setdefault(domain, len(names)) for domain in each.domains]
        domains.append(np.asarray(codes, dtype=np.int32))
        matches += [(before + number, where, match) for number, where, match in each.matches]
        before += len(codes)
        signatures.write(each.signatures.tobytes())
        parts.append(replace(each, domains=(), signatures=nothing.signatures, matches=()))
    signatures.flush()  # the survey that is stored next promises that they are there
    os.fsync(signatures.fileno())
    return Survey(
        np.concatenate([part.counts for part in [nothing, *parts]]),
        np.concatenate([part.characters for part in [nothing, *parts]]),
        np.concatenate([np.zeros(0, np.int32), *domains]),
        tuple(names),
        nothing.signatures,
        tuple(matches),
    )


def _store(path: Path, survey: Survey) -> None:
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        matches = [(number, where, asdict(match)) for number, where, match in survey.matches]
        said = json.dumps({"names": survey.names, "matches": matches})
        np.savez(
            file,
            counts=survey.counts,
            characters=survey.characters,
            domains=survey.domains,
            said=np.frombuffer(said.encode(), np.uint8),
        )
    beside.replace(path)


def _stored(path: Path) -> Survey:
    with np.load(path) as found:
        said = json.loads(found["said"].tobytes())
        arrays = {name: found[name] for name in ("counts", "characters", "domains")}
    signatures = _mapped(path.with_suffix(SIGNATURES))
    matches = tuple((number, where, Match(**match)) for number, where, match in said["matches"])
    return Survey(names=tuple(said["names"]), signatures=signatures, matches=matches, **arrays)


def _mapped(path: Path) -> NDArray[np.uint32]:
    return (
        np.memmap(path, np.uint32, "r").reshape(-1, duplicates.PLACES)
        if path.stat().st_size
        else duplicates.signature([])
    )


# -- what is decided


def _index(config: DecontaminateConfig, root: Path) -> Index:
    tests = decontaminate.load_tests({name: root / path for name, path in config.against.items()})
    return Index(tests, ngram=config.ngram)


def _drop_contaminated(
    config: DecontaminateConfig, surveys: Sequence[Survey], fates: Sequence[NDArray[np.uint8]]
) -> None:
    """Leave out what overlaps with test sets, if that is asked for."""
    for survey, fate in zip(surveys, fates, strict=True):
        if config.action == "drop":
            fate[[number for number, _, _ in survey.matches]] = CONTAMINATED


def _contamination(
    config: DecontaminateConfig, index: Index, surveys: Sequence[Survey], fates: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Report what overlaps with test sets: of all samples where that is left out, else of those that are learned."""
    dropped = config.action == "drop"
    report = decontaminate.Report.of(index, dropped=dropped)
    for survey, fate in zip(surveys, fates, strict=True):
        counts = np.ones(fate.size, dtype=np.bool_) if dropped else fate == TRAIN
        found = [(where, match) for number, where, match in survey.matches if counts[number]]
        report.samples += int(np.count_nonzero(counts)) - len(found)
        report.add([where for where, _ in found], [match for _, match in found])
    return {**report.to_json(), "statement": decontaminate.statement(report)}


def _split(source: SourceConfig, survey: Survey, fate: NDArray[np.uint8], seed: int) -> float:
    """Draw the validation units of a source, then as many training samples as it asks for; return their share."""
    free = np.flatnonzero(fate == TRAIN)
    counts = np.bincount(survey.units[free], minlength=survey.counts.size)
    for_validation = _validation_units(source, counts, seed)
    fate[free[for_validation[survey.units[free]]]] = VAL
    train = free[fate[free] == TRAIN]
    wanted = _wanted(source, train.size)
    if wanted < train.size:
        found = draw.keys(seed, source.source, "take", survey.units[train], survey.index[train])
        fate[train[~draw.lowest(found, wanted)]] = NOT_DRAWN
    return source.fraction or (wanted / train.size if train.size else 1.0)


def _wanted(source: SourceConfig, available: int) -> int:
    if source.size is not None:
        return min(source.size, available)
    if source.fraction is None:
        return available
    return max(1, int(round(available * source.fraction, 6)))  # rounded, because 0.29 × 100 is a little less than 29


def _validation_units(source: SourceConfig, counts: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Return which units validate: the share that is asked for, at least one, never all, and no sample too many."""
    chosen = np.zeros(counts.size, dtype=np.bool_)
    units = np.flatnonzero(counts)
    if not source.val_split or units.size < 2:
        return chosen
    wanted = min(max(1, round(units.size * source.val_split)), units.size - 1)
    found = draw.keys(seed, source.source, "val", units)
    drawn = draw.lowest(found, wanted)
    order = units[drawn][np.argsort(found[drawn], kind="stable")]
    if source.max_val_set is not None:
        order = order[np.cumsum(counts[order]) <= source.max_val_set]
    chosen[order] = True
    return chosen


def _duplicates(
    config: DuplicatesConfig,
    surveys: Sequence[Survey],
    fates: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Report what resembles an earlier sample, and leave it out if that is asked for."""
    there = np.flatnonzero(np.concatenate(fates) == TRAIN)  # what is left out already makes nothing else a duplicate
    firsts = np.concatenate(([0], np.cumsum([fate.size for fate in fates])))
    path = out / f"survey-all{SIGNATURES}"
    with path.open("wb") as file:
        for survey, fate in zip(surveys, fates, strict=True):
            kept = np.flatnonzero(fate == TRAIN)
            for start in range(0, kept.size, _AT_ONCE):
                file.write(survey.signatures[kept[start : start + _AT_ONCE]].tobytes())
    signatures = _mapped(path)

    def source(sample: int) -> int:
        return int(np.searchsorted(firsts, there[sample], "right")) - 1

    def where(sample: int) -> str:
        number = source(sample)
        return f"{names[number]}, row {surveys[number].units[there[sample] - firsts[number]] + 1}"

    found = duplicates.find(signatures, threshold=config.threshold)
    drop = config.action == "drop"
    if drop:
        for number in there[found >= 0].tolist():
            place = int(np.searchsorted(firsts, number, "right")) - 1
            fates[place][number - firsts[place]] = DUPLICATE
    said = duplicates.report(
        signatures, found, source=lambda n: names[source(n)], where=where, threshold=config.threshold, dropped=drop
    )
    return said.to_json()


def _choose(
    config: LengthenConfig,
    surveys: Sequence[Survey],
    fates: Sequence[NDArray[np.uint8]],
    seed: int,
    sources: Sequence[str],
) -> dict[str, Any]:
    """Leave out documents so that every domain keeps its share; all chats stay."""
    names: dict[str, int] = {}
    tokens, domains, keys, chosen = [], [], [], []
    for source, survey, fate in zip(sources, surveys, fates, strict=True):
        documents = np.flatnonzero((fate == TRAIN) & (survey.domains >= 0))
        codes = [names.setdefault(name or source, len(names)) for name in survey.names]
        chosen.append(documents)
        tokens.append(survey.characters[documents] / CHARACTERS_PER_TOKEN)
        domains.append(np.asarray(codes, dtype=np.int64)[survey.domains[documents]])
        keys.append(draw.keys(seed, source, "lengthen", survey.units[documents], survey.index[documents]))
    choice = lengthen.choose(
        np.concatenate(tokens).astype(np.int64), np.concatenate(domains), config, keys=np.concatenate(keys)
    )
    first = 0
    for fate, documents in zip(fates, chosen, strict=True):
        fate[documents[~choice.kept[first : first + documents.size]]] = SHORTENED
        first += documents.size
    return choice.to_json(list(names))
