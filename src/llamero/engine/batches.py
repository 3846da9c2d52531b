"""From tokenized documents to the batch of any step: cut to length, packed, in an order that the seed decides.

A batch is a function of (seed, step), so that resuming means asking for the next one. Inputs and targets
are shifted within each document before packing: a document of n tokens takes n − 1 places, every token
but the first is a target, and nothing is lost at a border.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Sources
from llamero.corpus.megatron import Reader
from llamero.corpus.packing import Rows, best_fit_decreasing
from llamero.engine.stage import StageConfig
from llamero.text.messages import SCAFFOLD, Role


@dataclass(frozen=True)
class Batch:
    """Documents to learn from, one after the other."""

    ids: Int[Tensor, " tokens"]
    """Inputs."""
    lengths: tuple[int, ...]
    """Inputs of each document."""
    learned: Int[Tensor, " learned"]
    """Positions in `ids` whose next token is learned."""
    targets: Int[Tensor, " learned"]
    """That next token."""
    weights: Float[Tensor, " learned"]
    """How much it counts."""
    documents: tuple[int, ...]
    """Number of each document in its dataset."""
    starts: tuple[int, ...]
    """First token of each in its document: not 0 for the later pieces of a split one."""
    sources: Int[Tensor, " learned"]
    """Number of the source that each learned token is of; 0 where sources are not told apart."""

    @property
    def tokens(self) -> int:
        """Return how many tokens of documents it has."""
        return len(self.ids) if self.documents else 0


@dataclass
class Report:
    """What became of the documents of a stage."""

    documents: int = 0
    tokens: int = 0
    """Inputs: every token of a document but its last."""
    supervised_tokens: int = 0
    dropped: int = 0
    """Documents that were longer than the sequence, under `overlong: drop`."""
    nothing_to_learn: int = 0
    """Documents without a supervised token, or that lost all of them with their end."""
    pieces_without_target: int = 0
    """Pieces of split documents that have nothing to learn, and are left out."""
    truncated: int = 0
    truncated_tokens: int = 0
    split: int = 0
    """Documents that became several pieces."""
    too_short: int = 0
    """Documents of fewer than two tokens, which teach nothing."""
    rows: int = 0
    fill: float = 0.0
    """Share of the places of all rows that hold a token."""

    def to_json(self) -> dict[str, float]:
        """Return the counts."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Batches:
    """Every batch of a stage.

    Args:
        tokens: Token ids of each document.
        roles: Role of each token, `Role` plus `SCAFFOLD` where the template speaks.
        stage: Sequence length, batch, what is learned, what happens to over-long documents.
        seed: Decides the order.
        where: Name of the data, for errors.
        sources: Which documents are of which source, where that is known.
    """

    def __init__(
        self,
        tokens: Sequence[NDArray[np.integer[Any]]],
        roles: Sequence[NDArray[np.integer[Any]]],
        stage: StageConfig,
        *,
        seed: int,
        where: str,
        sources: Sources | None = None,
    ) -> None:
        self._sources = sources
        self._tokens, self._roles, self._where = tokens, roles, where
        if len(tokens) != len(roles):
            raise LlameroError(f"{len(tokens)} documents of tokens, {len(roles)} of roles", where=where)
        self._weight = _weights_by_role(stage)
        self.report = Report()
        self._pieces = self._cut(stage)
        lengths = self._pieces.stop - self._pieces.start - 1
        if not len(lengths):
            raise self._nothing_to_learn(stage)
        if stage.batch_samples is None:
            self._rows = best_fit_decreasing(lengths, stage.sequence)
            self._plan: _ByRows | _BySamples = _ByRows(len(self._rows), stage, seed=seed)
        else:
            self._plan = _BySamples(lengths, stage.batch_samples, stage, seed=seed)
            self._rows = self._plan.rows
        self.steps, self.batch = self._plan.steps, self._plan.largest
        self.report.rows = len(self._rows)
        self.report.fill = float(lengths[self._rows.documents].sum() / (len(self._rows) * stage.sequence))

    def refuse_short(self) -> None:
        """Refuse data that is less than a batch: a step would take some of it twice, or be smaller than it says."""
        there, each, kind = self._plan.count, self._plan.each, self._plan.kind
        if there < each:
            raise LlameroError(
                f"a step takes {each} {kind}, and there are {there}: the data is shorter than one batch",
                where=self._where,
                fix=f"set `batch` (or `batch_samples`, `batch_tokens`) to {there} {kind} or fewer, or add data",
            )

    def _nothing_to_learn(self, stage: StageConfig) -> LlameroError:
        report = self.report
        return LlameroError(
            f"nothing to learn: of {report.documents} documents {report.nothing_to_learn} have no token that is "
            f"learned, {report.dropped} are longer than `sequence: {stage.sequence}` and dropped, {report.too_short} "
            "are shorter than two tokens",
            where=self._where,
            fix="see who speaks in the data (`llamero data inspect`) and what `learn` and `overlong` say",
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the names of the sources that are told apart; none where there are not several."""
        return self._sources.names if self._sources is not None and len(self._sources.names) > 1 else ()

    def __len__(self) -> int:
        """Return the number of rows: of one pass, or of all steps where `batch_samples` says what a step takes."""
        return len(self._rows)

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step, by its number alone; where `epochs` says how many, the last step has the rest."""
        return self._plan.rows_of(step)

    def assemble(self, rows: Sequence[int]) -> Batch:
        """Return the documents of some rows as one batch."""
        ids, targets, weights, lengths = [], [], [], []
        pieces = self._pieces.where(np.concatenate([self._rows[row] for row in rows]))
        for document, start, stop in zip(*(numbers.tolist() for numbers in pieces), strict=True):
            piece_ids = np.asarray(self._tokens[document][start:stop], dtype=np.int64)
            ids.append(piece_ids[:-1])
            targets.append(piece_ids[1:])
            weights.append(self._weight[np.asarray(self._roles[document][start + 1 : stop])])
            lengths.append(len(piece_ids) - 1)
        weight = np.concatenate(weights)
        learned = np.flatnonzero(weight)
        source = np.zeros(len(lengths), np.int64) if not self.sources else self._sources_of(pieces.document)
        return Batch(
            ids=torch.from_numpy(np.concatenate(ids)),
            lengths=tuple(lengths),
            learned=torch.from_numpy(learned),
            targets=torch.from_numpy(np.concatenate(targets)[learned]),
            weights=torch.from_numpy(weight[learned]),
            documents=tuple(pieces.document.tolist()),
            starts=tuple(pieces.start.tolist()),
            sources=torch.from_numpy(np.repeat(source, lengths)[learned]),
        )

    def _sources_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._sources is not None
        return self._sources.of(documents)

    def _cut(self, stage: StageConfig) -> "_Pieces":
        """Return what the documents are learned in, no piece longer than the sequence."""
        lengths = _lengths(self._roles)
        wrong = np.flatnonzero(lengths != _lengths(self._tokens))
        if wrong.size:
            number = int(wrong[0])
            raise LlameroError(
                f"document {number} has {len(self._tokens[number])} tokens and {lengths[number]} roles",
                where=self._where,
                fix="tokens and roles are not of one run: tokenize again",
            )
        blocks = [_NO_PIECES]
        for first, last in _blocks(lengths):
            blocks.append(self._cut_block(_Block(self._roles, lengths, first, last), stage))
        return _Pieces(*(np.concatenate(numbers) for numbers in zip(*blocks, strict=True)))

    def _cut_block(self, block: "_Block", stage: StageConfig) -> "_Pieces":
        report = self.report
        fits = np.flatnonzero((block.lengths >= 2) & (block.lengths <= stage.sequence + 1))
        long = np.flatnonzero(block.lengths > stage.sequence + 1)
        whole = _Pieces(fits, np.zeros_like(fits), block.lengths[fits])
        pieces = _joined(whole, self._shorten(block, long, stage)) if long.size else whole
        learned = block.count(self._weight[block.roles] != 0, pieces._replace(start=pieces.start + 1))
        kept = pieces.where(learned > 0)
        cuts = np.bincount(pieces.document, minlength=block.lengths.size)
        cuts_kept = np.bincount(kept.document, minlength=block.lengths.size)
        report.documents += block.lengths.size
        report.too_short += int(np.count_nonzero(block.lengths < 2))
        report.dropped += int(np.count_nonzero(cuts[long] == 0))
        report.nothing_to_learn += int(np.count_nonzero((cuts > 0) & (cuts_kept == 0)))
        report.pieces_without_target += int((cuts - cuts_kept)[cuts_kept > 0].sum())
        report.tokens += int((kept.stop - kept.start - 1).sum())
        report.supervised_tokens += int(learned.sum())
        return kept._replace(document=kept.document + block.first)

    def _shorten(self, block: "_Block", long: NDArray[np.int64], stage: StageConfig) -> "_Pieces":
        """Return the pieces of documents that are longer than the sequence."""
        limit, report, lengths = stage.sequence, self.report, block.lengths[long]
        if stage.policy == "error":
            raise LlameroError(
                f"sample {block.first + long[0]} has {lengths[0]} tokens, `sequence` is {limit}",
                where=self._where,
                fix="set `overlong: split`, `truncate` or `drop`, or a longer `sequence`",
            )
        if stage.policy == "drop":
            return _NO_PIECES
        if stage.policy == "truncate":
            pieces = _Pieces(long, np.zeros_like(long), np.full_like(long, limit + 1))
        else:
            pieces = _split(block, long, limit)
        cuts = np.bincount(pieces.document, minlength=block.lengths.size)[long]
        held = np.bincount(pieces.document, pieces.stop - pieces.start, minlength=block.lengths.size)[long]
        lost = lengths - held.astype(np.int64)  # below zero where pieces overlap by a token
        report.split += int(np.count_nonzero(cuts > 1))
        report.truncated += int(np.count_nonzero(lost > 0))
        report.truncated_tokens += int(lost[lost > 0].sum())
        return pieces


class _Order:
    """Numbers in an order that is another one in every pass.

    Args:
        count: How many there are.
        seed: Decides the order.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        self._count, self._seed = count, seed
        self._of: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def between(self, first: int, end: int) -> NDArray[np.int64]:
        """Return those at some places, counted on through the passes."""
        found = []
        while first < end:
            epoch, place = divmod(first, self._count)
            if self._of[0] != epoch:
                self._of = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._count)
            found.append(self._of[1][place : place + end - first])
            first += len(found[-1])
        return np.concatenate(found)


class _Steps:
    """Which of the things that a stage takes in order, `each` at a time, belong to a step; the last has the rest."""

    def __init__(self, count: int, each: int, stage: StageConfig, *, seed: int) -> None:
        self._order, self.count, self.each = _Order(count, seed=seed), count, each
        # rounded, because 1.1 × 10 is a little more than 11
        self._end = math.ceil(round((stage.epochs or 1) * count, 6)) if stage.steps is None else stage.steps * each
        self.steps = math.ceil(self._end / each)

    def _of(self, step: int) -> NDArray[np.int64]:
        return self._order.between(step * self.each, min((step + 1) * self.each, self._end))


class _ByRows(_Steps):
    """Steps of as many rows, which were packed from the whole set."""

    kind = "packed rows"

    def __init__(self, rows: int, stage: StageConfig, *, seed: int) -> None:
        super().__init__(rows, stage.batch, stage, seed=seed)
        self.largest = stage.batch

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step."""
        return self._of(step).tolist()


class _BySamples(_Steps):
    """Steps of as many samples, packed into as few rows as each step needs."""

    kind = "samples"

    def __init__(self, lengths: NDArray[np.int64], samples: int, stage: StageConfig, *, seed: int) -> None:
        super().__init__(len(lengths), samples, stage, seed=seed)
        packed = []
        for step in range(self.steps):
            mine = self._of(step)
            rows = best_fit_decreasing(lengths[mine], stage.sequence)
            packed.append(Rows(mine[rows.documents], rows.offsets))
        self._first = np.cumsum([0, *(len(rows) for rows in packed)]).tolist()
        self.rows = Rows(
            np.concatenate([rows.documents for rows in packed]),
            np.cumsum(np.concatenate([[0], *(np.diff(rows.offsets) for rows in packed)])),
        )
        """Of all steps."""
        self.largest = max(len(rows) for rows in packed)

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step."""
        return list(range(self._first[step], self._first[step + 1]))


class _Pieces(NamedTuple):
    """Stretches of documents, in order: a column for each thing that is known of them."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    def where(self, which: NDArray[Any]) -> "_Pieces":
        """Return some of them, by mask or number."""
        return _Pieces(self.document[which], self.start[which], self.stop[which])


_NO_PIECES = _Pieces(*(np.zeros(0, np.int64) for _ in range(3)))
_BLOCK = 1 << 22
"""Tokens that are looked at together."""


def _joined(*parts: _Pieces) -> _Pieces:
    """Return pieces of different documents as one, in the order of the documents."""
    pieces = _Pieces(*(np.concatenate(numbers) for numbers in zip(*parts, strict=True)))
    return pieces.where(np.argsort(pieces.document, kind="stable"))


class _Block:
    """Roles of some documents, back to back.

    Args:
        roles: Of all documents.
        lengths: Tokens of all documents.
        first: Number of the first document of the block.
        last: Number of the one after its last.
    """

    def __init__(
        self, roles: Sequence[NDArray[np.integer[Any]]], lengths: NDArray[np.int64], first: int, last: int
    ) -> None:
        self.first, self.lengths = first, lengths[first:last]
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.roles = self._together(roles)

    def _together(self, roles: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.integer[Any]]:
        if isinstance(roles, Reader):
            starts = roles.starts[self.first : self.first + self.lengths.size]
            if np.array_equal(starts - starts[0], self.starts):  # no need to fetch them one by one
                return np.asarray(roles.flat[starts[0] : starts[0] + self.lengths.sum()])
        return np.concatenate([roles[self.first + number] for number in range(self.lengths.size)])

    def count(self, marked: NDArray[np.bool_], pieces: _Pieces) -> NDArray[np.int64]:
        """Return how many tokens of each piece are marked."""
        before = np.zeros(marked.size + 1, dtype=np.int32)
        np.cumsum(marked, out=before[1:])
        offset = self.starts[pieces.document]
        return (before[offset + pieces.stop] - before[offset + pieces.start]).astype(np.int64)


def _lengths(documents: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
    if isinstance(documents, Reader):
        return documents.lengths.astype(np.int64)
    return np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))


