"""What a benchmark asks: documents, the requests made of them, and everything that their score depends on."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

Metric = Literal["acc", "acc_norm", "mc1", "mc2", "exact_match"]
Compat = Literal["leaderboard-2023", "lm-eval"]
MMLU_SUBJECTS = 57


@dataclass(frozen=True)
class Rules:
    """Whose protocol it is, in what requests do not say.

    Args:
        name: What a recipe calls it.
        title: What reports call it.
        mc2_until_false: TruthfulQA's true answers end at the first label 0, even where a 1 follows later;
            else they are all that have the label 1.
        macro: MMLU is the plain mean over subjects; else over questions.
        published: Whether published scores go with it, so that what departs from them is said.
    """

    name: Compat
    title: str
    mc2_until_false: bool
    macro: bool
    published: bool


LEADERBOARD_2023 = Rules("leaderboard-2023", "leaderboard-2023 (lm-evaluation-harness b281b09)", True, True, True)
LM_EVAL = Rules("lm-eval", "openllm of lm-eval 0.4.13", False, False, False)
RULES: dict[str, Rules] = {rules.name: rules for rules in (LEADERBOARD_2023, LM_EVAL)}


@dataclass(frozen=True)
class Document:
    """One question as it is asked.

    For TruthfulQA `choices` holds the mc1 choices, then the mc2 choices, whose labels are `mc2_labels`. Of a question
    that is answered freely the one choice is the reference answer.
    """

    query: str
    choices: tuple[str, ...]
    answer: int
    mc2_labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """Ask how likely `continuation` is after `context`, or what follows it where there is none.

    Args:
        doc: Index in the order of the task: shuffled, or that of the file.
        choice: Index in the choices of the document.
    """

    task: str
    doc: int
    choice: int
    context: str
    continuation: str


@dataclass(frozen=True)
class Task:
    """The requests of one task, and all that its score depends on.

    Args:
        pool: Where the examples come from, in words; empty where there are none.
        pool_documents: How many documents that is.
        available: Documents on disk, before the limit.
        edition: The edition of the data where there are several, else empty.
        rules: Whose protocol.
        until: What ends an answer, where it is written freely; else nothing.
    """

    name: str
    shots: int
    metric: Metric
    pool: str
    pool_documents: int
    available: int
    edition: str
    documents: tuple[Document, ...]
    requests: tuple[Request, ...]
    rules: Rules = LEADERBOARD_2023
    until: tuple[str, ...] = ()

    @property
    def benchmark(self) -> str:
        """Return which benchmark it is of, or a part of: `hendrycksTest-anatomy` and `mmlu_anatomy` are of `mmlu`."""
        if self.name.startswith(("hendrycksTest-", "mmlu_")):
            return "mmlu"
        return "truthfulqa_mc" if self.name == "truthfulqa_mc2" else self.name

    @property
    def subject(self) -> str:
        """Return the subject of MMLU that it is."""
        return self.name.removeprefix("hendrycksTest-").removeprefix("mmlu_")


@dataclass(frozen=True)
class Plan:
    """What a task is before its documents are there; the fields are those of `Task`."""

    name: str
    shots: int
    metric: Metric
    pool: str
    pool_documents: int
    edition: str = ""
    rules: Rules = LEADERBOARD_2023
    until: tuple[str, ...] = ()


def by_choice(preamble: str, document: Document) -> Iterator[tuple[str, str]]:
    """Yield the usual requests: one context, and each choice after a space."""
    for choice in document.choices:
        yield preamble + document.query, f" {choice}"


def build(
    plan: Plan,
    documents: Sequence[Document],
    preamble: Callable[[random.Random, Document], str],
    limit: int | None,
    asking: Callable[[str, Document], Iterator[tuple[str, str]]] = by_choice,
) -> Task:
    """Return the task of some documents.

    The leaderboard shuffles with seed 42, takes the limit, and goes on with the same generator to draw examples;
    lm-eval keeps the order of the file and draws with a generator of its own, seeded 1234.

    Args:
        plan: What is known of it.
        documents: In the order of the file.
        preamble: Draws with the generator what stands before a question.
        limit: Documents to take; all by default.
        asking: How a document becomes requests.
    """
    order = list(documents)
    if plan.rules.name == "leaderboard-2023":
        rng = random.Random(42)
        rng.shuffle(order)
    else:
        rng = random.Random(1234)
    taken = tuple(order[:limit])
    requests = tuple(
        Request(plan.name, i, j, context, continuation)
        for i, document in enumerate(taken)
        for j, (context, continuation) in enumerate(asking(preamble(rng, document), document))
    )
    return Task(
        name=plan.name,
        shots=plan.shots,
        metric=plan.metric,
        pool=plan.pool,
        pool_documents=plan.pool_documents,
        available=len(documents),
        edition=plan.edition,
        documents=taken,
        requests=requests,
        rules=plan.rules,
        until=plan.until,
    )


def drawn_beside(
    pool: Sequence[Document], shots: int, examples: Callable[[Sequence[Document]], str]
) -> Callable[[random.Random, Document], str]:
    """Return what draws examples among the questions themselves: one more than needed, the question itself left out."""

    def draw(rng: random.Random, document: Document) -> str:
        drawn = rng.sample(pool, shots + 1)
        return examples([one for one in drawn if one != document][:shots])

    return draw


def enough(pool: Sequence[Document], needed: int, path: Path) -> None:
    """Refuse a pool that holds fewer documents than are drawn from it."""
    if len(pool) < needed:
        raise LlameroError(
            f"{len(pool)} documents to draw examples from, {needed} are needed",
            where=path,
            fix="use the whole file",
        )


def digest(tasks: Sequence[Task]) -> str:
    """Return the SHA-256 of the requests of some tasks, in order: equal digests mean equal prompts, byte for byte."""
    found = hashlib.sha256()
    for task in tasks:
        for each in task.requests:
            found.update((json.dumps([each.context, each.continuation], ensure_ascii=True) + "\n").encode())
    return found.hexdigest()


def lines(tasks: Sequence[Task]) -> Iterator[str]:
    r"""Yield the request list as JSON lines: `task`, `doc`, `context`, `continuation`, in the order they are asked.

    A task of which there are several editions is named with its edition: `truthfulqa_mc (mc_task_2021.json)`.
    """
    for task in tasks:
        named = f"{task.name} ({task.edition})" if task.edition else task.name
        for each in task.requests:
            row = {"task": named, "doc": each.doc, "context": each.context, "continuation": each.continuation}
            yield json.dumps(row, ensure_ascii=True) + "\n"  # escaped: some readers split lines at U+2028 too
