"""H4 and what is asked like it: requests to a model, its answers to scores, every sample written down."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llamero.core import progress, world
from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.evaluate import openllm, per_sample, questions, requests, tally, tokens
from llamero.evaluate.config import H4Task
from llamero.evaluate.per_sample import Key, SampleFile
from llamero.evaluate.questions import Document, Task
from llamero.evaluate.subject import Subject, standard_error
from llamero.infer.sampler import Sampling

CHUNK_TOKENS = 2**21
"""Tokens that are scored at a time; what an engine keeps lets a killed run go on within them. Chunks are of one task,
so little is computed twice between them: the few-shot examples of a subject of MMLU."""

Row = dict[str, Any]

_NUMBERED = re.compile(r"^(?:request|prompt) (\d+)$")
"""How an engine says which of its requests an error is about."""


@dataclass(frozen=True)
class _Prompted:
    """A document as the model sees it: (context, continuation) ids of each request, and which requests these are."""

    number: int
    document: Document
    pairs: list[tuple[list[int], list[int]]]
    first: int
    """Number of its first request in the task."""


@dataclass
class _Lost:
    """What was cut off, of one benchmark."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Asking:
    """How one configuration asks one model."""

    task: H4Task
    subject: Subject
    bos: bool
    limit: int
    """Tokens the model may see at a time."""
    kept: SampleFile
    lost: dict[str, _Lost] = field(default_factory=dict)

    def count(self, benchmark: str, rows: Sequence[Row]) -> None:
        """Note what was cut off."""
        total = self.lost.setdefault(benchmark, _Lost())
        total.requests += sum(row["truncated"] > 0 for row in rows)
        total.tokens += sum(row["truncated"] for row in rows)


def run(task: H4Task, subject: Subject) -> list[Result]:
    """Measure a model by H4 or its parts.

    Args:
        task: What to ask.
        subject: Whom; its samples are kept where it says, and what is there already is not asked again.
    """
    asked = requests.of(task, subject.root)
    bos = task.compat == "lm-eval" and subject.tokenizer.add_bos
    how = _how(task, asked, bos)
    kept = SampleFile(subject.samples, writes=world.rank() == 0)
    kept.begin(task.label, {"model": subject.name, **how, **subject.measured()})
    limit = subject.config.max_position_embeddings
    asking = _Asking(task, subject, bos, limit, kept)
    total = sum(len(one.documents) for one in asked)
    with progress.Line(f"evaluate {subject.name}", total=total, unit="questions") as line:
        scored = [_task(one, asking, line) for one in asked]
    return _results(task, subject, tally.summary(asked, scored), how, asking.lost)


def _how(task: H4Task, asked: Sequence[Task], bos: bool) -> dict[str, Any]:
    """Return what moves scores and is the same for all models that are compared."""
    return {
        "compat": task.compat,
        "rules": asked[0].rules.title,
        "bos": bos,
        "chat_template": None,
        "truncation": "left",
        "softmax_dtype": task.softmax_dtype,
        "mmlu": "plain mean over subjects" if asked[0].rules.macro else "mean over questions",
        "requests": questions.digest(asked),
    }


def _task(one: Task, asking: _Asking, line: progress.Line) -> tally.Scores:
    """Return the scores of one task, whatever of it was answered before."""
    rows: list[dict[str, float]] = []
    answer = _written if one.until else _scored
    for chunk in _chunks(one, asking):
        keys = [Key(one.name, each.number, j) for each in chunk for j in range(len(each.pairs))]
        lines = asking.kept.known(keys)
        if lines is None:
            lines = answer(one, chunk, asking)
            asking.kept.add(lines)
        asking.count(one.benchmark, lines)
        firsts = [row for row in lines if row["choice"] == 0]
        rows += [row["scores"] for row in firsts]
        line.advance(len(chunk), one.name)
    return tally.tallied(one, rows)


