"""Benchmark files on disk, as published: one frozen row per question.

    directory/arc_challenge/{test,train}.jsonl
              hellaswag/*val*.jsonl, and *train*.jsonl where there is one
              mmlu/{dev,test}/<subject>_{dev,test}.csv     question, four choices, letter; no header
              truthfulqa/mc_task_2021.json, mc_task.json   (the later edition)
              mt_bench/mt_bench/question.jsonl, or mt_bench/question.jsonl
              gsm8k/test.jsonl, and train.jsonl where there is one
              humaneval/HumanEval.jsonl.gz, or HumanEval.jsonl
              winogrande/dev.jsonl, and train*.jsonl where there is one

Rows hold the text as published; how a question is asked is the business of whoever asks it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")

TruthfulQaEdition = Literal["2021", "later"]
"""The published scores of 2023 were made with the 2021 edition; hubs serve the later one."""

TRUTHFULQA_FILES: dict[str, str] = {"2021": "mc_task_2021.json", "later": "mc_task.json"}

_ARC_KEYS = {key: i % 5 for i, key in enumerate("ABCDE12345")}
_MMLU_COLUMNS = 6  # question, four choices, letter


@dataclass(frozen=True)
class ArcRow:
    """One ARC question; `answer` is an index into `choices`."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class HellaSwagRow:
    """One HellaSwag context with its four endings; `answer` is an index into `endings`."""

    id: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MmluRow:
    """One MMLU question of `subject` (spelled with underscores); `answer` is an index into `choices`."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TruthfulQaRow:
    """One TruthfulQA question; labels are 1 for a true answer and 0 for a false one.

    `mc1` has one true answer and holds it first. `mc2` starts with a true answer and has a false one.
    """

    question: str
    mc1_choices: tuple[str, ...]
    mc1_labels: tuple[int, ...]
    mc2_choices: tuple[str, ...]
    mc2_labels: tuple[int, ...]


@dataclass(frozen=True)
class MtBenchRow:
    """One MT-Bench dialogue: what the user says, turn by turn."""

    id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Gsm8kRow:
    """One GSM8K problem with its worked solution, which ends in `#### ` and the number."""

    question: str
    answer: str


@dataclass(frozen=True)
class HumanEvalRow:
    """One HumanEval problem: signature and docstring (`prompt`), the body that solves it, and what checks one."""

    id: str
    prompt: str
    solution: str
    test: str
    """Source of a function `check` of the function to be checked."""
    entry_point: str
    """Name of that function."""


@dataclass(frozen=True)
class WinoGrandeRow:
    """One WinoGrande sentence with a blank (`_`); `answer` is an index into `options`."""

    id: str
    sentence: str
    options: tuple[str, str]
    answer: int


def arc_challenge(directory: Path, split: Literal["test", "train"]) -> list[ArcRow]:
    """Return the ARC-Challenge questions of one split, in file order."""
    return _json_lines(directory / "arc_challenge" / f"{split}.jsonl", _arc_row)


def hellaswag_validation(directory: Path) -> list[HellaSwagRow]:
    """Return the HellaSwag validation rows, in file order."""
    path = _only_file(directory / "hellaswag", "*val*.jsonl")
    if path is None:
        raise _missing(directory / "hellaswag" / "hellaswag_val.jsonl")
    return _json_lines(path, _hellaswag_row)


def hellaswag_train(directory: Path) -> list[HellaSwagRow] | None:
    """Return the HellaSwag training rows in file order, or None where there is no training file."""
    path = _only_file(directory / "hellaswag", "*train*.jsonl")
    return None if path is None else _json_lines(path, _hellaswag_row)


def mmlu_subjects(directory: Path) -> list[str]:
    """Return the subjects that have a test file, in alphabetical order."""
    folder = directory / "mmlu" / "test"
    names = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("*_test.csv"))
    if not names:
        raise _missing(folder / "<subject>_test.csv")
    return names


def mmlu(directory: Path, subject: str, split: Literal["dev", "test"]) -> list[MmluRow]:
    r"""Return the rows of one subject in file order; a ``\r`` inside a quoted field stays."""
    path = _existing(directory / "mmlu" / split / f"{subject}_{split}.csv")
    rows: list[MmluRow] = []
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                rows.append(_mmlu_row(subject, cells, f"{path}:{reader.line_num}"))
        except (csv.Error, UnicodeDecodeError) as error:
            problem = f"not a CSV file in UTF-8 ({error})"
            raise LlameroError(problem, where=f"{path}:{reader.line_num + 1}", fix="fetch it again") from error
    return _filled(rows, path)


def truthfulqa(directory: Path, edition: TruthfulQaEdition) -> list[TruthfulQaRow]:
    """Return the TruthfulQA questions of one edition, in file order."""
    if edition not in get_args(TruthfulQaEdition):
        raise LlameroError(
            f"unknown TruthfulQA edition `{edition}`", fix=did_you_mean(edition, get_args(TruthfulQaEdition))
        )
    path = _existing(directory / "truthfulqa" / TRUTHFULQA_FILES[edition])
    return _filled([_truthfulqa_row(row, where) for row, where in _json_array(path)], path)


def mt_bench(directory: Path) -> list[MtBenchRow]:
    """Return the MT-Bench questions, in file order."""
    inner = directory / "mt_bench" / "mt_bench" / "question.jsonl"  # as in FastChat's own folder
    return _json_lines(inner if inner.is_file() else directory / "mt_bench" / "question.jsonl", _mt_bench_row)


def gsm8k(directory: Path) -> list[Gsm8kRow]:
    """Return the GSM8K test problems, in file order."""
    return _json_lines(directory / "gsm8k" / "test.jsonl", _gsm8k_row)


def gsm8k_train(directory: Path) -> list[Gsm8kRow] | None:
    """Return the GSM8K training problems in file order, or None where there is no such file."""
    path = directory / "gsm8k" / "train.jsonl"
    return _json_lines(path, _gsm8k_row) if path.is_file() else None


def humaneval(directory: Path) -> list[HumanEvalRow]:
    """Return the HumanEval problems, in file order."""
    plain = directory / "humaneval" / "HumanEval.jsonl"
    return _json_lines(plain if plain.is_file() else plain.with_suffix(".jsonl.gz"), _humaneval_row)


def winogrande(directory: Path) -> list[WinoGrandeRow]:
    """Return the WinoGrande validation sentences, in file order; the test labels are not public."""
    return _json_lines(directory / "winogrande" / "dev.jsonl", _winogrande_row)


def winogrande_train(directory: Path) -> list[WinoGrandeRow] | None:
    """Return the WinoGrande training sentences in file order, or None where there is no training file."""
    path = _only_file(directory / "winogrande", "train*.jsonl")
    return None if path is None else _json_lines(path, _winogrande_row)


def _arc_row(row: dict[str, Any], where: str) -> ArcRow:
    choices = _object(row, "choices", where)
    texts = _strings(choices, "text", where)
    labels = _strings(choices, "label", where)
    key = _string(row, "answerKey", where)
    position = _ARC_KEYS.get(key)
    if position is None or position >= len(texts):
        raise LlameroError(
            f"answerKey is {key!r}, the {len(texts)} choices are labelled {', '.join(labels)}",
            where=where,
            fix="give the letter A to E (or the number 1 to 5) of one of the choices",
        )
    return ArcRow(_string(row, "id", where), _string(row, "question", where), texts, position)


def _hellaswag_row(row: dict[str, Any], where: str) -> HellaSwagRow:
    endings = _strings(row, "endings", where)
    label = str(_value(row, "label", where))  # hubs serve it as a string
    if not re.fullmatch(r"\d", label) or int(label) >= len(endings):
        raise LlameroError(
            f"label is {label!r}, there are {len(endings)} endings",
            where=where,
            fix=f"give a number from 0 to {len(endings) - 1}; the test split has no labels, use validation",
        )
    number = _value(row, "ind", where)
    if not isinstance(number, int):
        raise LlameroError(f"ind is {number!r}, not a number", where=where, fix="fetch the file again")
    text = {key: _string(row, key, where) for key in ("activity_label", "ctx_a", "ctx_b")}
    return HellaSwagRow(number, endings=endings, answer=int(label), **text)


def _mmlu_row(subject: str, cells: Sequence[str], where: str) -> MmluRow:
    if len(cells) != _MMLU_COLUMNS:
        raise LlameroError(
            f"{len(cells)} columns, not {_MMLU_COLUMNS}",
            where=where,
            fix="a row is question, four choices, letter; there is no header line",
        )
    question, *choices, letter = cells
    if letter not in {"A", "B", "C", "D"}:
        raise LlameroError(f"answer is {letter!r}", where=where, fix="give one of A, B, C, D")
    return MmluRow(subject, question, tuple(choices), "ABCD".index(letter))


def _truthfulqa_row(row: dict[str, Any], where: str) -> TruthfulQaRow:
    one, many = _targets(row, "mc1_targets", where), _targets(row, "mc2_targets", where)
    labels = tuple(one.values())
    if labels[:1] != (1,) or sum(labels) != 1:
        raise LlameroError(
            f"mc1_targets has labels {list(labels)}",
            where=where,
            fix="the true answer comes first and is the only one",
        )
    if 0 not in many.values() or next(iter(many.values())) != 1:
        raise LlameroError(
            f"mc2_targets has labels {list(many.values())}",
            where=where,
            fix="it starts with a true answer (1) and needs a false one (0)",
        )
    return TruthfulQaRow(_string(row, "question", where), tuple(one), labels, tuple(many), tuple(many.values()))


def _mt_bench_row(row: dict[str, Any], where: str) -> MtBenchRow:
    number = _value(row, "question_id", where)
    if not isinstance(number, int):
        raise LlameroError(f"question_id is {number!r}, not a number", where=where, fix="fetch the file again")
    return MtBenchRow(number, _string(row, "category", where), _strings(row, "turns", where))


def _gsm8k_row(row: dict[str, Any], where: str) -> Gsm8kRow:
    answer = _string(row, "answer", where)
    if "\n#### " not in answer:
        raise LlameroError(f"answer is {answer!r}", where=where, fix="its last line is `#### ` and the number")
    return Gsm8kRow(_string(row, "question", where), answer)


def _humaneval_row(row: dict[str, Any], where: str) -> HumanEvalRow:
    keys = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return HumanEvalRow(*(_string(row, key, where) for key in keys))


def _winogrande_row(row: dict[str, Any], where: str) -> WinoGrandeRow:
    sentence, answer = _string(row, "sentence", where), _string(row, "answer", where)
    if "_" not in sentence:
        raise LlameroError(f"sentence is {sentence!r}", where=where, fix="it needs a blank, `_`")
    if answer not in {"1", "2"}:
        raise LlameroError(f"answer is {answer!r}", where=where, fix="give 1 or 2; the test split has none, use dev")
    options = (_string(row, "option1", where), _string(row, "option2", where))
    return WinoGrandeRow(_string(row, "qID", where), sentence, options, int(answer) - 1)


def _targets(row: dict[str, Any], key: str, where: str) -> dict[str, int]:
    targets = _object(row, key, where)
    for answer, label in targets.items():
        if label not in (0, 1):
            raise LlameroError(
                f"{key}: {answer!r} has the label {label!r}", where=where, fix="give 1 for true, 0 for false"
            )
    return targets


def _value(row: dict[str, Any], key: str, where: str) -> object:
    if key not in row:
        fix = f"it has {', '.join(row)}; fetch the file again"
        raise LlameroError(f"no `{key}`", where=where, fix=fix)
    return row[key]


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise LlameroError(f"{key} is {value!r}, not a string", where=where, fix="fetch the file again")
    return value


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = _value(row, key, where)
    if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        raise LlameroError(f"{key} is {value!r}, not a list of strings", where=where, fix="fetch the file again")
    return tuple(value)


def _object(row: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = _value(row, key, where)
    if not isinstance(value, dict):
        raise LlameroError(f"{key} is {value!r}, not an object", where=where, fix="fetch the file again")
    return value


def _json_lines(path: Path, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    rows: list[T] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            row, _ = _decode(line, 0, f"{path}:{number}")
            rows.append(parse(row, f"{path}:{number}"))
    return _filled(rows, path)


def _json_array(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a JSON array, each with the file and line it starts at."""
    text = _text(path)
    start = re.match(r"\s*\[\s*", text)
    if start is None:
        raise LlameroError("not a JSON array", where=f"{path}:1", fix="fetch the file again")
    at = start.end()
    while not text.startswith("]", at):
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        row, at = _decode(text, at, where)
        yield row, where
        gap = re.compile(r"\s*,\s*|\s*(?=\])").match(text, at)
        if gap is None:
            line = text.count("\n", 0, at) + 1
            raise LlameroError("the JSON array is cut off", where=f"{path}:{line}", fix="fetch the file again")
        at = gap.end()


