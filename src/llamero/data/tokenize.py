"""From a chunk of a source to tokens and roles: what a worker does, the same whichever worker does it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamero.core.errors import LlameroError
from llamero.corpus import megatron
from llamero.corpus.samples import Chat, Document, LeftOut, Sample
from llamero.data import draw
from llamero.data.config import LengthenConfig, MixtureConfig, SourceConfig
from llamero.data.lengthen import ChatCounts, Span, long_chats
from llamero.data.read import Fault, Parsed, Parser, Reading, Unit, raised, skips
from llamero.data.stats import SourceStats
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import RenderedArrays, render_batch
from llamero.text.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")

SPLITS = ("train", "val")
CHARACTERS_PER_TOKEN = 3.68
"""What lengths are estimated by before they are counted (Fu et al. 2024, arXiv:2402.10171)."""
MEASURED = 64
"""Dialogues that a source's characters per token are counted on."""
MARGIN = 0.1
"""Share of a long chat's length left free, for text that takes more tokens than what was counted."""
CHUNK_UNITS = 256
CHUNK_BYTES = 1 << 19
"""Where a chunk ends; never by the number of workers, so that any number makes the same files."""


@dataclass(frozen=True)
class Chunk:
    """Units of a source that go to a worker together.

    Args:
        source: Number of the source within its mixture.
        first: Number of the first unit within the source.
        units: Rows, or what became of them already.
        fates: Of each of their samples: an index into `FATES`; None where nothing was selected, and all are trained on.
        spans: Of each unit that is a long chat: which of its messages are from which dialogue.
        rows: Rows read for it, where its units were made of several.
    """

    source: int
    first: int
    units: tuple[Unit, ...]
    fates: NDArray[np.uint8] | None = None
    spans: tuple[list[Span] | None, ...] = ()
    """Of each unit the messages that are from one dialogue, where it is a long chat; empty where none is."""
    rows: int | None = None
    """Rows that were read for it; where it is None, as many as its units say."""

    @property
    def size(self) -> int:
        """Return about how many bytes it holds."""
        return sum(map(_size, self.units))


FATES = ("train", "val", "not drawn", "near-duplicate", "overlaps with a test set", "shortened away")
"""What selection decides for a sample: a split, or the reason why it is left out."""


def chunks(source: int, units: Iterable[Unit]) -> Iterator[Chunk]:
    """Yield the units of a source in chunks."""
    for first, some in _batches(units, _size):
        yield Chunk(source, first, some)


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[tuple[int, tuple[T, ...]]]:
    """Yield as many items as make a chunk, with the number of the first."""
    waiting: list[T] = []
    total = first = 0
    for item in items:
        waiting.append(item)
        total += size(item)
        if len(waiting) == CHUNK_UNITS or total >= CHUNK_BYTES:
            yield first, tuple(waiting)
            first += len(waiting)
            total = 0
            waiting.clear()
    if waiting:
        yield first, tuple(waiting)


def _size(unit: Unit) -> int:
    if isinstance(unit, Parsed):
        return sum(len(message) for item in unit.found for message in _texts(item))
    return len(unit.data) if isinstance(unit.data, bytes) else len(repr(unit.data))


def _texts(item: Sample | LeftOut | Fault) -> Iterator[str]:
    if isinstance(item, Chat):
        yield from (message.text for message in item.messages)
    elif isinstance(item, Document):
        yield item.text


