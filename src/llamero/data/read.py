"""A source, opened: its rows in their order, and the parser that makes samples of them, here or in a worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from llamero.core.errors import LlameroError
from llamero.corpus import hub, layouts, oasst, rows, toy_world
from llamero.corpus.layouts import Layout, Options
from llamero.corpus.refusals import Refusals
from llamero.corpus.rows import Raw
from llamero.corpus.samples import BadRowError, Chat, Document, LeftOut, Row, Sample
from llamero.data.config import FileSource, MixtureConfig, SourceConfig, ToyWorldSource
from llamero.text.messages import as_messages

TREES = ("oasst", "oasst-flat")
LOOKED_AT = 1000
"""Rows that are looked at for one whose layout is known."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row or a sample: an error, or a counted skip where the source says so."""

    problem: str
    fix: str = "mend the row"

    @property
    def reason(self) -> str:
        """Return the part of the problem that is the same for all rows of one fault."""
        return re.sub(r"\.\d+", ".N", re.split(r", is |: |; | at \d| \(in ", self.problem)[0])


@dataclass(frozen=True)
class Parsed:
    """What became of a row: samples, what rules kept out, or a fault."""

    where: str
    found: tuple[Sample | LeftOut | Fault, ...]
    rows: int = 1
    """Rows that it is made of."""


Unit = Raw | Parsed
"""A row (a whole tree of messages counts as one) on its way to a worker; validation is split off by units."""


Parser = Callable[[Unit], Parsed]
"""Makes samples of units; pickles."""


def _as_it_is(unit: Unit) -> Parsed:
    assert isinstance(unit, Parsed)
    return unit


class RowParser:
    """Makes samples of rows.

    Args:
        source: Whose rows: says which languages, replies and phrases are wanted.
        layout: Of the rows.
        root: Directory that the file of refusal phrases is relative to.
    """

    def __init__(self, source: FileSource, layout: str, root: Path) -> None:
        self._layout: Layout = layouts.layout_named(layout)
        self._options = Options(top_k=source.top_k, synthetic=source.synthetic)
        if source.join_chars and layout in TREES:
            problem = (
                f"`join_chars` would join threads of `{source.source}` across trees, and its val_split goes by trees"
            )
            raise LlameroError(problem, fix="remove it")
        if (source.top_k or source.synthetic) and layout not in TREES:
            raise LlameroError(
                f"`top_k` and `synthetic` are for message trees, the layout of `{source.source}` is {layout}",
                fix=f"remove them, or state `layout:` {' or '.join(TREES)}",
            )
        self._language = source.language
        self._languages = frozenset(part.strip() for part in source.lang.split(",")) if source.lang else frozenset()
        file = root / source.refusals if isinstance(source.refusals, str) else None
        self._refusals = Refusals.load(file) if source.refusals else None

    def __call__(self, unit: Unit) -> Parsed:
        """Return what a unit holds."""
        if isinstance(unit, Parsed):
            return unit
        located = unit.parse()
        if located.row is None:
            return Parsed(unit.where, (Fault(located.problem),))
        try:
            found = self._layout.read(located.row, self._options)
        except BadRowError as error:
            return Parsed(unit.where, (Fault(str(error)),))
        return Parsed(unit.where, tuple(map(self._wanted, found)))

    def _wanted(self, sample: Sample | LeftOut) -> Sample | LeftOut | Fault:
        if isinstance(sample, LeftOut):
            return sample
        if self._language and not sample.language:
            sample = replace(sample, language=self._language)
        if self._languages and sample.language not in self._languages:
            if not sample.language:
                return Fault(f"the row names no language, `lang` asks for {', '.join(sorted(self._languages))}")
            return LeftOut("another language")
        if self._refusals and self._refusals.found(sample):
            return LeftOut("speaks as a refusing assistant")
        return sample


class Found(NamedTuple):
    """A sample and where it was found."""

    where: str
    sample: Sample


