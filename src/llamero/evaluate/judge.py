"""A judge answers questions about answers; every judgment is in a file as soon as it is given.

What is in the file already, word for word the same question to the same judge, is not asked again, except where the
judge gave no answer. Lines are FastChat's, so that its own tools read them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from llamero.core import files, progress
from llamero.core.download import resolve_model
from llamero.core.errors import LlameroError
from llamero.evaluate.mt_bench import JUDGE_TOKENS, UNANSWERED
from llamero.infer.backends.openai import Client, Endpoint, Unanswered, at_once
from llamero.infer.context import check_tokenizer
from llamero.infer.replies import replies
from llamero.infer.sampler import Sampling
from llamero.model.load import load_model
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import device
from llamero.text.messages import Message
from llamero.text.render import resolve
from llamero.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llamero.core.journal import Journal

PATIENCE = 10
"""Questions in a row that a judge may leave unanswered before the run ends."""


class Question(NamedTuple):
    """What a judge is asked."""

    system: str
    row: Mapping[str, Any]
    """Its line in the file, without the judgment: all of it says which one it is; `user_prompt` is what is asked."""
    grade: Callable[[str], Mapping[str, Any]]
    """Returns what a judgment comes to, for the line."""
    seed: int = 0

    @property
    def text(self) -> str:
        """Return what is asked."""
        return self.row["user_prompt"]


class Judgment(NamedTuple):
    """What a judge said."""

    text: str
    """`UNANSWERED` where there is none."""
    version: str = ""
    """Which model it was, where its server says more than its name."""


Keep = Callable[[int, Judgment], None]


class Judge(Protocol):
    """Who judges."""

    name: str
    """Names it in files and reports."""

    def describe(self) -> str:
        """Return which judge this is, for reports."""
        ...

    def answers(self, questions: Sequence[Question], keep: Keep) -> Iterator[Judgment]:
        """Yield judgments in the order in which they are given.

        Args:
            questions: What to judge.
            keep: Is called with the number of a question and its judgment before anything else is asked.
        """
        ...


class ServedJudge:
    """A model behind an OpenAI-compatible interface.

    Args:
        endpoint: Where it is.
        temperature: Of its words.
        threads: Questions that are under way at a time.
    """

    def __init__(self, endpoint: Endpoint, *, temperature: float, threads: int) -> None:
        self.name = endpoint.model
        self._client, self._temperature, self._threads = Client(endpoint), temperature, threads
        self._unanswered = 0  # in a row
        self._lock = threading.Lock()

    def describe(self) -> str:
        """Return which judge this is."""
        return self._client.endpoint.describe()

    def answers(self, questions: Sequence[Question], keep: Keep) -> Iterator[Judgment]:
        """Yield judgments as they come.

        Raises:
            LlameroError: The server refuses whatever it is asked, or answers nothing any more.
        """

        def ask(numbered: tuple[int, Question]) -> Judgment:
            judgment = self._ask(numbered[1])
            keep(numbered[0], judgment)
            return judgment

        for _, judgment in at_once(ask, list(enumerate(questions)), threads=self._threads):
            yield judgment

    def _ask(self, question: Question) -> Judgment:
        said = [{"role": "system", "content": question.system}, {"role": "user", "content": question.text}]
        try:
            answer = self._client.chat(said, temperature=self._temperature, max_tokens=JUDGE_TOKENS)
        except Unanswered as error:
            with self._lock:
                self._unanswered += 1
                if self._unanswered < PATIENCE:
                    return Judgment(UNANSWERED)
            raise LlameroError(
                f"the judge left {PATIENCE} questions in a row unanswered; {error.problem}",
                where=error.where,
                fix="see whether it runs, and run this again: what was judged is kept",
            ) from error
        with self._lock:
            self._unanswered = 0
        return Judgment(answer.text, "" if answer.model == self.name else answer.model)


class LocalJudge:
    """A model on this machine.

    Args:
        model: Directory, GGUF file or hub name.
        temperature: Of its words.
        template: Its chat template; `auto` is its own.

    Raises:
        LlameroError: There is no such model, or it has no such template.
    """

    def __init__(self, model: str, *, temperature: float, template: str = "auto") -> None:
        self._path = resolve_model(model)
        try:
            resolve(template, load_tokenizer(self._path))
        except LlameroError as error:
            raise LlameroError(error.problem, where=f"judge {model}", fix="name one in `judge_template`") from error
        self.name = file_name(model)
        self._temperature, self._template = temperature, template

    def describe(self) -> str:
        """Return which judge this is."""
        return f"{self.name}, run here"

    @torch.inference_mode()
    def answers(self, questions: Sequence[Question], keep: Keep) -> Iterator[Judgment]:
        """Yield judgments as they come; a question that does not fit into its context is not answered."""
        tokenizer = load_tokenizer(self._path)
        model = load_model(self._path, device=device(ParallelConfig()))
        check_tokenizer(model, tokenizer, where=self._path)
        sampling = [
            Sampling(temperature=self._temperature, max_new_tokens=JUDGE_TOKENS, seed=q.seed) for q in questions
        ]
        asked = [
            ([Message("system", q.system), Message("user", q.text)], how)
            for q, how in zip(questions, sampling, strict=True)
        ]
        for number, reply in replies(model, tokenizer, asked, template=self._template):
            judgment = Judgment(UNANSWERED if reply.finish == "too long" else reply.text)
            keep(number, judgment)
            yield judgment


def file_name(model: str) -> str:
    """Return a model's name as a file can have it: of a path the last part, else slashes become `--`."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else model.strip("/")
    return "".join(each if each.isalnum() or each in "._-" else "--" for each in name).lstrip(".") or "model"


