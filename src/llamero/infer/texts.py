"""Texts that models are measured on: their tokens, what a model sees of them at a time, and how to say so."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from llamero.core.errors import LlameroError
from llamero.infer.score import Window, documents, sliding
from llamero.text.tokenizer import Tokenizer

_CHARACTERS = 16
"""Characters that hold a token, almost always; of a text that holds fewer tokens more is read."""


@dataclass(frozen=True)
class Text:
    """A text, ready to be measured on."""

    name: str
    ids: Sequence[int]
    windows: Sequence[Window]
    """What a model sees at a time, and what of it is scored."""
    protocol: str
    """How, in a few words."""
    notes: tuple[str, ...] = ()
    """What of it is not measured, and what was put in."""


def of_file(
    name: str, path: Path, tokenizer: Tokenizer, *, window: int, stride: int, tokens: int | None = None
) -> Text:
    """Return a text file, seen through a sliding window.

    Args:
        name: What reports call it.
        path: The file, UTF-8.
        tokenizer: Of the model.
        window: Tokens of a window.
        stride: Tokens between windows.
        tokens: Tokens to use, from the start; all by default.
    """
    return of_ids(
        name, _encoded(_read(path), tokenizer, tokens), tokenizer, window=window, stride=stride, tokens=tokens
    )


def of_ids(
    name: str, ids: Iterable[int], tokenizer: Tokenizer, *, window: int, stride: int, tokens: int | None = None
) -> Text:
    """Return a text that is tokenized already, all of it one document; arguments are those of `of_file`."""
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    taken = list(islice(chain(head, ids), tokens))
    protocol = f"window {window}, stride {stride}, {'BOS first' if head else 'no BOS'}"
    return Text(name, taken, sliding(len(taken), window=window, stride=stride), protocol)


def of_chunks(name: str, path: Path, tokenizer: Tokenizer, *, window: int, tokens: int | None = None) -> Text:
    """Return a text file as llama.cpp's perplexity tool takes it.

    Chunks lie end to end; of each the second half is scored, after the first half as context, and where the tokenizer
    begins texts with BOS, that stands in place of every chunk's first token. What is left at the end is dropped.
    (llama.cpp, tools/perplexity/perplexity.cpp, `perplexity`.)

    Args:
        name: What reports call it.
        path: The file, UTF-8.
        tokenizer: Of the model.
        window: Tokens of a chunk (`n_ctx` there).
        tokens: Tokens to use, from the start; all by default.

    Raises:
        LlameroError: The text does not fill two chunks.
    """
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = list(islice(chain(head, _encoded(_read(path), tokenizer, tokens)), tokens))
    if len(ids) < 2 * window:
        raise LlameroError(
            f"the text has {len(ids)} tokens, llama.cpp's protocol asks for two chunks of {window}",
            where=path,
            fix="lower the window, or give a longer text",
        )
    whole = len(ids) - len(ids) % window
    for start in range(0, whole, window):
        ids[start : start + len(head)] = head
    windows = [Window(start, start + window, start + window // 2 + 1) for start in range(0, whole, window)]
    first = "BOS in place of each chunk's first token" if head else "no BOS"
    protocol = f"llama.cpp's protocol: chunks of {window}, second half scored, {first}"
    dropped = len(ids) - whole
    notes = (f"{name}: the last {dropped} tokens fill no chunk and are dropped",) if dropped else ()
    return Text(name, ids[:whole], windows, protocol, notes)


def of_documents(name: str, each: Iterable[Sequence[int]]) -> Text:
    """Return documents, each seen by itself."""
    found = list(each)
    windows = documents([len(document) for document in found])
    return Text(name, list(chain.from_iterable(found)), windows, "each document by itself")


def first_documents(name: str, each: Iterable[Sequence[int]], *, window: int, stride: int, tokens: int) -> Text:
    """Return the first documents, each seen by itself, through a sliding window where it is longer than that.

    Args:
        name: What reports call them.
        each: Documents as token ids.
        window: Tokens of a window.
        stride: Tokens between the windows of a long document.
        tokens: After so many no further document is taken, and the last one is cut.
    """
    ids: list[int] = []
    windows: list[Window] = []
    for document in each:
        if len(ids) >= tokens:
            break
        start, taken = len(ids), list(document[: tokens - len(ids)])
        for w in sliding(len(taken), window=window, stride=stride):
            windows.append(replace(w, start=w.start + start, stop=w.stop + start, scored=w.scored + start))
        ids += taken
    return Text(name, ids, windows, f"each document by itself, window {window}, stride {stride}")


def _encoded(text: str, tokenizer: Tokenizer, tokens: int | None) -> list[int]:
    """Return the ids of a text; of a long one no more is encoded than is asked for."""
    if tokens is None:
        return tokenizer.encode(text)
    much = (tokens + 64) * _CHARACTERS
    ids = tokenizer.encode(text[:much])
    while len(ids) < tokens + 64 and much < len(text):
        much *= 4
        ids = tokenizer.encode(text[:much])
    return ids


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LlameroError("text to measure on is missing", where=path) from error
    except UnicodeDecodeError as error:
        raise LlameroError(f"not UTF-8: {error.reason}", where=path) from error
    if not text:
        raise LlameroError("the text is empty: there is nothing to predict", where=path)
    return text
