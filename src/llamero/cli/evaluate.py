"""The command that measures a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from llamero.cli.display import Bars, out, say_results
from llamero.cli.options import OutDir, import_uninterrupted
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import Token

    from llamero.evaluate.config import EvaluateConfig

HUB = "hub"
SHOWN = 60
"""Characters of a differing value that are printed."""


def _whole(type_: object, tokens: Sequence[Token]) -> int:
    """Return a count; a part of something is refused instead of rounded."""
    given = tokens[0].value
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"`{given}` is not a whole number: it counts questions of each task, it is no share") from None


def evaluate(
    model: Annotated[
        str | None,
        Parameter(help="Model directory, GGUF file, or owner/name[:revision] of the hub; not read for --requests."),
    ] = None,
    *,
    tasks: str | None = None,
    compat: Literal["leaderboard-2023", "lm-eval"] | None = None,
    data: str | None = None,
    requests: Path | None = None,
    diff: Annotated[tuple[Path, Path] | None, Parameter(negative=())] = None,
    tolerance: float | None = None,
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=False, negative=())] = (),
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    prompts: str | None = None,
    config: str | None = None,
    replay: str | None = None,
    mode: Literal["auto", "legacy", "v2", "v2_5", "v3", "chatml", "template"] | None = None,
    num_samples: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    haystack: Path | None = None,
    to: int | None = None,
    freely: Annotated[bool | None, Parameter(negative=())] = None,
    report: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative=())] = (),
    html: Path | None = None,
    limit: Annotated[int | None, Parameter(converter=_whole)] = None,
    subjects: int | None = None,
    truthfulqa: Literal["2021", "later"] | None = None,
    protocol: Literal["window", "llama.cpp"] | None = None,
    window: int | None = None,
    stride: int | None = None,
    shots: int | None = None,
    chat: Annotated[bool, Parameter(negative=())] = False,
    system: str | None = None,
    include: Path | None = None,
    template: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    softmax_dtype: Literal["float32", "model"] | None = None,
    engine: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_template: str | None = None,
    judge_key_variable: str | None = None,
    votes: int | None = None,
    judge_mode: Literal["single", "pairwise-baseline", "pairwise-all"] | None = None,
    answers: Path | None = None,
    baseline: str | None = None,
    max_new_tokens: int | None = None,
    mt_bench_replies: Path | None = None,
    out_dir: OutDir = None,
    json: Path | None = None,
) -> None:
    """Measure a model.

    Parameters
    ----------
    tasks
        What to measure, with commas between: h4, openllm, arc_challenge, hellaswag, mmlu, truthfulqa_mc, winogrande,
        gsm8k, a subject of MMLU (hendrycksTest-anatomy), perplexity, wikitext, mt_bench, samples,
        sampling, humaneval, needle, toy_world.
    compat
        Whose prompts, few-shot draws, BOS rule and averages (h4 and its parts): those of the scores published in
        2023 by default, or those of today's lm-eval.
    data
        Directory of the benchmark files (for h4 and its parts, humaneval, mt_bench), or `hub`: fetched once, then kept
        in its cache (h4 and its parts, mt_bench).
    requests
        Write the requests of the tasks to this file, as JSON lines, and end: no model is read.
    diff
        Compare two runs sample by sample, given the directories of --out or their files: which samples differ, in
        what, and what that does to the scores. Exit code 1 if any does.
    tolerance
        Nats that a log-likelihood may differ by in --diff, 0.001 by default.
    text
        Text file to measure perplexity on (perplexity, wikitext); may be given several times.
    prompt
        What to say to the model (samples); may be given several times.
    prompts
        File of prompts, a JSON string on each line (sampling).
    config
        File of configurations (sampling).
    replay
        Published report whose prompts and configurations are sampled again; --config then gives what stands around a
        prompt (sampling).
    mode
        How prompts are written (sampling): with the model's chat template where there is one, else `legacy`.
    num_samples
        Outputs of each prompt and configuration that draws, 2 by default (sampling); answers to each problem, 1 by
        default (humaneval).
    temperature
        Of the draws, greedy by default (humaneval).
    seed
        Of all draws (sampling, humaneval, mt_bench).
    haystack
        Text file, or directory of .txt files (needle).
    to
        Tokens of the longest haystack (needle).
    freely
        Let the model answer freely too (needle).
    report
        Sampling reports to show side by side on one page (--html FILE); no model is read.
    html
        Where that page is written to.
    limit
        Questions of each task; pages of wikitext, prompts of sampling, problems of humaneval.
    subjects
        MMLU subjects to take, the first ones by name.
    truthfulqa
        Edition of TruthfulQA: by default 2021, which the published scores used, or for lm-eval the later one.
    protocol
        How perplexity is measured: a window that slides, or llama.cpp's chunks.
    window
        Tokens of a perplexity window, 512 by default.
    stride
        Tokens between windows, 256 by default.
    shots
        Examples before each question (lm-eval: tasks); by default as each task says.
    chat
        Ask in the chat template (lm-eval: tasks).
    system
        System message, with --chat (lm-eval: tasks).
    include
        Directory with more tasks in lm-eval's YAML.
    template
        Chat template of prompts (toy_world, mt_bench, samples, --chat): the model's own by default.
    dtype
        Dtype of the weights, float32 by default.
    softmax_dtype
        Dtype of log-probabilities, float32 by default; both harnesses compute them in that of the weights (`model`).
    engine
        Who runs the model (h4 and its parts): llamero, vllm, or http://HOST:PORT/v1 of an OpenAI-compatible server that
        echoes log-probabilities and knows the model as MODEL.
    judge
        Who judges (mt_bench): the address of a server with OpenAI's interface (http://HOST:PORT/v1), the name of a
        model of OpenAI (gpt-4 by default), or a model to run here (directory or owner/name of the hub).
    judge_model
        What the judge is called on its server.
    judge_template
        Chat template of a judge that runs here; its own by default.
    judge_key_variable
        Environment variable that holds the judge's API key; OPENAI_API_KEY by default.
    votes
        Judgments of each answer (mt_bench), 1 by default; with several, their spread is reported.
    judge_mode
        Rate each answer of mt_bench by itself (single, the default), or compare it with the baseline's, or all models
        with each other; always in both orders.
    answers
        Answers of other models to compare with (mt_bench): FastChat's model_answer directory, or a file of it.
    baseline
        Which of them pairwise-baseline compares with; gpt-3.5-turbo by default.
    max_new_tokens
        Longest answer: 1024 by default for mt_bench, 128 for samples.
    mt_bench_replies
        Recompute MT-Bench's scores from a judge's recorded replies, print them as JSON, and end: FastEval's report of
        a model (the directory of its judge-replies.json) or FastChat's model_judgment file; no model is read.
    out_dir
        Directory that gets every sample, one JSON line each (h4 and its parts: samples.jsonl) or FastChat's files
        (mt_bench; ./mt_bench by default) or the report (sampling; here by default); run again to go on where it
        stopped.
    json
        Also write the results to this file.
    """
    from llamero.evaluate.config import several

    if report or html is not None:
        _write_page(report, html)
        return
    if diff is not None:
        _compare(*diff, tolerance)
        return
    if mt_bench_replies is not None:
        _recompute(mt_bench_replies, data)
        return
    if tasks is None:
        raise LlameroError("what is to be measured?", fix="give --tasks, for example --tasks h4 --data DIR")
    given: dict[str, object] = {
        "compat": compat,
        "data": data if data is None or data == HUB else str(Path(data).resolve()),
        "texts": {path.name: str(path.resolve()) for path in text} or None,
        "prompts": prompts or list(prompt) or None,
        "config": config,
        "replay": replay,
        "mode": mode,
        "num_samples": num_samples,
        "temperature": temperature,
        "haystack": None if haystack is None else str(haystack),
        "to": to,
        "freely": freely,
        "seed": seed,
        "limit": limit,
        "subjects": subjects,
        "truthfulqa": truthfulqa,
        "protocol": protocol,
        "window": window,
        "stride": stride,
        "shots": shots,
        "chat": chat or None,
        "system": system,
        "include": None if include is None else str(include.resolve()),
        "dtype": dtype,
        "softmax_dtype": softmax_dtype,
        "engine": engine,
        "judge": judge if judge is None or not Path(judge).exists() else str(Path(judge).resolve()),
        "judge_model": judge_model,
        "judge_template": judge_template,
        "judge_key_variable": judge_key_variable,
        "votes": votes,
        "judge_mode": judge_mode,
        "answers": None if answers is None else str(answers.resolve()),
        "baseline": baseline,
        "max_new_tokens": max_new_tokens,
        "unanswered": "count" if "mt_bench" in map(str.strip, tasks.split(",")) else None,
    }
    wanted = several(tasks, {key: value for key, value in given.items() if value is not None})
    if requests is not None:
        _write_requests(requests, wanted)
        return
    if model is None:
        raise LlameroError("which model?", fix="give a directory, a GGUF file or owner/name of the hub")
    _measure(model, wanted, template, work=out_dir, json=json)


def _write_page(reports: Sequence[Path], to: Path | None) -> None:
    """Show reports side by side."""
    from llamero.evaluate import sampling_page

    if to is None:
        raise LlameroError("where is the page to go?", fix="give --html FILE")
    prompts = sampling_page.write(reports, to)
    out.print(f"{len(reports)} reports, {prompts} prompts: open {to} in a browser", highlight=False, soft_wrap=True)


def _compare(a: Path, b: Path, tolerance: float | None) -> None:
    """Say how two runs differ; exit code 1 if they do."""
    from llamero.evaluate import diff

    found = diff.compare(a, b, tolerance=diff.TOLERANCE if tolerance is None else tolerance)
    for name, one, other in found.settings:
        out.print(f"{name}: {one} | {other}", highlight=False, soft_wrap=True, markup=False)
    table = Table("task", "samples", "only in A", "only in B", "other prompt", "other value", "largest Δ")
    for task in found.tasks:
        counts = (task.both, task.only_a, task.only_b, task.prompts, task.values)
        table.add_row(task.task, *map(str, counts), f"{task.largest:.2g}")
    out.print(table)
    for task in found.tasks:
        for e in task.effects:
            text = f"{task.task}, {e.metric}: {e.a:.4f} → {e.b:.4f} ({e.changed} of {e.documents} documents changed)"
            out.print(text, highlight=False, soft_wrap=True, markup=False)
    for task in found.tasks:
        for sample in task.first:
            place = f"{task.task}, document {sample.key.doc}, choice {sample.key.choice}"
            text = f"{place}: {sample.what} {_short(sample.a)} | {_short(sample.b)}"
            out.print(text, highlight=False, soft_wrap=True, markup=False)
    out.print("they differ" if found.differs else "the same, sample by sample", highlight=False)
    if found.differs:
        sys.exit(1)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _recompute(replies: Path, data: str | None) -> None:
    """Print the scores that a judge's replies come to."""
    import json

    from llamero.evaluate.recorded import recomputed

    found = recomputed(replies, None if data is None else Path(data))
    out.print(json.dumps(found, indent=4), markup=False, highlight=False, soft_wrap=True)


