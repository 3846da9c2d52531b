"""HumanEval: bodies of functions that a model wrote, run against tests (Chen et al. 2021, arXiv:2107.03374).

A prompt is a signature and its docstring as they are; the answer ends where another definition would begin. Prompts,
ends and programs are those of lm-evaluation-harness's task `humaneval`; programs run in `sandbox`, with no network, no
files to write and limits of time and memory, where the harness runs them as they are.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llamero.core import progress
from llamero.core.results import Result
from llamero.corpus import benchmarks
from llamero.corpus.benchmarks import HumanEvalRow
from llamero.evaluate import per_sample, sandbox, tokens
from llamero.evaluate.config import HumanEvalTask
from llamero.evaluate.per_sample import Key, SampleFile
from llamero.evaluate.sandbox import Limits
from llamero.evaluate.subject import Subject, standard_error
from llamero.infer.sampler import Sampling

UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end an answer."""

NAME = "humaneval"
AT_ONCE = 32
"""Problems that are answered, run and written down together: what a killed run loses at most."""
KS = (1, 10, 100)
"""Numbers of tries that are reported, as far as there are so many answers."""

Row = dict[str, Any]


def program(problem: HumanEvalRow, answer: str) -> str:
    """Return what shows whether an answer is right: it runs to its end without an exception."""
    return f"{problem.prompt}{answer}\n{problem.test}\ncheck({problem.entry_point})"


def pass_at(k: int, answers: int, right: int) -> float:
    """Return how probable it is that one of `k` answers is right, of which `right` of `answers` are.

    The unbiased estimate, 1 - C(answers - right, k) / C(answers, k) (section 2.1).
    """
    if not 0 <= right <= answers or not 1 <= k <= answers:
        raise ValueError(f"{right} of {answers} answers are right, {k} are taken")
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def metrics(right: Sequence[int], answers: int) -> dict[str, float]:
    """Return pass@k for all problems and its standard error over them.

    Args:
        right: How many answers to each problem are right.
        answers: To each problem.
    """
    found: dict[str, float] = {}
    for k in KS:
        if k > answers:
            break
        each = [pass_at(k, answers, count) for count in right]
        mean = sum(each) / len(each)
        found[f"pass@{k}"] = mean
        spread = sum((value - mean) ** 2 for value in each)
        error = math.sqrt(spread / (len(each) - 1) / len(each)) if len(each) > 1 else None
        found |= standard_error(f"pass@{k}", error)
    return {**found, "problems": len(right)}


def run(task: HumanEvalTask, subject: Subject) -> list[Result]:
    """Measure how often a model's programs are right."""
    sandbox.refuse_unfenced()
    problems = benchmarks.humaneval(subject.root / task.data)[: task.limit]
    limit = subject.engine.context
    most = min(task.max_new_tokens, limit // 2)
    how = {**task.decides(), "max_new_tokens": most}
    kept = SampleFile(subject.samples)
    kept.begin(NAME, {"model": subject.name, **how, **subject.measured()})
    rows: list[Row] = []
    with progress.Line(f"evaluate {subject.name}", total=len(problems) * task.num_samples, unit="programs") as line:
        for sample in range(task.num_samples):
            for start in range(0, len(problems), AT_ONCE):
                part = dict(enumerate(problems[start : start + AT_ONCE], start))
                there = kept.known(Key(NAME, number, sample) for number in part)
                if there is None:
                    there = _answered(task, subject, part, sample, most)
                    kept.add(there)
                rows += there
                line.advance(len(part))
    right = Counter(row["doc"] for row in rows if row["how"] == "passed")
    found = metrics([right[number] for number in range(len(problems))], task.num_samples)
    drawn = f"{task.num_samples} answers at temperature {task.temperature}, top_p {task.top_p}"
    drawn = "greedy" if task.temperature == 0 else drawn
    protocol = f"0-shot, {drawn}, at most {most} tokens; {task.seconds:g} s and "
    protocol += f"{task.memory_mib} MiB for each program, in a sandbox"
    notes = _notes(rows, task, most)
    return [subject.result(NAME, found, protocol, notes=notes, limit=task.limit, seed=task.seed)]


def _answered(
    task: HumanEvalTask, subject: Subject, problems: Mapping[int, HumanEvalRow], sample: int, most: int
) -> list[Row]:
    """Return the lines of one answer to each of some problems, which ran."""
    tokenizer = subject.tokenizer
    ends = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    sampling = Sampling(
        temperature=task.temperature,
        top_p=task.top_p,
        seed=task.seed + sample,
        max_new_tokens=most,
        stop_ids=ends,
        stop_strings=UNTIL,
    )
    whole = [tokens.text(tokenizer, problem.prompt, bos=tokenizer.add_bos) for problem in problems.values()]
    seen = [ids[-(subject.engine.context - most) :] for ids in whole]
    answers = subject.engine.generate(seen, sampling)
    programs = [program(problem, answer.text) for problem, answer in zip(problems.values(), answers, strict=True)]
    outcomes = sandbox.run_all(programs, Limits(task.seconds, task.memory_mib))
    return [
        {
            **Key(NAME, number, sample)._asdict(),
            "prompt": per_sample.prompt_digest(ids),
            "context_tokens": len(ids),
            "tokens": list(answer.ids),
            "log_likelihood": None,
            "greedy": task.temperature == 0,
            "text": answer.text,
            "truncated": len(before) - len(ids),
            "finish": answer.finish,
            "how": outcome.how,
            "said": outcome.said,
            "scores": {"pass": float(outcome.passed)},
        }
        for number, before, ids, answer, outcome in zip(problems, whole, seen, answers, outcomes, strict=True)
    ]


def _notes(rows: Sequence[Row], task: HumanEvalTask, most: int) -> list[str]:
    """Return what the reader must know."""
    counts = Counter(row["how"] for row in rows)
    said = {
        "denied": "tried what the sandbox does not permit",
        "timeout": "were stopped for their time",
        "memory": "wanted more memory",
        "ended": "ended themselves before their end",
        "crashed": "crashed",
    }
    notes = [f"{NAME}: {counts[how]} of {len(rows)} programs {what}" for how, what in said.items() if counts[how]]
    if most < task.max_new_tokens:
        notes.append(f"{NAME}: answers have {most} tokens at most, half of the context, not {task.max_new_tokens}")
    long = sum(row["finish"] == "length" for row in rows)
    if long:
        notes.append(f"{NAME}: {long} of {len(rows)} answers were cut off at {most} tokens")
    lost = sum(row["truncated"] > 0 for row in rows)
    if lost:
        notes.append(f"{NAME}: {lost} of {len(rows)} prompts lost their beginning, as they would not fit the context")
    return notes
