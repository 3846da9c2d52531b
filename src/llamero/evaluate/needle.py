"""A needle in a haystack: a number told somewhere in a long text, asked for at its end.

Prompt, needle, question and the rule of where it goes are EasyContext's (eval_needle.py), of which Gradient's published
grids are made: an answer is right if each of its tokens is the likeliest one, given those before it. Beside it the
model can be let answer freely, which is right if the number is in what it says.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from llamero.core import progress, world
from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.evaluate import per_sample
from llamero.evaluate.config import NeedleTask
from llamero.evaluate.per_sample import Key, SampleFile
from llamero.evaluate.subject import Subject
from llamero.infer.engine import Engine
from llamero.infer.sampler import Sampling
from llamero.text.tokenizer import Tokenizer

NAME = "needle"
BEFORE = "This is a very long story book: <book>"
NEEDLE = "\nThe special magic Singapore number is: {number}.\n"
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is:"
)
MORE = 8
"""Tokens beyond those of the number that a free answer may have."""

Ids = list[int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One question."""

    length: int
    """Tokens of the haystack, without needle and question."""
    depth: float
    """Share of the haystack before the needle."""
    number: int
    prompt: Ids
    answer: Ids


@dataclass(frozen=True)
class Found:
    """What a model made of a question."""

    forced: bool
    """Whether each token of the answer is the likeliest one, given those before it."""
    log_likelihood: float
    """Of the answer, in nats."""
    said: str | None
    """What it answered freely, if it was let."""


def contains(said: str, number: int) -> bool:
    """Return whether a free answer holds the number."""
    return str(number) in said


def judge(engine: Engine, cells: Sequence[Cell], *, freely: bool) -> list[Found]:
    """Return what a model makes of questions, in their order.

    Of a haystack that questions share, what lies before the first needle is computed once.

    Args:
        engine: Who answers.
        cells: The questions.
        freely: Whether it is let answer too.
    """
    scored = engine.score([(cell.prompt, cell.answer) for cell in cells])
    said: list[str | None] = [None] * len(cells)
    if freely:
        for number, cell in enumerate(progress.track(cells, "answer freely", unit="questions")):
            sampling = Sampling(temperature=0, max_new_tokens=len(cell.answer) + MORE)
            said[number] = engine.generate([cell.prompt], sampling)[0].text
    return [Found(each.greedy, each.log_likelihood, text) for each, text in zip(scored, said, strict=True)]


def periods(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a sentence: a period, with a space before it or without."""
    return frozenset(tokenizer.encode(text)[-1] for text in (".", "a.", "a ."))


def place(haystack: Sequence[int], depth: float, ends: frozenset[int]) -> int:
    """Return where a needle goes: at a share of the haystack, moved on to the end of the sentence if one ends."""
    start = int(len(haystack) * depth)
    if start == 0:
        return 0
    return next((at + 1 for at in range(start, len(haystack)) if haystack[at] in ends), start)


def cells(task: NeedleTask, tokenizer: Tokenizer, text: Sequence[int]) -> Iterator[Cell]:
    """Yield the questions of a grid, by length, depth and number.

    Args:
        task: Lengths, depths and numbers.
        tokenizer: Of the model.
        text: Ids of the haystack, repeated where it is too short.
    """
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    before = [*head, *tokenizer.encode(BEFORE)]
    question = tokenizer.encode(QUESTION + (" " if task.space else ""))
    ends = periods(tokenizer)
    draw = random.Random(task.seed)
    numbers = [draw.randrange(10**task.digits) for _ in range(task.num_samples)]
    for length in task.lengths:
        haystack = list(islice(cycle(text), length))
        for depth in task.depths:
            at = place(haystack, depth, ends)
            for number in numbers:
                needle = tokenizer.encode(NEEDLE.format(number=number))
                prompt = [*before, *haystack[:at], *needle, *haystack[at:], *question]
                yield Cell(length, depth, number, prompt, tokenizer.encode(str(number)))


def read_haystack(path: Path, tokenizer: Tokenizer, distinct: int | None) -> Ids:
    """Return the ids of a text file, or of the `.txt` files of a directory by name, one after the other.

    Args:
        path: The file or directory.
        tokenizer: Of the model.
        distinct: Tokens after which it is cut off, so that it repeats in what is longer; by default it is whole.

    Raises:
        LlameroError: There is no text, or fewer tokens than `distinct`.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        ids = tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in files))
    except FileNotFoundError as error:
        raise LlameroError("the haystack is missing", where=path) from error
    except UnicodeDecodeError as error:
        raise LlameroError(f"not UTF-8: {error.reason}", where=path) from error
    if not ids:
        raise LlameroError("the haystack is empty", where=path, fix="give a text file, or a directory of .txt files")
    if distinct is not None and len(ids) < distinct:
        raise LlameroError(f"the haystack has {len(ids)} tokens, `distinct` asks for {distinct}", where=path)
    return ids[:distinct]