def _chunks(one: Task, asking: _Asking) -> Iterator[list[_Prompted]]:
    """Yield the documents of a task with their ids, some at a time."""
    chunk: list[_Prompted] = []
    size, before, first = 0, [], 0
    for number, document in enumerate(one.documents):
        count = 1 if one.until else len(document.choices)
        mine = one.requests[first : first + count]
        pairs = [
            (tokens.text(asking.subject.tokenizer, each.context, bos=asking.bos), [])
            if one.until
            else tokens.pair(asking.subject.tokenizer, each.context, each.continuation, bos=asking.bos)
            for each in mine
        ]
        context = pairs[0][0]
        new = len(context) - _common(before, context) + sum(len(continuation) for _, continuation in pairs)
        if chunk and size + new > CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
        chunk.append(_Prompted(number, document, pairs, first))
        size, before, first = size + new, context, first + count
    yield chunk


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _scored(one: Task, chunk: Sequence[_Prompted], asking: _Asking) -> list[Row]:
    """Return the lines of documents whose choices are scored."""
    flat = [pair for each in chunk for pair in each.pairs]
    with _samples_named(one, chunk):
        answers = asking.subject.engine.score(flat, max_length=asking.limit, softmax=asking.task.softmax_dtype)
    lines: list[Row] = []
    for each in chunk:
        mine, answers = answers[: len(each.pairs)], answers[len(each.pairs) :]
        found = tally.measured(one, each.number, [answer.log_likelihood for answer in mine])
        for j, ((context, continuation), answer) in enumerate(zip(each.pairs, mine, strict=True)):
            seen = context[answer.truncated :]
            lines.append(
                {
                    **Key(one.name, each.number, j)._asdict(),
                    "prompt": per_sample.prompt_digest(seen),
                    "context_tokens": len(seen),
                    "tokens": list(continuation),
                    "log_likelihood": answer.log_likelihood,
                    "greedy": answer.greedy,
                    "truncated": answer.truncated,
                    "scores": found,
                }
            )
    return lines


def _written(one: Task, chunk: Sequence[_Prompted], asking: _Asking) -> list[Row]:
    """Return the lines of documents that are answered freely: greedily, up to whatever ends an answer."""
    subject = asking.subject
    most = min(openllm.GSM8K_TOKENS, asking.limit - 1)
    sampling = Sampling(temperature=0, max_new_tokens=most, stop_ids=subject.ends, stop_strings=one.until)
    contexts = [each.pairs[0][0] for each in chunk]
    seen = [context[-(asking.limit - most) :] for context in contexts]
    with _samples_named(one, chunk):
        answers = subject.engine.generate(seen, sampling)
    return [
        {
            **Key(one.name, each.number, 0)._asdict(),
            "prompt": per_sample.prompt_digest(ids),
            "context_tokens": len(ids),
            "tokens": list(answer.ids),
            "log_likelihood": None,
            "greedy": True,
            "text": answer.text,
            "truncated": len(context) - len(ids),
            "scores": openllm.gsm8k_right(each.document.choices[0], answer.text),
        }
        for each, context, ids, answer in zip(chunk, contexts, seen, answers, strict=True)
    ]


@contextmanager
def _samples_named(one: Task, chunk: Sequence[_Prompted]) -> Iterator[None]:
    """Say of which question an error is that an engine can only number."""
    try:
        yield
    except LlameroError as error:
        found = _NUMBERED.match(str(error.where))
        if found is None:
            raise
        request = one.requests[chunk[0].first + int(found[1])]
        where = f"{one.name}, document {request.doc}, choice {request.choice}"
        raise LlameroError(error.problem, where=where, fix=error.fix) from error


def _results(
    task: H4Task, subject: Subject, summary: tally.Summary, how: Mapping[str, Any], lost: Mapping[str, _Lost]
) -> list[Result]:
    results: list[Result] = []
    for name, part in summary["benchmarks"].items():
        metrics = {part["metric"]: part["value"], **standard_error(part["metric"], part["standard_error"])}
        for key, number in part["others"].items():
            metrics |= {key: number["value"], **standard_error(key, number["standard_error"])}
        metrics["questions"] = part["n"]
        protocol = f"{part['shots']}-shot {part['metric']}, {summary['rules']}"
        notes = [text for text in summary["departures"] if text.startswith(f"{name}:")]
        cut = lost.get(name, _Lost())
        if cut.requests:
            notes.append(f"{name}: {cut.requests} requests were longer than the context and lost their beginning")
        about = {"pool": part["pool"], "edition": part["edition"], "subjects": part["subjects"]}
        stated = {key: value for key, value in about.items() if value}
        measured = {**subject.measured(), "truncated": {"requests": cut.requests, "tokens": cut.tokens}}
        results.append(
            subject.result(name, metrics, protocol, notes=notes, limit=task.limit, how=how, measured=measured, **stated)
        )
    if summary["average"] is not None and task.tasks == "h4":
        metrics = {"average": summary["average"] / 100}
        said = {"how": how, "measured": subject.measured()}
        notes = [] if task.compat == "leaderboard-2023" else ["h4: lm-eval itself gives no mean of the four"]
        protocol = f"mean of the four, {summary['rules']}"
        results.append(subject.result("h4", metrics, protocol, notes=notes, limit=task.limit, **said))
    return results
