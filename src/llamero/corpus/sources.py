"""Rows of text on disk, in the layouts that people share them in, as chats or documents.

A layout is recognised by its keys, or stated. A row that does not fit is an error at file:line that names
the key and the value; whether it stops everything or is counted and skipped is the caller's decision.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamero.core.errors import LlameroError, did_you_mean
from llamero.text.messages import Message
from llamero.text.unwrap import alpaca_unwrap

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """Plain text, learned whole."""

    text: str


Sample = Chat | Document


class BadRowError(ValueError):
    """A row that does not fit its layout; says which key and value."""


def _text(row: Row, *keys: str, optional: bool = False) -> str:
    """Return the text under the first of `keys` that the row has."""
    found = [key for key in keys if row.get(key) is not None]
    if not found:
        if optional:
            return ""
        what = "null" if keys[0] in row else "missing"
        raise BadRowError(f"`{keys[0]}` is {what}; the row has {', '.join(row) or 'no keys'}")
    key, value = found[0], row[found[0]]
    if not isinstance(value, str):
        raise BadRowError(f"`{key}` must be text, is {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"`{key}` holds half a character (lone surrogate) at {error.start}") from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"


def _pair(system: str, user: str, assistant: str) -> Chat:
    if not assistant.strip():
        raise BadRowError("the answer is empty")
    head = (Message("system", system),) if system else ()
    return Chat((*head, Message("user", user), Message("assistant", assistant)))


def alpaca(row: Row) -> Chat:
    """`instruction`, `input` (may be empty), `output`."""
    instruction, extra = _text(row, "instruction"), _text(row, "input", optional=True)
    user = f"{instruction}\n{extra}" if extra else instruction
    return _pair(_text(row, "system", optional=True), user, _text(row, "output"))


def orca(row: Row) -> Chat:
    """`system_prompt`, `question`, `response`."""
    return _pair(_text(row, "system_prompt", optional=True), _text(row, "question"), _text(row, "response"))


def pair(row: Row) -> Chat:
    """`prompt` and `answer` (or `response`, `completion`)."""
    return _pair("", _text(row, "prompt"), _text(row, "answer", "response", "completion"))


def alpaca_rendered(row: Row) -> Chat:
    """`prompt` that was already rendered with the Alpaca wrapper, and `answer`: the wrapper is taken off again."""
    prompt = _text(row, "prompt")
    found = alpaca_unwrap(prompt)
    if found is None:
        raise BadRowError(f"`prompt` is not in the Alpaca wrapper: {_short(prompt)}")
    instruction, extra = found
    user = f"{instruction}\n{extra}" if extra else instruction
    return _pair("", user, _text(row, "answer", "response", "completion"))


_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def sharegpt(row: Row) -> Chat:
    """`conversations`: a list of `from` and `value`."""
    return _chat(row, "conversations", role_key="from", text_key="value", roles=_SHAREGPT_ROLES)


_CHAT_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "context": "context"}


def messages(row: Row) -> Chat:
    """`messages`: a list of `role` and `content`, the form of chat APIs; `loss_weight` 0 or 1 may stand beside."""
    return _chat(row, "messages", role_key="role", text_key="content", roles=_CHAT_ROLES)


def _chat(row: Row, key: str, *, role_key: str, text_key: str, roles: Mapping[str, str]) -> Chat:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"`{key}` must be a list of turns, is {_short(turns)}")
    said: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRowError(f"`{key}.{number}` must be an object, is {_short(turn)}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRowError(f"`{key}.{number}.{role_key}` is {_short(role)}; known: {', '.join(roles)}")
        weight = turn.get("loss_weight")
        if weight not in (0, 1, None):  # Parquet has a null where a turn has no such key
            raise BadRowError(f"`{key}.{number}.loss_weight` is {weight}; only 0 and 1 are understood")
        text = _content(turn, text_key, f"{key}.{number}")
        said.append(Message(roles[role], text, learned=weight != 0))  # type: ignore[arg-type]
    return Chat(tuple(said))


def _content(turn: Row, key: str, where: str) -> str:
    """Return a turn's text; the list form of chat APIs is joined if all its parts are text."""
    value = turn.get(key)
    if isinstance(value, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
            raise BadRowError(f"`{where}.{key}` has parts that are not text")
        return "".join(_text(part, "text", "value") for part in value)
    try:
        return _text(turn, key)
    except BadRowError as error:
        raise BadRowError(f"{error} (in `{where}`)") from error


def text(row: Row) -> Document:
    """`text`."""
    return Document(_text(row, "text"))


@dataclass(frozen=True)
class Layout:
    """A layout: how to read a row, and the keys by which it is recognised."""

    read: Callable[[Row], Sample]
    keys: tuple[frozenset[str], ...]


def _keys(*names: str) -> tuple[frozenset[str], ...]:
    return (frozenset(names),)


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(messages, _keys("messages")),
    "sharegpt": Layout(sharegpt, _keys("conversations")),
    "alpaca": Layout(alpaca, _keys("instruction", "output")),
    "orca": Layout(orca, _keys("question", "response")),
    "pair": Layout(pair, tuple(frozenset(("prompt", answer)) for answer in ("answer", "response", "completion"))),
    "alpaca-rendered": Layout(alpaca_rendered, ()),
    "text": Layout(text, _keys("text")),
}
"""Every layout there is. To add one: a function above, a line here, its name in `Layout` of data/config.py (a test
compares the two), a row in the test."""