def lengthened(
    number: int,
    known: Iterable[Chunk],
    parse: Parser,
    config: LengthenConfig,
    *,
    seed: int,
    counts: ChatCounts,
    measure: Callable[[Sequence[Chat]], float] = lambda _: CHARACTERS_PER_TOKEN,
) -> Iterator[Chunk]:
    """Yield the chunks of a source of chats with those for training made into long ones; what else there is stays.

    Args:
        number: Of the source.
        known: Its chunks, with the fates of their samples.
        parse: Makes samples of their units.
        config: How long, and how often earlier dialogues are asked about.
        seed: Decides what is asked.
        counts: Grows by what became of the dialogues.
        measure: Returns the characters of dialogues per token (`Encoder.characters_per_token`), which the first of them
            are given to; an estimate for English without it.
    """
    aside: deque[tuple[Parsed, int | None, list[Span] | None]] = deque()
    read = given = 0

    def dialogues() -> Iterator[tuple[str, Chat]]:
        nonlocal read
        for chunk in known:
            assert chunk.fates is not None  # whoever lengthens has selected
            fates: Iterator[int] = iter(chunk.fates.tolist())
            for parsed in map(parse, chunk.units):
                read += parsed.rows
                for item in parsed.found:
                    fate = None if isinstance(item, LeftOut | Fault) else next(fates)
                    if isinstance(item, Chat) and fate == FATES.index("train"):
                        yield parsed.where, item
                    else:
                        aside.append((Parsed(parsed.where, (item,)), fate, None))

    def units() -> Iterator[tuple[Parsed, int | None, list[Span] | None]]:
        coming = dialogues()
        first = list(islice(coming, MEASURED))
        ratio = measure([dialogue for _, dialogue in first])
        long = long_chats(
            chain(first, coming),
            characters=max(1, int(config.length * ratio * (1 - MARGIN))),
            recall_every=config.recall_every,
            seed=seed,
            counts=counts,
        )
        for chat, spans in long:
            where = f"{spans[0].label} to {spans[-1].label}"
            yield Parsed(where, (chat,)), FATES.index("train"), spans
            while aside:
                yield aside.popleft()
        yield from aside

    for first, some in _batches(units(), lambda pair: _size(pair[0])):
        units_, fates, spans = zip(*some, strict=True)
        yield Chunk(number, first, units_, _of_samples(fates), spans, rows=read - given)
        given = read
    yield Chunk(number, 0, (), np.zeros(0, dtype=np.uint8), rows=read - given)  # of which nothing came


def _of_samples(fates: Iterable[int | None]) -> NDArray[np.uint8]:
    return np.asarray([fate for fate in fates if fate is not None], dtype=np.uint8)


def in_tokens(spans: Sequence[Span], messages: Sequence[Message], roles: NDArray[np.uint8]) -> list[Span]:
    """Return spans of messages as spans of tokens: each from where its first round begins to where the next begins.

    A round begins where the assistant has ended; what a template puts before the first message is of the first span.
    """
    said = roles % SCAFFOLD == Role.ASSISTANT
    begins = [0, *(np.flatnonzero(said[:-1] & ~said[1:]) + 1).tolist(), roles.size]
    answers = [0, *np.cumsum([message.role == "assistant" for message in messages]).tolist()]

    def at(message: int) -> int:
        return roles.size if message == len(messages) else begins[answers[message]]

    return [Span(at(span.start), at(span.stop), span.label, 0) for span in spans]


def _rows(chunk: Chunk) -> int:
    if chunk.rows is not None:
        return chunk.rows
    return sum(unit.rows if isinstance(unit, Parsed) else 1 for unit in chunk.units)


@dataclass(frozen=True)
class Placed:
    """A sample and where it stands: in its file, and in its source."""

    where: str
    unit: int
    index: int
    """Number within the unit, among its samples."""
    sample: Sample


class Parsing:
    """Makes samples of the chunks of a mixture; pickles.

    Args:
        sources: Of the mixture.
        readings: The same, opened.
    """

    def __init__(self, sources: Sequence[SourceConfig], readings: Sequence[Reading]) -> None:
        self._parsers = [reading.parse for reading in readings]
        self._skips = [skips(source) for source in sources]

    def __call__(self, chunk: Chunk, stats: SourceStats) -> Iterator[Placed]:
        """Yield the samples of a chunk; what is none is counted, or raised if its source says so."""
        for number, unit in enumerate(chunk.units, chunk.first):
            parsed = self._parsers[chunk.source](unit)
            index = 0
            for item in parsed.found:
                if isinstance(item, LeftOut):
                    stats.leave_out(item.reason)
                elif isinstance(item, Fault):
                    if not self._skips[chunk.source]:
                        raise raised(item, parsed.where)
                    stats.leave_out(item.reason)
                else:
                    yield Placed(parsed.where, number, index, item)
                    index += 1

    def fault(self, chunk: Chunk, where: str, error: LlameroError) -> Fault:
        """Return a sample's fault that only showed when it was rendered, or raise it if its source says so."""
        problem = f"{error.where}: {error.problem}" if error.where else error.problem
        fault = Fault(problem, error.fix or "mend the row")
        if not self._skips[chunk.source]:
            raise raised(fault, where)
        return Fault(error.problem)