class Reading:
    """A source, opened; iterate for its units.

    Args:
        source: Which.
        root: Directory that relative paths start from.

    Raises:
        LlameroError: No row of it has a known layout, and none is stated.
    """

    def __init__(self, source: SourceConfig, root: Path) -> None:
        self._source, self._root = source, root
        if isinstance(source, ToyWorldSource):
            self.layout = "generated"
            self.parse: Parser = _as_it_is
            self.of_documents = source.toy_world == "documents"
        else:
            self.layout = source.layout or self._detect(source)
            self.parse = RowParser(source, self.layout, root)
            self.of_documents = self.layout == "text"

    def __iter__(self) -> Iterator[Unit]:
        if isinstance(self._source, ToyWorldSource):
            yield from _toy_world(self._source)
            return
        gathered = self._gathered(self._source)
        if self._source.join_chars is None:
            yield from gathered
        else:
            yield from joined(map(self.parse, gathered), self._source.join_chars)

    def samples(self) -> Iterator[Found]:
        """Yield the samples, where faults stop or are passed over as the source says."""
        for unit in self:
            parsed = self.parse(unit)
            for item in parsed.found:
                if isinstance(item, Fault) and not skips(self._source):
                    raise raised(item, parsed.where)
                if isinstance(item, Chat | Document):
                    yield Found(parsed.where, item)

    def _gathered(self, source: FileSource) -> Iterator[Raw]:
        """Yield rows; the tables of messages that a tree is spread over, as one."""
        found = self._rows(source)
        if layouts.layout_named(self.layout).gather == "trees":
            trees = oasst.trees(raw.parse() for raw in found)
            found = (Raw(tree.where, tree.row, tree.problem) for tree in trees)
        return islice(found, source.limit)

    def _rows(self, source: FileSource) -> Iterator[Raw]:
        if source.path is None:
            return chain.from_iterable(_hub_rows(source, split) for split in source.split.split(","))
        return rows.read(self._root / source.path)

    def _detect(self, source: FileSource) -> str:
        """Return the layout of the first row that has one."""
        problem = LlameroError("there is no row", where=source.path or source.hub)
        for raw in islice(self._rows(source), LOOKED_AT):
            located = raw.parse()
            if located.row is None:
                problem = LlameroError(located.problem, where=raw.where)
            else:
                try:
                    return layouts.detect(located.row, where=raw.where)
                except LlameroError as error:
                    problem = error
            if not skips(source):
                break
        raise problem


def skips(source: SourceConfig) -> bool:
    """Return whether faults of a source are counted and skipped."""
    return isinstance(source, FileSource) and source.on_error == "skip"


def raised(fault: Fault, where: str) -> LlameroError:
    """Return the error that a fault is where a source does not skip."""
    fix = f"{fault.fix}, or set `on_error: skip` to count and skip such rows"
    return LlameroError(fault.problem, where=where, fix=fix)


def joined(parsed: Iterator[Parsed], characters: int) -> Iterator[Parsed]:
    """Yield conversations joined under one system message until they have so many characters (Dolphin's way).

    What is not a conversation passes as it is; what is left of every system message at the end comes last.
    """
    waiting: dict[str, Parsed] = {}
    for unit in parsed:
        for number, item in enumerate(unit.found):
            alone = Parsed(unit.where, (item,), rows=unit.rows if number == 0 else 0)
            if not isinstance(item, Chat):
                yield alone
                continue
            system = item.messages[0].text if item.messages[0].role == "system" else ""
            before = waiting.pop(system, None)
            together = alone
            if before is not None:
                together = Parsed(before.where, (_join(before, item),), rows=before.rows + alone.rows)
            if sum(len(message.text) for message in _chat(together).messages) >= characters:
                yield together
            else:
                waiting[system] = together
    yield from waiting.values()


def _chat(parsed: Parsed) -> Chat:
    (chat,) = parsed.found
    assert isinstance(chat, Chat)
    return chat


def _join(before: Parsed, more: Chat) -> Chat:
    first = _chat(before)
    rest = more.messages[1:] if more.messages[0].role == "system" else more.messages
    return Chat(first.messages + rest, first.language if first.language == more.language else "")


def _toy_world(source: ToyWorldSource) -> Iterator[Parsed]:
    world = toy_world.world(source.seed)
    if source.toy_world == "documents":
        samples: Iterator[Sample] = map(Document, toy_world.documents(world, source.count))
    else:
        samples = (Chat(tuple(as_messages(chat))) for chat in toy_world.conversations(world, source.count))
    for number, sample in enumerate(samples, 1):
        yield Parsed(f"toy_world:{number}", (sample,))


def _hub_rows(source: FileSource, split: str) -> Iterator[Raw]:
    for raw in hub.read(str(source.hub), split, subset=source.subset, data_files=source.data_files):
        assert not isinstance(raw.data, bytes | None)
        yield replace(raw, data=_with_split(raw.data, source, split))


def _with_split(row: Row, source: FileSource, split: str) -> Row:
    """Return a row that says its language, where the splits of a data set are languages."""
    return {"language": split, **row} if "," in source.split else dict(row)


def refuse_unreadable(mixture: MixtureConfig, root: Path) -> None:
    """Look at the first row of every source that lies here, and for every file that a mixture names.

    Raises:
        LlameroError: One is missing, or is not what the mixture says.
    """
    for role, path in mixture.files.items():
        if not (root / path).exists():
            raise LlameroError(f"there is no such file ({role})", where=root / path)
    for source in mixture.sources:
        if isinstance(source, FileSource) and source.path is not None:
            try:
                Reading(source, root)
            except LlameroError as error:
                raise LlameroError(
                    f"source `{source.source}`: {error.problem}", where=error.where, fix=error.fix
                ) from error
