"""Samples of a source: from rows, or generated; what does not fit is an error or a counted skip."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from llamero.core.errors import LlameroError
from llamero.corpus import sources, toy_world
from llamero.corpus.sources import BadRowError, Chat, Document, Located, Sample
from llamero.data.config import FileSource, SourceConfig, ToyWorldSource
from llamero.text.messages import as_messages


class Found(NamedTuple):
    """A sample and where it was found."""

    where: str
    sample: Sample


class Reading:
    """One pass over a source; `skipped` and `layout` tell afterwards what was met.

    Args:
        source: Which.
        root: Directory that relative paths start from.
    """

    def __init__(self, source: SourceConfig, root: Path) -> None:
        self._source, self._root = source, root
        self.skipped: Counter[str] = Counter()
        """Rows skipped, by reason."""
        self.layout = ""
        """Layout of the rows, stated or recognised."""

    def __iter__(self) -> Iterator[Found]:
        if isinstance(self._source, ToyWorldSource):
            yield from self._toy_world(self._source)
        else:
            yield from self._file(self._source)

    def _toy_world(self, source: ToyWorldSource) -> Iterator[Found]:
        self.layout = "generated"
        world = toy_world.world(source.seed)
        if source.toy_world == "documents":
            samples = map(Document, toy_world.documents(world, source.count))
        else:
            samples = (Chat(tuple(as_messages(chat))) for chat in toy_world.conversations(world, source.count))
        for number, sample in enumerate(samples, 1):
            yield Found(f"toy_world:{number}", sample)

    def _file(self, source: FileSource) -> Iterator[Found]:
        self.layout = source.layout or ""
        hub = source.hub or ""
        located = _hub_rows(hub, source.split) if source.path is None else sources.rows(self._root / source.path)
        for row in islice(located, source.limit):
            try:
                yield Found(row.where, self._parse(row))
            except BadRowError as error:
                if not self.skip(str(error)):
                    fix = "mend the row, or set `on_error: skip` to count and skip such rows"
                    raise LlameroError(str(error), where=row.where, fix=fix) from error

    @property
    def _skips(self) -> bool:
        return isinstance(self._source, FileSource) and self._source.on_error == "skip"

    def skip(self, problem: str) -> bool:
        """Count a faulty sample if the source wants faults skipped; return whether it does."""
        if not self._skips:
            return False
        self.skipped[_reason(problem)] += 1
        return True

    def _parse(self, located: Located) -> Sample:
        if located.row is None:
            raise BadRowError(located.problem)
        if not self.layout:
            self.layout = self._detect(located.row, located.where)
        return sources.layout_named(self.layout).read(located.row)

    def _detect(self, row: sources.Row, where: str) -> str:
        try:
            return sources.detect(row, where=where)
        except LlameroError as error:
            if not self._skips:
                raise
            raise BadRowError(error.problem) from error  # the next row may be whole


def _reason(problem: str) -> str:
    """Return the part of a message that is the same for all rows of one fault."""
    return re.sub(r"\.\d+", ".N", re.split(r", is |: |; | at \d| \(in ", problem)[0])


def _hub_rows(name: str, split: str) -> Iterator[Located]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise LlameroError(
            "reading a hub data set needs the `datasets` library", where=name, fix="pip install 'llamero[data]'"
        ) from error
    number = 0
    try:
        for number, row in enumerate(load_dataset(name, split=split, streaming=True), 1):
            yield Located(f"{name}:row {number}", dict(row))
    except (OSError, ValueError) as error:  # what the library raises for names, splits and the network
        said = str(error).partition("\n")[0] or type(error).__name__
        raise LlameroError(
            f"the hub data set cannot be read: {said}",
            where=f"{name}, split {split}, after row {number}",
            fix="check the name and `split:`; for a gated one ask for access and `hf auth login`",
        ) from error
