"""MT-Bench's files as FastChat keeps them (Zheng et al. 2023, arXiv:2306.05685; fastchat/llm_judge/data).

    directory/judge_prompts.jsonl
              mt_bench/question.jsonl
              mt_bench/reference_answer/gpt-4.jsonl
              mt_bench/model_answer/<model>.jsonl

The directory may also be the one that holds all benchmarks (all of this in its `mt_bench/`), or the inner `mt_bench/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus.benchmarks import MtBenchRow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SPACE = "lmsys/mt-bench"
"""Of the hub: where its authors keep the files."""
QUESTIONS, PROMPTS, REFERENCES = "question.jsonl", "judge_prompts.jsonl", "reference_answer"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""In the order of the question numbers 81 to 160, ten each."""
FIRST, PER_CATEGORY = 81, 10

Answers = dict[int, tuple[str, ...]]
"""What a model said, turn by turn, by the number of the question."""


@dataclass(frozen=True)
class Prompt:
    """What a judge is told."""

    name: str
    system: str
    template: str
    """Has names in braces for questions and answers."""
    form: str
    """How the judge is to end: `[[rating]]` or `[[A]]`."""

    def fill(self, **texts: str) -> str:
        """Return the text with questions and answers in it; braces in those are left alone.

        Raises:
            LlameroError: The template asks for something that there is not.
        """
        try:
            return self.template.format(**texts)
        except (KeyError, IndexError, ValueError) as error:
            raise LlameroError(
                f"judge prompt `{self.name}` asks for {error}; there is {', '.join(texts)}",
                where=PROMPTS,
                fix="take FastChat's own file",
            ) from error


@dataclass(frozen=True)
class MtBench:
    """The benchmark's files, read."""

    questions: tuple[MtBenchRow, ...]
    references: Mapping[str, Answers]
    """Reference answers by who gave them."""
    prompts: Mapping[str, Prompt]

    def prompt(self, name: str) -> Prompt:
        """Return a judge prompt."""
        if name not in self.prompts:
            raise LlameroError(f"no judge prompt `{name}`", where=PROMPTS, fix=did_you_mean(name, self.prompts))
        return self.prompts[name]

    def reference(self, judge: str) -> tuple[str, Answers]:
        """Return whose reference answers a judge is shown, and these: its own if there are, else those of gpt-4."""
        for name in (judge, "gpt-4", *self.references):
            if name in self.references:
                return name, self.references[name]
        raise LlameroError("there are no reference answers", where=REFERENCES, fix="take FastChat's own files")


def load(directory: Path) -> MtBench:
    """Return the benchmark.

    Args:
        directory: See the head of this module.

    Raises:
        LlameroError: A file is missing, empty or broken.
    """
    inner = _inner(directory)
    prompts = [path for path in (inner / PROMPTS, inner.parent / PROMPTS) if path.is_file()]
    if not prompts:
        raise _missing(inner.parent / PROMPTS)
    questions = [_question(row, where) for row, where in rows(inner / QUESTIONS)]
    references = {path.stem: answers(path) for path in sorted((inner / REFERENCES).glob("*.jsonl"))}
    told = [_prompt(row, where) for row, where in rows(prompts[0])]
    return MtBench(tuple(questions), references, {prompt.name: prompt for prompt in told})


def _inner(directory: Path) -> Path:
    for inner in (directory, directory / "mt_bench", directory / "mt_bench" / "mt_bench"):
        if (inner / QUESTIONS).is_file():
            return inner
    raise _missing(directory / "mt_bench" / QUESTIONS)


def answers(path: Path) -> Answers:
    """Return the answers of one model, of each question its first choice.

    Args:
        path: File in the form of FastChat's `model_answer/` and `reference_answer/`.

    Raises:
        LlameroError: It is missing, empty or broken.
    """
    return dict(_answer(row, where) for row, where in rows(path))


def fetch() -> Path:
    """Return a directory with the files, from the hub or its cache.

    Raises:
        LlameroError: Neither has them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    wanted = [f"data/{PROMPTS}", f"data/mt_bench/{QUESTIONS}", f"data/mt_bench/{REFERENCES}/*"]
    try:
        return Path(snapshot_download(SPACE, repo_type="space", allow_patterns=wanted)) / "data"
    except (HTTPError, OSError) as error:
        raise LlameroError(
            f"neither the hub nor its cache has MT-Bench's files ({type(error).__name__})",
            where=f"spaces/{SPACE}",
            fix="give `data`: a copy of fastchat/llm_judge/data of FastChat's repository",
        ) from error


def rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Return the objects of a file of JSON lines, and where each stands."""
    if not path.is_file():
        raise _missing(path)
    found: list[tuple[dict[str, Any], str]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LlameroError(f"not JSON ({error})", where=where, fix="fetch the file again") from error
        if not isinstance(row, dict):
            raise LlameroError("a JSON object was expected", where=where, fix="fetch the file again")
        found.append((row, where))
    if not found:
        raise LlameroError("nothing in it", where=path, fix="fetch the file again")
    return found


def number(value: object, where: str) -> int:
    """Return the number of a question."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise LlameroError(f"question_id is {value!r}, not a number", where=where, fix="fetch the file again")
    return value


def _question(row: Mapping[str, Any], where: str) -> MtBenchRow:
    turns = _turns(row.get("turns"), where)
    return MtBenchRow(number(row.get("question_id"), where), _text(row, "category", where), turns)


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    keys = ("name", "system_prompt", "prompt_template", "output_format")
    return Prompt(*(_text(row, key, where) for key in keys))


def _answer(row: Mapping[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    choices = row.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise LlameroError("`choices` must hold an answer", where=where, fix="fetch the file again")
    return number(row.get("question_id"), where), _turns(choices[0].get("turns"), where)


def _turns(value: object, where: str) -> tuple[str, ...]:
    if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        raise LlameroError(f"turns is {value!r}, not a list of texts", where=where, fix="fetch the file again")
    return tuple(value)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise LlameroError(f"{key} is {value!r}, not a text", where=where, fix="fetch the file again")
    return value


def _missing(path: Path) -> LlameroError:
    return LlameroError(
        "no such file of MT-Bench", where=path, fix="copy fastchat/llm_judge/data of FastChat's repository there"
    )


def as_row(question: int, model: str, turns: Sequence[str], answer_id: str, when: float) -> dict[str, Any]:
    """Return a line of FastChat's `model_answer/<model>.jsonl`."""
    return {
        "question_id": question,
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": when,
    }