def run(task: NeedleTask, subject: Subject) -> list[Result]:
    """Measure in which of many places a model finds a needle."""
    tokenizer, limit = subject.tokenizer, subject.engine.context
    text = read_haystack(subject.root / task.haystack, tokenizer, task.distinct)
    asked = list(cells(task, tokenizer, text))
    longest = max(len(cell.prompt) + len(cell.answer) + (MORE if task.freely else 0) for cell in asked)
    if longest > limit:
        raise LlameroError(
            f"the longest question has {longest} tokens, the model's context is {limit}",
            fix=f"set `to` {longest - limit} tokens lower",
        )
    kept = SampleFile(subject.samples, writes=world.rank() == 0)
    kept.begin(NAME, {"model": subject.name, **task.decides(), **subject.measured()})
    rows: list[Row] = []
    per_length = len(asked) // len(task.lengths)
    for start in range(0, len(asked), per_length):  # a length is written down as soon as it is done
        part = asked[start : start + per_length]
        there = kept.known(Key(NAME, start + number, 0) for number in range(per_length))
        if there is None:
            there = _rows(part, judge(subject.engine, part, freely=task.freely), start)
            kept.add(there)
        rows += there
    metrics = {"accuracy": _mean(rows, "forced")}
    if task.freely:
        metrics["contained"] = _mean(rows, "contained")
    for length in task.lengths:
        metrics[f"accuracy/{length}"] = _mean([row for row in rows if row["length"] == length], "forced")
    again = max(task.lengths) / len(text)
    source = f"{len(text)} tokens of text" + (f", {again:.1f} times in the longest" if again > 1 else ", none twice")
    protocol = f"{len(asked)} questions: {len(task.lengths)} lengths, {len(task.depths)} depths, {task.num_samples} "
    protocol += f"numbers of {task.digits} digits ({len(asked[0].answer)} tokens); teacher-forced; haystack of {source}"
    grid = {
        str(length): [_mean(_of(rows, length, depth), "forced") for depth in task.depths] for length in task.lengths
    }
    return [subject.result(NAME, metrics, protocol, seed=task.seed, depths=list(task.depths), grid=grid)]


def _rows(part: Sequence[Cell], found: Sequence[Found], first: int) -> list[Row]:
    rows: list[Row] = []
    for number, (cell, each) in enumerate(zip(part, found, strict=True)):
        scores = {"forced": float(each.forced)}
        if each.said is not None:
            scores["contained"] = float(contains(each.said, cell.number))
        rows.append(
            {
                **Key(NAME, first + number, 0)._asdict(),
                "length": cell.length,
                "depth": cell.depth,
                "number": cell.number,
                "prompt": per_sample.prompt_digest(cell.prompt),
                "context_tokens": len(cell.prompt),
                "tokens": cell.answer,
                "log_likelihood": each.log_likelihood,
                "greedy": each.forced,
                "text": each.said,
                "truncated": 0,
                "scores": scores,
            }
        )
    return rows


def _of(rows: Sequence[Row], length: int, depth: float) -> list[Row]:
    return [row for row in rows if (row["length"], row["depth"]) == (length, depth)]


def _mean(rows: Sequence[Row], score: str) -> float:
    return sum(row["scores"][score] for row in rows) / len(rows)
