"""From tokenized documents to the batch of any step: cut to length, packed, in an order that the seed decides.

A batch is a function of (seed, step), so that resuming means asking for the next one. Inputs and targets
are shifted within each document before packing: a document of n tokens takes n − 1 places, every token
but the first is a target, and nothing is lost at a border.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.corpus.packing import best_fit_decreasing
from llamero.engine.stage import Overlong, StageConfig
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
    """Number of each document in its dataset, for messages."""


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
    """

    def __init__(
        self,
        tokens: Sequence[NDArray[np.integer[Any]]],
        roles: Sequence[NDArray[np.integer[Any]]],
        stage: StageConfig,
        *,
        seed: int,
        where: str,
    ) -> None:
        self._tokens, self._roles, self._seed, self._where = tokens, roles, seed, where
        if len(tokens) != len(roles):
            raise LlameroError(f"{len(tokens)} documents of tokens, {len(roles)} of roles", where=where)
        self.batch = stage.batch
        self._weight = _weights_by_role(stage)
        self.report = Report()
        self._pieces = self._cut(stage)
        lengths = np.asarray([stop - start - 1 for _, start, stop in self._pieces], dtype=np.int64)
        self._rows = best_fit_decreasing(lengths, stage.sequence)
        if not self._rows:
            raise LlameroError("nothing to learn: no document of this stage is left", where=where)
        self.report.rows = len(self._rows)
        self.report.fill = float(lengths.sum() / (len(self._rows) * stage.sequence))
        # rounded, because 1.1 × 10 is a little more than 11
        rows = math.ceil(round((stage.epochs or 1) * len(self._rows), 6)) if stage.steps is None else math.inf
        self._last_row = rows
        self.steps = stage.steps or math.ceil(rows / stage.batch)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Return the number of rows of one pass."""
        return len(self._rows)

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step, by its number alone; where `epochs` says how many, the last step has the rest."""
        first = step * self.batch
        return [self._row(index) for index in range(first, int(min(first + self.batch, self._last_row)))]

    def assemble(self, rows: Sequence[int]) -> Batch:
        """Return the documents of some rows as one batch."""
        ids, targets, weights, lengths, documents = [], [], [], [], []
        for piece in (self._pieces[number] for row in rows for number in self._rows[row]):
            document, start, stop = piece
            piece_ids = np.asarray(self._tokens[document][start:stop], dtype=np.int64)
            ids.append(piece_ids[:-1])
            targets.append(piece_ids[1:])
            weights.append(self._weight[np.asarray(self._roles[document][start + 1 : stop])])
            lengths.append(len(piece_ids) - 1)
            documents.append(document)
        weight = np.concatenate(weights)
        learned = np.flatnonzero(weight)
        return Batch(
            ids=torch.from_numpy(np.concatenate(ids)),
            lengths=tuple(lengths),
            learned=torch.from_numpy(learned),
            targets=torch.from_numpy(np.concatenate(targets)[learned]),
            weights=torch.from_numpy(weight[learned]),
            documents=tuple(documents),
        )

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self._rows))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        return int(self._order[1][place])

    def _cut(self, stage: StageConfig) -> list[tuple[int, int, int]]:
        """Return (document, first token, end) of every piece, none longer than the sequence."""
        pieces: list[tuple[int, int, int]] = []
        report = self.report
        for number in range(len(self._tokens)):
            roles = np.asarray(self._roles[number])
            if len(roles) != len(self._tokens[number]):
                raise LlameroError(
                    f"document {number} has {len(self._tokens[number])} tokens and {len(roles)} roles",
                    where=self._where,
                    fix="tokens and roles are not of one run: tokenize again",
                )
            report.documents += 1
            if len(roles) < 2:
                report.too_short += 1
                continue
            cuts = [(0, len(roles))]
            if len(roles) - 1 > stage.sequence:
                cuts = self._shorten(number, roles, stage.policy, stage.sequence)
            kept = [(a, b) for a, b in cuts if self._weight[roles[a + 1 : b]].any()]
            report.dropped += not cuts
            report.nothing_to_learn += bool(cuts) and not kept
            report.pieces_without_target += len(cuts) - len(kept) if kept else 0
            report.tokens += sum(b - a - 1 for a, b in kept)
            report.supervised_tokens += int(sum(np.count_nonzero(self._weight[roles[a + 1 : b]]) for a, b in kept))
            pieces += [(number, a, b) for a, b in kept]
        return pieces

    def _shorten(
        self, number: int, roles: NDArray[np.integer[Any]], policy: Overlong, limit: int
    ) -> list[tuple[int, int]]:
        report = self.report
        if policy == "error":
            raise LlameroError(
                f"sample {number} has {len(roles)} tokens, `sequence` is {limit}",
                where=self._where,
                fix="set `overlong: split`, `truncate` or `drop`, or a longer `sequence`",
            )
        if policy == "drop":
            return []
        cuts = [(0, limit + 1)] if policy == "truncate" else split_at_turns(roles, limit)
        lost = len(roles) - sum(b - a for a, b in cuts)  # below zero where pieces overlap by a token
        report.split += len(cuts) > 1
        report.truncated += lost > 0
        report.truncated_tokens += max(0, lost)
        return cuts


def _weights_by_role(stage: StageConfig) -> NDArray[np.float32]:
    """Return the loss weight of every role code; what the template says is never learned, except by `lm`."""
    weight = np.zeros(2 * SCAFFOLD, dtype=np.float32)
    if stage.objective == "lm":
        weight[:] = 1.0
        return weight
    for role in Role:
        weight[role] = getattr(stage.learn, role.name.lower())
    return weight


def split_at_turns(roles: NDArray[np.integer[Any]], limit: int) -> list[tuple[int, int]]:
    """Return pieces of at most `limit` + 1 tokens.

    Plain text is cut where it is full, the last token of a piece being the first of the next, so that
    every token stays a target. A chat is cut where an assistant has finished and the next question (or its
    context) begins; a turn that alone is longer than the limit loses its end.
    """
    speaker = roles % SCAFFOLD
    if (speaker == Role.TEXT).all():
        return [(a, min(a + limit + 1, len(roles))) for a in range(0, len(roles) - 1, limit)]
    starts = [0, *(np.flatnonzero((speaker[1:] != Role.ASSISTANT) & (speaker[:-1] == Role.ASSISTANT)) + 1).tolist()]
    ends = [*starts[1:], len(roles)]
    pieces: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        if pieces and end - pieces[-1][0] <= limit + 1:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    return [(start, min(end, start + limit + 1)) for start, end in pieces]