def _blocks(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of runs of documents of together about `_BLOCK` tokens."""
    ends = np.cumsum(lengths)
    first = 0
    while first < lengths.size:
        before = int(ends[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        yield first, last
        first = last


def _weights_by_role(stage: StageConfig) -> NDArray[np.float32]:
    """Return the loss weight of every role code; what the template says is never learned, except by `lm`."""
    weight = np.zeros(2 * SCAFFOLD, dtype=np.float32)
    if stage.objective == "lm":
        weight[:] = 1.0
        return weight
    for role in Role:
        weight[role] = getattr(stage.learn, role.name.lower())
    return weight


def _split(block: _Block, long: NDArray[np.int64], limit: int) -> _Pieces:
    """Return the pieces of long documents, of at most `limit` + 1 tokens each."""
    whole = _Pieces(long, np.zeros_like(long), block.lengths[long])
    text = block.count(block.roles % SCAFFOLD == Role.TEXT, whole) == whole.stop
    texts = _split_texts(whole.where(text), limit)
    chats: list[tuple[int, int, int]] = []
    for number in long[~text].tolist():
        start = block.starts[number]
        roles = block.roles[start : start + block.lengths[number]]
        chats += [(number, a, b) for a, b in split_at_turns(roles, limit)]
    return _joined(texts, _Pieces(*np.asarray(chats, dtype=np.int64).reshape(-1, 3).T))


def _split_texts(whole: _Pieces, limit: int) -> _Pieces:
    """Return plain texts cut where they are full.

    The last token of a piece is the first of the next, so that every token stays a target.
    """
    cuts = -(-(whole.stop - 1) // limit)
    number = np.repeat(np.arange(cuts.size), cuts)
    start = (np.arange(number.size) - (np.cumsum(cuts) - cuts)[number]) * limit
    return _Pieces(whole.document[number], start, np.minimum(start + limit + 1, whole.stop[number]))


def split_at_turns(roles: NDArray[np.integer[Any]], limit: int) -> list[tuple[int, int]]:
    """Return pieces of a chat, of at most `limit` + 1 tokens.

    It is cut where an assistant has finished and the next question (or its context) begins; a turn that
    alone is longer than the limit loses its end.
    """
    speaker = roles % SCAFFOLD
    starts = [0, *(np.flatnonzero((speaker[1:] != Role.ASSISTANT) & (speaker[:-1] == Role.ASSISTANT)) + 1).tolist()]
    ends = [*starts[1:], len(roles)]
    pieces: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        if pieces and end - pieces[-1][0] <= limit + 1:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    return [(start, min(end, start + limit + 1)) for start, end in pieces]