def _decode(text: str, at: int, where: str) -> tuple[dict[str, Any], int]:
    try:
        row, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise LlameroError(f"not JSON ({error.msg})", where=where, fix="fetch the file again") from error
    if not isinstance(row, dict):
        raise LlameroError(f"a JSON object was expected, not {row!r}", where=where, fix="fetch the file again")
    return row, end


def _text(path: Path) -> str:
    try:
        data = _existing(path).read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LlameroError(f"broken gzip: {error}", where=path, fix="fetch the file again") from error
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start})"
        raise LlameroError(problem, where=path, fix="fetch the file again") from error


def _filled(rows: list[T], path: Path) -> list[T]:
    if not rows:
        raise LlameroError("no questions in it", where=path, fix="fetch the file again")
    return rows


def _only_file(folder: Path, pattern: str) -> Path | None:
    paths = sorted(folder.glob(pattern))
    if len(paths) > 1:
        raise LlameroError(
            f"more than one {pattern}: {', '.join(path.name for path in paths)}",
            where=folder,
            fix="keep the one to use",
        )
    return paths[0] if paths else None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise _missing(path)
    return path


def _missing(path: Path) -> LlameroError:
    return LlameroError(
        "no such benchmark file",
        where=path,
        fix="put it there, or name the folder that holds arc_challenge/, hellaswag/, mmlu/, truthfulqa/ and so on",
    )