@dataclass(frozen=True)
class Court:
    """A judge and the file of the judgments."""

    judge: Judge
    journal: Journal

    def judge_all(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Return the line of each question with its `judgment`, in their order; what is not in the file is asked.

        Lines of the same question with another wording (of an answer that has changed) are replaced.

        Raises:
            LlameroError: The judge refuses, or answers nothing any more; what it said before is kept.
        """
        wanted = {_which(q.row): number for number, q in enumerate(questions)}
        slots = {_slot(q.row) for q in questions}
        found: dict[int, dict[str, Any]] = {}
        kept: list[dict[str, Any]] = []
        for record in self.journal.records:
            number = wanted.get(_which(record))
            if number is not None and number not in found and record.get("judgment") != UNANSWERED:
                found[number] = record
            elif _slot(record) in slots:
                continue
            kept.append(record)
        if len(kept) != len(self.journal.records):
            self.journal.rewrite(kept)
        missing = [number for number in range(len(questions)) if number not in found]

        def keep(index: int, judgment: Judgment) -> None:
            asked = questions[missing[index]]
            record = {**asked.row, "judgment": judgment.text, **asked.grade(judgment.text), "tstamp": time.time()}
            if judgment.version:
                record["judge_version"] = judgment.version
            self.journal.append(record)
            found[missing[index]] = record

        with progress.Line(f"judged by {self.judge.name}", total=len(missing), unit="judgments") as line:
            failed = 0
            for judgment in self.judge.answers([questions[number] for number in missing], keep) if missing else ():
                failed += judgment.text == UNANSWERED
                line.advance(note=f"{failed} without answer" if failed else "")
        return [found[number] for number in range(len(questions))]


_GIVEN = ("judgment", "score", "winner", "tstamp", "judge_version")
"""What a judgment adds to a line."""


def _which(row: Mapping[str, Any]) -> str:
    return files.digest({key: value for key, value in row.items() if key not in _GIVEN})


def _slot(row: Mapping[str, Any]) -> str:
    return files.digest({key: value for key, value in row.items() if key not in (*_GIVEN, "user_prompt")})
