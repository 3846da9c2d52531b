"""Rows of files on disk, one after the other and where they stand: the files may be larger than memory.

JSON lines (jsonlines.org), JSON lists, Parquet and plain text, each also compressed (gzip, zstd), in tar archives and
in directories. A line stays unparsed until `Raw.parse`, so that another process can do it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from llamero.core.errors import LlameroError
from llamero.corpus.fields import short
from llamero.corpus.samples import Row

MAX_LINE = 256 * 2**20
"""Bytes of a line, and characters of a JSON element or of a document, that are still read."""
MARK = "<|endoftext|>"
"""Divides the documents of a text file."""

_BLOCK = 2**18
_BOM = codecs.BOM_UTF8
_BLANK = _BOM + b" \t\r\n"


@dataclass(frozen=True)
class Located:
    """A row and where it stands (file:line, or file:row for tables), or what is wrong there."""

    where: str
    row: Row | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as the file has it.

    Args:
        where: `file:line`, `file:row N` for tables, `archive.tar.gz/member.jsonl:line` in archives.
        data: A line of JSON, or what was read already; None where there is a problem.
        problem: What is wrong with it.
    """

    where: str
    data: bytes | Row | None
    problem: str = ""

    def __reduce__(self) -> tuple[type[Raw], tuple[str, bytes | Row | None, str]]:
        return Raw, (self.where, self.data, self.problem)  # four times as fast as what dataclasses do by themselves

    def parse(self) -> Located:
        """Return the row, or what is wrong with it."""
        if not isinstance(self.data, bytes):
            return Located(self.where, self.data, self.problem)
        try:
            row = json.loads(self.data.decode("utf-8").strip("\ufeff\r\n"))
        except (ValueError, RecursionError) as error:
            return Located(self.where, None, _not_json(error))
        return Located(self.where, row) if isinstance(row, dict) else Located(self.where, None, _not_an_object(row))


def rows(path: Path) -> Iterator[Located]:
    """Yield the rows of a file or a directory, parsed; see `read`."""
    return (raw.parse() for raw in read(path))


def read(path: Path) -> Iterator[Raw]:
    """Yield the rows of a file, of the members of an archive, or of all files of a directory and those below it.

    A line that cannot be parsed comes out with its problem when it is parsed, a file without rows is one row with a
    problem. Hidden files and files of unknown kinds are passed over in directories and archives.

    Raises:
        LlameroError: A file cannot be read, or not be read on; there is none; or a line is longer than `MAX_LINE`.
    """
    if path.is_dir():
        yield from _directory(path)
        return
    if not path.exists():
        raise LlameroError("no such data file", where=path)
    if not _known(path.name):
        raise LlameroError("unknown kind of file", where=path, fix=f"use one of: {_KINDS}")
    yield from _file(path)


def _directory(path: Path) -> Iterator[Raw]:
    below = ((file, file.relative_to(path).parts) for file in path.rglob("*") if file.is_file())
    found = sorted((parts, file) for file, parts in below if _known(file.name) and not _hidden(parts))
    if not found:
        raise LlameroError(f"no file in it that ends in one of: {_KINDS}", where=path)
    for _, file in found:
        yield from _file(file)


def _file(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        yield from _stream(file, path.name, str(path))


def _stream(file: IO[bytes], name: str, where: str) -> Iterator[Raw]:
    """Yield the rows of an opened file of a known kind."""
    bare, compression = _split(name)
    with ExitStack() as stack:
        if compression:
            file = stack.enter_context(_DECOMPRESS[compression](file))
        empty = True
        for raw in _READERS[PurePosixPath(bare).suffix](file, where):
            empty = False
            yield raw
        if empty:
            yield Raw(where, None, "the file has no rows")


def _split(name: str) -> tuple[str, str]:
    """Return a file name without its compression, and that."""
    if name.endswith(".tgz"):
        return name.removesuffix(".tgz") + ".tar", ".gz"
    suffix = PurePosixPath(name).suffix
    return (name.removesuffix(suffix), suffix) if suffix in _DECOMPRESS else (name, "")


def _known(name: str) -> bool:
    return PurePosixPath(_split(name)[0]).suffix in _READERS


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


# -- what files are wrapped in


def _gzip(file: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb"))


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), _BLOCK)