@dataclass
class Part:
    """The documents of a chunk that go to one split."""

    stats: SourceStats
    ids: list[NDArray[Any]] = field(default_factory=list)
    roles: list[NDArray[Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Where each document was found."""
    spans: list[list[Span] | None] = field(default_factory=list)
    """Of each the tokens that are from one dialogue, where it is a long chat."""
    lines: list[str] = field(default_factory=list)
    """JSON lines, if they are wanted."""


@dataclass
class Encoded:
    """What became of a chunk."""

    source: int
    units: int
    size: int
    parts: dict[str, Part]


class Encoder:
    """Makes tokens of the chunks of a mixture; pickles.

    Args:
        mixture: What is wanted.
        parsing: Reads its chunks.
        tokenizer: Directory of the tokenizer.
        template: Name of the chat template.
        seed: Decides how often a sample is taken whose weight is a fraction.
    """

    def __init__(self, mixture: MixtureConfig, parsing: Parsing, *, tokenizer: Path, template: str, seed: int) -> None:
        self._mixture, self._parsing = mixture, parsing
        self._directory, self._template, self._seed = tokenizer, template, seed

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, loaded when it is first needed."""
        return load_tokenizer(self._directory)

    @cached_property
    def dtype(self) -> type[np.integer[Any]]:
        """Return the dtype that tokens are stored in; the true size of the vocabulary decides, never a padded one."""
        return megatron.token_dtype(len(self.tokenizer))

    @cached_property
    def _unknown(self) -> int:
        id = None if self.tokenizer.unk is None else self.tokenizer.id(self.tokenizer.unk)
        return -1 if id is None else id  # no id is -1

    def __getstate__(self) -> dict[str, Any]:
        loaded = {"tokenizer", "dtype", "_unknown"}
        return {key: value for key, value in self.__dict__.items() if key not in loaded}

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the documents of a chunk, by split, and counts of everything in it."""
        name = self._mixture.sources[chunk.source].source
        parts = {split: Part(SourceStats(name)) for split in SPLITS}
        parts["train"].stats.rows = _rows(chunk)
        chosen: list[tuple[Placed, Part]] = []
        for number, placed in enumerate(self._parsing(chunk, parts["train"].stats)):
            fate = "train" if chunk.fates is None else FATES[chunk.fates[number]]
            if fate in parts:
                chosen.append((placed, parts[fate]))
            else:
                parts["train"].stats.leave_out(fate)
        for (placed, part), encoded in zip(chosen, self._encode([placed for placed, _ in chosen]), strict=True):
            part.stats.samples += 1
            if isinstance(encoded, LlameroError):
                part.stats.skip(self._parsing.fault(chunk, placed.where, encoded).reason)
            else:
                self._take(chunk, placed, encoded, part, once=part is parts["val"])
        return Encoded(chunk.source, len(chunk.units), chunk.size, parts)

    def _encode(self, placed: Sequence[Placed]) -> Iterator[RenderedArrays | LlameroError]:
        """Yield every sample in tokens, in order; the chats are rendered together."""
        chats = [each.sample.messages for each in placed if isinstance(each.sample, Chat)]
        # a base without a chat template can still read texts
        rendered = iter(render_batch(chats, self._template, self.tokenizer) if chats else ())
        for each in placed:
            yield next(rendered) if isinstance(each.sample, Chat) else self._document(each.sample.text)

    def characters_per_token(self, chats: Sequence[Chat]) -> float:
        """Return characters of messages per token, the template's included; an estimate where there are none."""
        characters = tokens = 0
        found = render_batch([chat.messages for chat in chats], self._template, self.tokenizer) if chats else ()
        for chat, rendered in zip(chats, found, strict=True):
            if not isinstance(rendered, LlameroError):
                characters += sum(len(message.text) for message in chat.messages)
                tokens += rendered.ids.size
        return characters / tokens if characters and tokens else CHARACTERS_PER_TOKEN

    def _document(self, text: str) -> RenderedArrays:
        """Return a text with its beginning, if the tokenizer puts one, and its end."""
        tokenizer = self.tokenizer
        head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        tail = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        body = tokenizer.encode_array(text)
        # the end alone teaches nothing
        ids = np.concatenate((head, body, tail)).astype(np.int32) if body.size else body
        roles = np.full(ids.size, Role.TEXT, dtype=np.uint8)
        roles[: len(head)] += SCAFFOLD
        learned = np.arange(ids.size) > 0  # the first token follows nothing
        return RenderedArrays(ids=ids, roles=roles, learned=learned)

    def _take(self, chunk: Chunk, placed: Placed, encoded: RenderedArrays, part: Part, *, once: bool) -> None:
        sample, source = placed.sample, self._mixture.sources[chunk.source]
        supervised = int(np.count_nonzero(encoded.learned))
        roles = marked(encoded)
        problem = self._problem(sample, roles, supervised)
        if problem:
            part.stats.skip(problem, roles.size)
            return
        copies = 1 if once else self._copies(source, placed)
        if copies == 0:
            part.stats.skip("left out by weight", roles.size)
            return
        unknown = int(np.count_nonzero(encoded.ids == self._unknown))
        chat = isinstance(sample, Chat)
        turns = sum(message.role == "assistant" for message in sample.messages) if chat else 0
        part.stats.add(roles.size, supervised, copies=copies, unknown=unknown, turns=turns, language=sample.language)
        part.ids += [encoded.ids.astype(self.dtype, copy=False)] * copies
        part.roles += [roles] * copies
        part.labels += [placed.where] * copies
        spans = chunk.spans[placed.unit - chunk.first] if chunk.spans else None
        part.spans += [in_tokens(spans, sample.messages, roles) if spans and chat else None] * copies
        if self._mixture.jsonl:
            text = encoded.text if chat else sample.text
            part.lines += [json.dumps({"text": text}, ensure_ascii=False) + "\n"] * copies

    def _copies(self, source: SourceConfig, placed: Placed) -> int:
        """Return how often a sample is taken; where the weight has a fraction, a draw decides about once more."""
        whole, part = divmod(source.weight, 1)
        if not part:
            return int(whole)
        drawn = draw.keys(self._seed, source.source, "weight", np.asarray([placed.unit]), placed.index)
        return int(whole) + int(draw.below(drawn, part)[0])

    def _problem(self, sample: Sample, roles: NDArray[np.uint8], supervised: int) -> str:
        """Return why a sample is not taken, or nothing.

        What an assistant says is counted as the Open-Assistant pretokenizer does: the markup of its turns included.
        """
        mixture = self._mixture
        if not supervised:
            return "nothing to learn"
        least = mixture.min_assistant_tokens
        if least and isinstance(sample, Chat) and np.count_nonzero(roles % SCAFFOLD == Role.ASSISTANT) < least:
            return f"fewer than {least} assistant tokens"
        if mixture.max_tokens is not None and roles.size > mixture.max_tokens:
            return f"more than {mixture.max_tokens} tokens"
        return ""


def marked(said: RenderedArrays) -> NDArray[np.uint8]:
    """Return a role per token; what an assistant says but must not teach is marked as the template's."""
    mute = (said.roles == Role.ASSISTANT) > said.learned
    return np.where(mute, said.roles + SCAFFOLD, said.roles).astype(np.uint8) if mute.any() else said.roles