def _write_requests(path: Path, wanted: Sequence[EvaluateConfig]) -> None:
    """Write down what would be asked."""
    from llamero.evaluate import requests
    from llamero.evaluate.config import H4Task

    asked = []
    for task in wanted:
        if not isinstance(task, H4Task):
            raise LlameroError(
                f"`{task.tasks}` has no list of requests", fix="--requests is for h4 and its parts: --tasks h4"
            )
        asked += requests.of(task, Path())
    count = requests.write(path, asked)
    out.print(f"{count} requests of {len(asked)} tasks written to {path}", highlight=False, soft_wrap=True)


def _measure(
    model: str, wanted: Sequence[EvaluateConfig], template: str, *, work: Path | None, json: Path | None
) -> None:
    from llamero.core.download import resolve_model
    from llamero.core.results import write_file

    directory = resolve_model(model)
    if json is not None and not json.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=json.parent)
    import_uninterrupted("llamero.evaluate.run")
    from llamero.evaluate.run import run as measure
    from llamero.evaluate.run import together

    how = {"model": directory, "name": model, "template": template, "root": Path(), "work": work}
    with Bars(), together() as world:
        found = [result for task in wanted for result in measure(task, **how)]
    if not world.speaks:
        return
    say_results(found)
    for result in found:
        if "report" in result.inputs:
            where = (work or Path()) / result.inputs["report"]
            out.print(f"report: {where}", highlight=False, soft_wrap=True)
    if json is not None:
        write_file(json, found)
