"""Multiple choice from log-likelihoods: the likeliest answer, as it is and per character."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError
from llamero.text.messages import Message
from llamero.text.render import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Mean:
    """A mean over `n` questions; the standard error is sqrt(sample variance / n), None for one question."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Item:
    """One question: what could follow it, without the leading space, and which of these is right."""

    choices: tuple[str, ...]
    answer: int
    category: str = ""


@dataclass(frozen=True)
class Verdict:
    """1.0 where the likeliest choice is the right one: by log-likelihood, and by that per character."""

    acc: float
    acc_norm: float


@dataclass(frozen=True)
class Accuracy:
    """Accuracies over some questions; `by_category` holds the plain accuracy of each category."""

    acc: Mean
    acc_norm: Mean
    by_category: dict[str, Mean]


def likeliest(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equals."""
    if any(math.isnan(value) for value in values):
        raise LlameroError(
            f"a log-likelihood is not a number: {list(values)}",
            fix="look for overflow in the model (try float32)",
        )
    return max(range(len(values)), key=lambda i: values[i])


def verdict(item: Item, log_likelihoods: Sequence[float]) -> Verdict:
    """Return whether the likeliest choice is the right one.

    A character is a Unicode code point, as in the leaderboard of 2023: neither a byte nor a token.
    """
    if len(log_likelihoods) != len(item.choices):
        raise ValueError(f"{len(log_likelihoods)} log-likelihoods for {len(item.choices)} choices")
    per_character = [ll / len(choice) for ll, choice in zip(log_likelihoods, item.choices, strict=True)]
    return Verdict(
        acc=float(likeliest(log_likelihoods) == item.answer),
        acc_norm=float(likeliest(per_character) == item.answer),
    )


def accuracy(items: Sequence[Item], log_likelihoods: Sequence[Sequence[float]]) -> Accuracy:
    """Return the accuracies over `items`, whose choices have the given log-likelihoods."""
    verdicts = [verdict(item, values) for item, values in zip(items, log_likelihoods, strict=True)]
    categories: dict[str, list[float]] = {}
    for item, found in zip(items, verdicts, strict=True):
        categories.setdefault(item.category, []).append(found.acc)
    return Accuracy(
        acc=mean([found.acc for found in verdicts]),
        acc_norm=mean([found.acc_norm for found in verdicts]),
        by_category={name: mean(values) for name, values in categories.items()},
    )


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of one value per question, with its standard error."""
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no questions")
    value = math.fsum(values) / n
    if n == 1:
        return Mean(value, None, 1)
    variance = math.fsum((x - value) ** 2 for x in values) / (n - 1)
    return Mean(value, math.sqrt(variance / n), n)


def chat_answer(question: str, answer: str, template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation up to the answer, and those of the answer with its end."""
    asked = [Message("user", question)]
    prompt = render(asked, template, tokenizer, add_generation_prompt=True).ids
    whole = render([*asked, Message("assistant", answer)], template, tokenizer)
    learned = [i for i, learned in enumerate(whole.learned) if learned]
    return list(prompt), list(whole.ids[len(prompt) : learned[-1] + 1])


def plain_answer(context: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of plain text and of the answer after a space, which goes with the answer."""
    whole = tokenizer.encode(f"{context} {answer}")
    length = len(tokenizer.encode(context))
    return whole[:length], whole[length:]