_DECOMPRESS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {".gz": _gzip, ".zst": _zstd}


class _Tail:
    """A stream that knows its last 512 bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.last = (self.last + data[-512:])[-512:]
        return data


def _archive(file: IO[bytes], where: str) -> Iterator[Raw]:
    stream, found = _Tail(file), False
    with _broken(lambda: where), tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", bufsize=_BLOCK) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # the library would keep all
            path = PurePosixPath(member.name)
            if member.isfile() and _known(path.name) and not _hidden(path.parts):
                found = True
                yield from _stream(cast("IO[bytes]", archive.extractfile(member)), path.name, f"{where}/{path}")
        while stream.read(_BLOCK):  # to the end, for the checksum
            pass
        if any(stream.last):
            raise tarfile.ReadError("the end of the archive is missing")
    if not found:
        raise LlameroError(f"no file in it that ends in one of: {_KINDS}", where=where)


@contextmanager
def _broken(where: Callable[[], str]) -> Iterator[None]:
    """Name the place where a file cannot be read on."""
    try:
        yield
    except (EOFError, zlib.error, tarfile.TarError, OSError) as error:  # pyarrow's for zstd is an OSError
        raise LlameroError(f"broken file: {error}", where=where(), fix="download it again") from error


# -- lines


def _json_lines(file: IO[bytes], where: str, begun: bytes = b"") -> Iterator[Raw]:
    """Yield the lines of a file of which `begun` was read already."""
    number = begun.count(b"\n")
    begun = begun[begun.rfind(b"\n") + 1 :]
    with _broken(lambda: f"{where}:{number + 1}"):
        for line in iter(partial(file.readline, MAX_LINE + 1), b""):
            number += 1
            if len(line) > MAX_LINE:
                raise _too_long("line", f"{where}:{number}")
            if begun:
                line, begun = begun + line, b""
            if not line.isspace():
                yield Raw(f"{where}:{number}", line)
    if begun.strip(_BLANK):
        yield Raw(f"{where}:{number + 1}", begun)


def _too_long(what: str, where: str) -> LlameroError:
    return LlameroError(f"a {what} longer than {MAX_LINE / 2**20:g} MiB", where=where, fix="divide it")


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    return f"not JSON: {error}"


def _not_an_object(value: Any) -> str:
    return f"not an object: {short(value)}"


# -- JSON lists


def _json(file: IO[bytes], where: str) -> Iterator[Raw]:
    """A list of objects, or an object a line: the first character tells."""
    begun, first = b"", b""
    with _broken(lambda: where):
        while (first := file.read(1)) and first in _BLANK:
            begun += first
    if first == b"[":
        return _List(_text(file, where, begun + first), where).elements()
    return _json_lines(file, where, begun + first)


def _text(file: IO[bytes], where: str, begun: bytes = b"") -> Iterator[str]:
    """Yield the text of a file of which `begun` was read already, in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, line = 0, 1  # bytes and lines before the block
    with _broken(lambda: f"{where}:{line}"):
        blocks = chain([begun], iter(partial(file.read, _BLOCK), b""))
        for block, last in chain(zip(blocks, repeat(False)), [(b"", True)]):
            try:
                text = decoder.decode(block, final=last)
            except UnicodeDecodeError as error:
                waiting = len(error.object) - len(block)  # the beginning of a character, from the block before
                line += error.object[: error.start].count(b"\n")
                problem = f"not UTF-8: {error.reason} at byte {done - waiting + error.start}"
                raise LlameroError(problem, where=f"{where}:{line}") from error
            yield text if done else text.removeprefix("\ufeff")
            done, line = done + len(block), line + block.count(b"\n")


_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16
"""Characters before the end of what was read from which an error may be but a cut: `-Infinity`, `\\ud83d\\ude00`."""


