"""What lm-eval's group `openllm` asks beside the four: WinoGrande and GSM8K, five examples each (lm-eval 0.4.13).

`truthfulqa_gen`, which the group's tag `truthfulqa` holds too, needs BLEU and ROUGE: `--tasks lm-eval:truthfulqa_gen`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llamero.corpus import benchmarks
from llamero.evaluate.questions import LM_EVAL, Document, Plan, Task, build, drawn_beside, enough

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SHOTS = 5
BESIDE = "{split}, the document itself left out"

GSM8K_UNTIL = ("Question:", "</s>", "<|im_end|>")
"""What ends an answer to GSM8K, beside the end of text."""
GSM8K_TOKENS = 256
"""Longest answer: what lm-eval's `hf` back end gives a task that does not say."""
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBERS = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def winogrande(root: Path, limit: int | None) -> Task:
    """Return WinoGrande: which option in the blank makes the rest of the sentence likelier."""

    def documents(rows: Sequence[benchmarks.WinoGrandeRow]) -> list[Document]:
        # the query is the rest of the sentence, the choices are what stands before it
        return [
            Document(
                row.sentence[row.sentence.index("_") + 1 :].strip(),
                tuple(row.sentence[: row.sentence.index("_")] + option for option in row.options),
                row.answer,
            )
            for row in rows
        ]

    def examples(drawn: Sequence[Document]) -> str:
        return "".join(f"{one.choices[one.answer]} {one.query}\n\n" for one in drawn)

    def asking(preamble: str, document: Document) -> Iterator[tuple[str, str]]:
        for choice in document.choices:
            yield preamble + choice, f" {document.query}"

    train = benchmarks.winogrande_train(root)
    asked = documents(benchmarks.winogrande(root))
    pool = None if train is None else documents(train)
    draw, about, count = _drawing(asked, pool, examples, root / "winogrande", "validation")
    plan = Plan("winogrande", SHOTS, "acc", about, count, rules=LM_EVAL)
    return build(plan, asked, draw, limit, asking)


def gsm8k(root: Path, limit: int | None) -> Task:
    """Return GSM8K: problems answered freely."""

    def documents(rows: Sequence[benchmarks.Gsm8kRow]) -> list[Document]:
        return [Document(f"Question: {row.question}\nAnswer:", (row.answer,), 0) for row in rows]

    def examples(drawn: Sequence[Document]) -> str:
        return "".join(f"{one.query} {one.choices[0]}\n\n" for one in drawn)

    def asking(preamble: str, document: Document) -> Iterator[tuple[str, str]]:
        yield preamble + document.query, ""

    train = benchmarks.gsm8k_train(root)
    asked = documents(benchmarks.gsm8k(root))
    pool = None if train is None else documents(train)
    draw, about, count = _drawing(asked, pool, examples, root / "gsm8k", "test")
    plan = Plan("gsm8k", SHOTS, "exact_match", about, count, rules=LM_EVAL, until=GSM8K_UNTIL)
    return build(plan, asked, draw, limit, asking)


MORE: dict[str, Callable[[Path, int | None], Task]] = {"winogrande": winogrande, "gsm8k": gsm8k}
"""Tasks of the group that are none of the four."""


def gsm8k_right(reference: str, answer: str) -> dict[str, float]:
    """Return whether an answer ends in the right number: as the examples write it, and wherever its last number stands.

    Args:
        reference: The solution, which ends in `#### ` and the number.
        answer: What the model wrote, without what ended it.
    """
    strict = _STRICT.search(answer)
    numbers = [first or second for first, second in _NUMBERS.findall(answer)]
    wanted = _normal(reference)
    return {
        "exact_match": float(strict is not None and _normal(strict[1]) == wanted),
        "exact_match_flexible": float(bool(numbers) and _normal(numbers[-1].strip()) == wanted),
    }


def _normal(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _drawing(
    asked: Sequence[Document],
    pool: Sequence[Document] | None,
    examples: Callable[[Sequence[Document]], str],
    folder: Path,
    split: str,
) -> tuple[Callable[[random.Random, Document], str], str, int]:
    """Return what draws the examples, where from in words, and from how many documents.

    Without a training file they come from the questions themselves, as lm-eval does for tasks that have none.
    """
    if pool is None:
        enough(asked, SHOTS + 1, folder)
        return drawn_beside(asked, SHOTS, examples), BESIDE.format(split=split), len(asked)
    enough(pool, SHOTS, folder)
    return lambda rng, _: examples(rng.sample(pool, SHOTS)), "train", len(pool)