def detect(row: Row, *, where: str) -> str:
    """Return the layout whose keys a row has."""
    fitting = [name for name, layout in LAYOUTS.items() if any(keys <= row.keys() for keys in layout.keys)]
    if len(fitting) != 1:
        found = f"fit {' and '.join(fitting)}" if fitting else "fit no known layout"
        raise LlameroError(
            f"the keys {', '.join(row)} {found}", where=where, fix=f"state `layout:`, one of {', '.join(LAYOUTS)}"
        )
    return fitting[0]


def layout_named(name: str) -> Layout:
    """Return a layout by its name."""
    if name not in LAYOUTS:
        raise LlameroError(f"unknown layout `{name}`", fix=did_you_mean(name, LAYOUTS))
    return LAYOUTS[name]


@dataclass(frozen=True)
class Located:
    """A row and where it stands (file:line, or file:row for tables), or what is wrong there."""

    where: str
    row: Row | None
    problem: str = ""


def rows(path: Path) -> Iterator[Located]:
    """Yield the rows of a JSON, JSONL, Parquet or text file (gzipped or not), or of all such files of a directory.

    A line that cannot be parsed, or a file without rows, is yielded with its problem; a file that cannot be
    read on raises.
    """
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if _reader(p) is not None)
        if not found:
            raise LlameroError(f"no file in it that ends in one of: {', '.join(READERS)}", where=path)
        for file in found:
            yield from rows(file)
        return
    if not path.exists():
        raise LlameroError("no such data file", where=path)
    reader = _reader(path)
    if reader is None:
        raise LlameroError("unknown kind of file", where=path, fix=f"use one of: {', '.join(READERS)} (also .gz)")
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        yield Located(str(path), None, "the file has no rows")


def _reader(path: Path) -> Callable[[Path], Iterable[Located]] | None:
    return READERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise LlameroError(
                f"broken gzip: {error}", where=f"{path}:{number + 1}", fix="download it again"
            ) from error


def _jsonl(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield Located(where, None, _not_json(error))
            continue
        yield _object(where, row)


def _object(where: str, row: Any) -> Located:
    return Located(where, row) if isinstance(row, dict) else Located(where, None, f"not an object: {_short(row)}")


def _json(path: Path) -> Iterator[Located]:
    whole, line, counted = _whole(path), 1, 0
    if not whole.strip():
        return
    if not whole.lstrip().startswith("["):
        raise LlameroError("a list of objects is expected", where=path, fix="use .jsonl for one object a line")
    try:
        for start, row in _elements(whole):
            line, counted = line + whole.count("\n", counted, start), start
            where = f"{path}:{line}"
            yield _object(where, row)
    except json.JSONDecodeError as error:
        raise LlameroError(_not_json(error), where=f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise LlameroError(_not_json(error), where=f"{path}: after line {line}") from error


def _elements(whole: str) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON list, each with the place where it begins."""
    decoder = json.JSONDecoder()
    at = _next(whole, _next(whole, 0) + 1)
    while whole[at : at + 1] != "]":
        start = at
        value, at = decoder.raw_decode(whole, at)
        yield start, value
        at = _next(whole, at)
        if whole[at : at + 1] == ",":
            at = _next(whole, at + 1)
            if whole[at : at + 1] == "]":
                raise json.JSONDecodeError("a comma before the end of the list", whole, at)
        elif whole[at : at + 1] != "]":
            raise json.JSONDecodeError("no comma after an element of the list", whole, at)
    at = _next(whole, at + 1)
    if at < len(whole):
        raise json.JSONDecodeError("something after the end of the list", whole, at)


_SPACE = re.compile(r"[ \t\n\r]*")


def _next(whole: str, at: int) -> int:
    """Return the place of the next character that is not white space."""
    found = _SPACE.match(whole, at)
    return at if found is None else found.end()


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    return f"not JSON: {error}"


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(f"{path}:row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise LlameroError(f"broken Parquet file: {error}", where=path) from error


def _plain(path: Path) -> Iterator[Located]:
    """A text file is one document, unless `<|endoftext|>` marks divide it."""
    for number, part in enumerate(_whole(path).split("<|endoftext|>"), 1):
        if part.strip():
            yield Located(f"{path}:document {number}", {"text": part.strip("\n")})


def _whole(path: Path) -> str:
    """Return the text of a file."""
    data = b"".join(line for _, line in _lines(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LlameroError(f"not UTF-8: {error.reason} at byte {error.start}", where=f"{path}:{line}") from error


READERS: dict[str, Callable[[Path], Iterable[Located]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
    ".txt": _plain,
}
"""Every kind of file that rows are read from, by suffix (before `.gz`). To add one: a function and a line here."""