class _List:
    """A JSON list that is read element by element.

    Args:
        blocks: Its text.
        where: The file.
    """

    def __init__(self, blocks: Iterator[str], where: str) -> None:
        self._blocks, self._where = blocks, where
        self._decoder = json.JSONDecoder()
        self._read = ""  # what was read of the text and not dropped again
        self._at = 0  # the next character of it
        self._dropped = 0
        self._line, self._counted = 1, 0  # the line of the character up to which lines were counted

    def elements(self) -> Iterator[Raw]:
        """Yield the elements of the list."""
        self._next()
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            yield self._element()
            while self._separator():
                yield self._element()
        if self._next():
            raise self._wrong("something after the end of the list")

    def _element(self) -> Raw:
        where = self._place()
        value = self._value()
        return Raw(where, value) if isinstance(value, dict) else Raw(where, None, _not_an_object(value))

    def _separator(self) -> bool:
        """Step over a comma, or the end of the list: whether another element follows."""
        character = self._next()
        if character not in (",", "]"):
            raise self._wrong("no comma after an element of the list")
        self._at += 1
        if character == "," and self._next() == "]":
            raise self._wrong("a comma before the end of the list")
        return character == ","

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._read, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._read) - _LONGEST_WORD
                into = error.pos - self._at
                if cut and self._more():
                    continue
                self._at += into
                raise self._wrong(error.msg.removesuffix(" at")) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise LlameroError(_not_json(error), where=self._place()) from error
            if end < len(self._read) or not self._more():  # a number may go on
                self._at = end
                return value

    def _next(self) -> str:
        """Step to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._read, self._at)
            self._at = self._at if space is None else space.end()
            if self._at < len(self._read) or not self._more():
                return self._read[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on, as much again as is waiting, so that a long element is not tried too often."""
        self._count()
        waiting = self._read[self._at :]
        if len(waiting) > MAX_LINE:
            raise _too_long("JSON element", f"{self._where}:{self._line}")
        new, count = [], 0
        for block in self._blocks:
            new.append(block)
            count += len(block)
            if count > len(waiting):
                break
        self._dropped += self._at
        self._read, self._at, self._counted = "".join([waiting, *new]), 0, 0
        return count > 0

    def _count(self) -> None:
        self._line += self._read.count("\n", self._counted, self._at)
        self._counted = self._at

    def _place(self) -> str:
        self._count()
        return f"{self._where}:{self._line}"

    def _wrong(self, what: str) -> LlameroError:
        character = self._dropped + self._at + 1
        return LlameroError(f"not JSON: {what} at character {character} of the file", where=self._place())


# -- text and tables


def _documents(file: IO[bytes], where: str) -> Iterator[Raw]:
    """A text file is one document, unless marks divide it."""
    for number, text in enumerate(_divided(_text(file, where), where), 1):
        if text.strip():
            yield Raw(f"{where}:document {number}", {"text": text.strip("\n")})


def _divided(blocks: Iterator[str], where: str) -> Iterator[str]:
    begun: list[str] = []  # of a document
    end = ""  # the last characters of it, which may be the beginning of a mark
    for block in blocks:
        *whole, rest = (end + block).split(MARK)
        for text in whole:
            yield "".join([*begun, text])
            begun = []
        cut = max(0, len(rest) - len(MARK) + 1)
        begun.append(rest[:cut])
        end = rest[cut:]
        if sum(map(len, begun)) > MAX_LINE:
            raise _too_long("document", where)
    yield "".join([*begun, end])


def _parquet(file: IO[bytes], where: str) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with tempfile.TemporaryFile() as copy:
        if type(file) is not io.BufferedReader or not file.seekable():  # it is compressed or in an archive
            with _broken(lambda: where):
                shutil.copyfileobj(file, copy, _BLOCK)
            file = cast("IO[bytes]", copy)
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=1000):
                    for row in batch.to_pylist():
                        number += 1
                        yield Raw(f"{where}:row {number}", row)
        except (pyarrow.ArrowException, OSError) as error:
            raise LlameroError(f"broken Parquet file: {error}", where=where) from error


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[Raw]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".txt": _documents,
    ".tar": _archive,
}
"""Every kind of file that rows are read from, by suffix. To add one: a function and a line here."""
_KINDS = f"{', '.join(_READERS)} (also .gz, .zst, .tgz)"
