"""evaluate: a model directory and a task in, results out."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamero.core import world as environment
from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.corpus import toy_world
from llamero.corpus.dataset import Dataset
from llamero.evaluate import ask, humaneval, lm_eval_run, needle, sampling, wikitext
from llamero.evaluate.config import (
    OWN_ENGINE,
    EvaluateConfig,
    H4Task,
    HumanEvalTask,
    LmEvalTask,
    MtBenchTask,
    NeedleTask,
    PerplexityTask,
    SamplesTask,
    SamplingTask,
    ToyWorldTask,
    WikitextTask,
)
from llamero.evaluate.judge import file_name
from llamero.evaluate.mt_bench_answers import Speaker
from llamero.evaluate.mt_bench_run import Bench
from llamero.evaluate.subject import Subject, standard_error
from llamero.infer import choices, score, texts
from llamero.infer.backends.completions import CompletionsEngine
from llamero.infer.backends.openai import Client, Endpoint
from llamero.infer.backends.vllm import VllmEngine
from llamero.infer.chat import Chat
from llamero.infer.context import check_tokenizer, context_length
from llamero.infer.engine import Engine, OwnEngine
from llamero.infer.sampler import Sampling
from llamero.infer.score import KL_PROTOCOL
from llamero.infer.texts import Text
from llamero.model.load import load_config, load_model
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World, device
from llamero.text.tokenizer import Tokenizer, load_tokenizer


def run(
    task: EvaluateConfig,
    *,
    model: Path,
    name: str,
    template: str,
    root: Path,
    reference: Path | None = None,
    mixtures: Mapping[str, Path] | None = None,
    work: Path | None = None,
) -> list[Result]:
    """Measure one model by one task.

    Args:
        task: What to measure and how.
        model: Directory of the model.
        name: What the release calls it.
        template: Chat template of its prompts.
        root: Directory that the task's paths start from.
        reference: The unquantized model, to measure agreement with.
        mixtures: Tokenized mixtures by name, for tasks that read their validation documents.
        work: Directory for files of the measurement: a run that was cut off finds there what it had, and goes on.
    """
    world = _world.get()
    shared = world is not None and world.size > 1 and type(task) in SHARED
    if world is not None and world.rank and not shared:
        return []
    if isinstance(task, MtBenchTask):
        Bench(task, root, work)  # what is missing is said before hours of answers
    tokenizer = load_tokenizer(model)
    kept = None if work is None else work / "scores"
    if isinstance(task, H4Task) and task.engine != OWN_ENGINE:
        engine = _other_engine(task, model, name, tokenizer)
    else:
        loaded = load_model(model, dtype=getattr(torch, task.dtype), device=device(ParallelConfig()))
        check_tokenizer(loaded, tokenizer, where=model)
        engine = OwnEngine(loaded, tokenizer, kept=kept, others=world if shared else None)
    subject = Subject(name, engine, tokenizer, template, root, reference, mixtures or {}, model, work)
    with torch.inference_mode():
        results = TASKS[type(task)](task, subject)
    if kept is not None and environment.rank() == 0:
        shutil.rmtree(kept, ignore_errors=True)  # all of it is in the results
    return results


def _other_engine(task: H4Task, model: Path, name: str, tokenizer: Tokenizer) -> Engine:
    config = load_config(model)
    if environment.size() > 1:
        raise LlameroError("several processes share our own engine only", fix="start one process")
    if task.engine == "vllm":
        return VllmEngine(model, config, tokenizer, dtype=task.dtype)
    client = Client(Endpoint(task.engine, name))
    return CompletionsEngine(client, tokenizer, context=context_length(config))


LONGEST = 24 * 3600
"""Seconds that a process may keep the others waiting: longer than what it scores, or measures alone, of a task."""

_world: ContextVar[World | None] = ContextVar("world", default=None)


@contextmanager
def together() -> Iterator[World]:
    """Let the processes that were started share what `run` does meanwhile; each has the whole model.

    Of tasks that cannot be shared the first process does all, and the others have no results.
    """
    world = World(ParallelConfig(gpus=environment.size()), longest=LONGEST)
    token = _world.set(world)
    try:
        yield world
        world.barrier()
    finally:
        _world.reset(token)


def _toy_world(task: ToyWorldTask, subject: Subject) -> list[Result]:
    questions = toy_world.questions(toy_world.world(task.seed), per_category=task.per_category)
    requests = [
        choices.chat_answer(question.question, option, subject.template, subject.tokenizer)
        for question in questions
        for option in question.options
    ]
    scored = [s.log_likelihood for s in subject.engine.score(requests)]
    items = [choices.Item(q.options, q.answer, q.category) for q in questions]
    per_question = [scored[i * 4 : i * 4 + 4] for i in range(len(questions))]
    measured = choices.accuracy(items, per_question)
    metrics = {"accuracy": measured.acc.value, **standard_error("accuracy", measured.acc.standard_error)}
    metrics |= {f"accuracy/{category}": mean.value for category, mean in measured.by_category.items()}
    protocol = f"{len(questions)} held-out questions, summed log-likelihood of 4 answers, template {subject.template}"
    return [subject.result("toy_world", metrics, protocol, seed=task.seed)]


def _perplexity(task: PerplexityTask, subject: Subject) -> list[Result]:
    other = None if subject.reference is None else load_model(subject.reference, dtype=torch.float32)
    results: list[Result] = []
    for text in _texts(task, subject):
        found = score.perplexity(subject.model, text.ids, text.windows)
        metrics = {"perplexity": found.value, "tokens": found.tokens}
        results.append(subject.result("perplexity", metrics, text.protocol, notes=text.notes, text=text.name))
        if other is not None:
            agreement = score.compare(other, subject.model, text.ids, text.windows)
            metrics = {"kl": agreement.kl, "top1": agreement.top1, "tokens": agreement.tokens}
            protocol = f"{KL_PROTOCOL}, {text.protocol}"
            results.append(subject.result("agreement", metrics, protocol, text=text.name))
    return results


def _texts(task: PerplexityTask, subject: Subject) -> Iterator[Text]:
    for name, path in task.texts.items():
        how = {"window": task.window, "tokens": task.tokens}
        if task.protocol == "llama.cpp":
            yield texts.of_chunks(name, subject.root / path, subject.tokenizer, **how)
        else:
            yield texts.of_file(name, subject.root / path, subject.tokenizer, stride=task.stride, **how)
    for name in task.validation:
        documents = [d.tolist() for d in Dataset(subject.mixtures[name]).tokens("val")]
        if not documents:
            raise LlameroError(f"mixture `{name}` has no validation documents", fix="give a source `val_split`")
        yield texts.of_documents(f"{name}, validation", documents)


def _wikitext(task: WikitextTask, subject: Subject) -> list[Result]:
    begins = wikitext.beginning(subject.tokenizer, task.compat)
    longest = task.max_length or subject.model.config.max_position_embeddings
    results: list[Result] = []
    for name, path in task.texts.items():
        pages = wikitext.pages(subject.root / path)[: task.limit]
        written = [wikitext.detokenized(page) for page in pages]
        ids = [[*begins.scored, *subject.tokenizer.encode(page)] for page in written]
        windows = [window for page in ids for window in wikitext.rolling(page, begins.prefix, longest)]
        scored = subject.engine.score(windows, max_length=longest)
        found = wikitext.PerWord(
            log_likelihood=sum(each.log_likelihood for each in scored),
            words=sum(map(wikitext.words, pages)),
            bytes=sum(len(page.encode()) for page in pages),
            tokens=sum(map(len, ids)),
        )
        protocol = f"{len(pages)} pages, each by itself, detokenized, windows of {longest}, {begins.words}"
        protocol = f"lm-eval's wikitext ({task.compat}): {protocol}"
        results.append(subject.result("wikitext", found.metrics, protocol, text=name, limit=task.limit))
    return results


def _samples(task: SamplesTask, subject: Subject) -> list[Result]:
    greedy = Sampling(temperature=0, max_new_tokens=task.max_new_tokens)
    said = []
    for prompt in task.prompts:
        pieces = Chat(subject.model, subject.tokenizer, template=subject.template).answer(prompt, greedy)
        said.append({"prompt": prompt, "answer": "".join(pieces).strip()})
    result = subject.result("samples", {}, f"greedy, at most {task.max_new_tokens} tokens")
    return [replace(result, samples=tuple(said))]


def _mt_bench(task: MtBenchTask, subject: Subject) -> list[Result]:
    speaker = Speaker(file_name(subject.name), subject.model, subject.tokenizer, subject.template)
    bench = Bench(task, subject.root, subject.work)
    found = bench.measure(speaker, directory=subject.directory)
    name = "mt_bench" if task.judge_mode == "single" else "mt_bench_pairs"
    return [subject.result(name, found.metrics, found.protocol, notes=found.notes, **found.inputs)]


TASKS: dict[type[Any], Callable[[Any, Subject], list[Result]]] = {
    ToyWorldTask: _toy_world,
    PerplexityTask: _perplexity,
    WikitextTask: _wikitext,
    H4Task: ask.run,
    LmEvalTask: lm_eval_run.run,
    SamplesTask: _samples,
    SamplingTask: sampling.run,
    HumanEvalTask: humaneval.run,
    MtBenchTask: _mt_bench,
    NeedleTask: needle.run,
}
"""Every task there is. To add one: see `EvaluateConfig` in evaluate/config.py."""

SHARED = frozenset({ToyWorldTask, WikitextTask, H4Task})
"""Tasks that several processes can share: all that their models do is to score requests."""
