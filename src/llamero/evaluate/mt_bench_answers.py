"""A model's answers to MT-Bench: the first turn of all questions in one batch, then the second of all.

Every answer is kept as it comes in `model_answer/<model>.turns`; FastChat's `model_answer/<model>.jsonl` is written
from that when the last one is there. A run that was cut off asks only what is missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llamero.core import files, progress
from llamero.core.errors import LlameroError
from llamero.core.journal import Journal
from llamero.corpus.mt_bench import as_row
from llamero.evaluate.mt_bench import FAILED, TURNS, temperature
from llamero.infer.replies import Reply, replies
from llamero.text.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from llamero.corpus.benchmarks import MtBenchRow
    from llamero.corpus.mt_bench import Answers
    from llamero.infer.sampler import Sampling
    from llamero.model.llama import Llama
    from llamero.text.tokenizer import Tokenizer

_ID_DIGITS = 22


@dataclass(frozen=True)
class Speaker:
    """The model that answers."""

    name: str
    """Names its files."""
    model: Llama
    tokenizer: Tokenizer
    template: str


@dataclass(frozen=True)
class Answered:
    """What a model answered."""

    answers: Answers
    notes: tuple[str, ...]
    """Counts that the reader must know: cut off, empty, not asked."""


def answer(
    speaker: Speaker,
    questions: Sequence[MtBenchRow],
    out: Path,
    *,
    sampling: Sampling,
    settings: Mapping[str, Any],
) -> Answered:
    """Return a model's answers, those that are in the files already among them.

    Args:
        speaker: The model.
        questions: What to ask.
        out: Directory of `model_answer/`.
        sampling: How to choose tokens; the temperature comes from a question's category, the seed from its number.
        settings: What decides the answers; kept beside them, and answers made otherwise are not mixed with new ones.

    Raises:
        LlameroError: The files hold answers made otherwise, or by something else.
    """
    whole = out / "model_answer" / f"{speaker.name}.jsonl"
    journal = _open(whole, settings)
    asking = _Asking(speaker, journal, sampling, {(r["question_id"], r["turn"]): r for r in journal.records[1:]})
    missing = sum((q.id, turn) not in asking.said for q in questions for turn in (1, 2))
    with progress.Line(f"answers of {speaker.name}", total=missing, unit="answers") as line:
        for turn in range(1, TURNS + 1):
            asking.turn(questions, turn, line)
    answers = {q.id: tuple(asking.said[q.id, turn]["text"] for turn in range(1, TURNS + 1)) for q in questions}
    lines = [
        _line(number, speaker.name, turns, asking.said[number, TURNS]) for number, turns in sorted(answers.items())
    ]
    Journal(whole).rewrite(lines)
    return Answered(answers, tuple(_notes([asking.said[q.id, turn] for q in questions for turn in (1, 2)])))


def _open(whole: Path, settings: Mapping[str, Any]) -> Journal:
    journal = Journal(whole.with_suffix(".turns") if whole.suffix == ".jsonl" else whole)
    if not journal.records:
        if whole.exists():
            raise LlameroError(
                "answers of a model of this name are there, and not how they were made",
                where=whole,
                fix="move them away, or choose another directory with --out",
            )
        journal.append({"settings": dict(settings)})
    before = journal.records[0].get("settings")
    if before != dict(settings):
        changed = [key for key in settings if not isinstance(before, dict) or before.get(key) != settings[key]]
        raise LlameroError(
            f"the answers there were made otherwise ({', '.join(changed) or 'settings'})",
            where=journal.path,
            fix="choose another directory with --out, or remove them",
        )
    return journal


@dataclass
class _Asking:
    """The answers so far, and the way to more."""

    speaker: Speaker
    journal: Journal
    sampling: Sampling
    said: dict[tuple[int, int], dict[str, Any]]
    """Records by question and turn."""

    def turn(self, questions: Sequence[MtBenchRow], turn: int, line: progress.Line) -> None:
        """Ask one turn of every question that lacks it."""
        waiting = [q for q in questions if (q.id, turn) not in self.said]
        mute = [q for q in waiting if turn == TURNS and not self.said[q.id, 1]["text"]]
        for question in mute:  # a template has no place for an answer of nothing
            self._keep(question.id, turn, Reply(FAILED, 0, "not asked"), line)
        rest = [q for q in waiting if q not in mute]
        asked = [(self._conversation(q, turn), self._sampling(q, turn)) for q in rest]
        for number, reply in self._replies(asked):
            said = reply._replace(text=FAILED) if reply.finish == "too long" else reply
            self._keep(rest[number].id, turn, said, line)

    def _replies(self, asked: Sequence[tuple[list[Message], Sampling]]) -> Iterator[tuple[int, Reply]]:
        speaker = self.speaker
        return replies(speaker.model, speaker.tokenizer, asked, template=speaker.template)

    def _keep(self, question: int, turn: int, reply: Reply, line: progress.Line) -> None:
        record = {"question_id": question, "turn": turn, "text": reply.text, "tokens": reply.tokens}
        record |= {"finish": reply.finish, "tstamp": time.time()}
        self.journal.append(record)
        self.said[question, turn] = record
        line.advance()

    def _conversation(self, question: MtBenchRow, turn: int) -> list[Message]:
        if turn == 1:
            return [Message("user", question.turns[0])]
        first = self.said[question.id, 1]["text"]
        return [Message("user", question.turns[0]), Message("assistant", first), Message("user", question.turns[1])]

    def _sampling(self, question: MtBenchRow, turn: int) -> Sampling:
        seed = int(files.digest([self.sampling.seed, question.id, turn])[:15], 16)
        return replace(self.sampling, temperature=temperature(question.category), seed=seed)


def _line(question: int, model: str, turns: tuple[str, ...], last: Mapping[str, Any]) -> dict[str, Any]:
    name = files.digest([question, model, list(turns)])[:_ID_DIGITS]
    return as_row(question, model, turns, name, last["tstamp"])


def _notes(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    told = {
        "length": "answers were cut off at their longest",
        "too long": f"questions left no room for an answer in the model's context; the judge saw `{FAILED}`",
        "not asked": f"second questions were not asked, as the first answer was empty; the judge saw `{FAILED}`",
    }
    for finish, text in told.items():
        count = sum(record["finish"] == finish for record in records)
        if count:
            yield f"MT-Bench: {count} of {len(records)} {text}"
