"""A sampling report: what a model says to many prompts, sampled in several ways, in OpenAssistant's layout.

All continuations are computed together. Each draws with a seed of its own, so that no text depends on what was computed
beside it, nor on whether a run was cut off and went on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from llamero.core import files, progress
from llamero.core.errors import LlameroError, did_you_mean
from llamero.core.journal import Journal
from llamero.corpus import sampling_reports
from llamero.corpus.sampling_reports import Asked, Configuration, Outputs, Report
from llamero.infer.beams import beam_search
from llamero.infer.context import context_length, device_of
from llamero.infer.finished import fingerprint
from llamero.infer.generate import Request, events
from llamero.infer.sampler import Sampling
from llamero.text.messages import Message
from llamero.text.render import generation_config, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from llamero.core.results import Result
    from llamero.evaluate.config import SamplingTask
    from llamero.evaluate.subject import Subject
    from llamero.model.llama import Llama
    from llamero.text.tokenizer import Tokenizer

Mode = Literal["legacy", "v2", "v2_5", "v3", "chatml", "template"]

TOP_K = 50
"""What `transformers` takes where a configuration that samples says nothing of `top_k`; published reports did too."""

JOURNAL = "sampling-unfinished.jsonl"
"""Outputs of a report that is being made."""


class Way(NamedTuple):
    """How a configuration samples, in our words."""

    sampling: Sampling
    samples: bool
    """Whether it draws; else another sample would be the same text."""
    beams: int
    note: str | None
    """What of it has no effect."""


SAMPLED = ("temperature", "top_p", "top_k", "typical_p")
"""Arguments that `transformers` heeds only where it draws."""
KNOWN = {
    *SAMPLED,
    "do_sample",
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "penalty_alpha",
    "repetition_penalty",
}
"""Arguments of `generate` that are understood."""


def way(configuration: Configuration, stop_ids: frozenset[int]) -> Way:
    """Return how a configuration samples.

    Args:
        configuration: Whose `generate_args` are those of `transformers`.
        stop_ids: Tokens that end an answer.

    Raises:
        LlameroError: It asks for something that there is not here; the message names it.
    """
    asked, where = dict(configuration.generate_args), f"configuration `{configuration.name}`"
    for key in asked:
        if key not in KNOWN:
            raise LlameroError(f"`{key}` is not understood", where=where, fix=did_you_mean(key, KNOWN))
    samples = bool(asked.get("do_sample", False))
    contrast = asked.get("penalty_alpha") or 0
    if contrast and not samples:
        raise LlameroError(
            "contrastive search is not offered", where=where, fix="take `penalty_alpha` away, or set `do_sample: true`"
        )
    if "max_new_tokens" not in asked:
        raise LlameroError("there is no `max_new_tokens`", where=where, fix="say how long an answer may become")
    drawn = {"top_k": TOP_K, **{key: asked[key] for key in SAMPLED if key in asked}}
    sampling = Sampling(
        temperature=drawn.get("temperature", 1.0) if samples else 0,
        top_k=drawn["top_k"] if samples else 0,
        top_p=drawn.get("top_p", 1.0) if samples else 1.0,
        typical_p=drawn.get("typical_p", 1.0) if samples else 1.0,
        repetition_penalty=asked.get("repetition_penalty", 1.0),
        min_new_tokens=asked.get("min_new_tokens", 0),
        max_new_tokens=asked["max_new_tokens"],
        stop_ids=stop_ids,
    )
    note = f"{where}: `penalty_alpha` has no effect beside `do_sample: true`, as in transformers" if contrast else None
    return Way(sampling, samples, int(asked.get("num_beams", 1)), note)


def _legacy(prompt: str, how: Configuration, eos: str) -> str:
    if not how.human_name or not how.bot_name:
        raise LlameroError(
            "mode `legacy` writes names before what is said, and there are none",
            where=f"configuration `{how.name}`",
            fix="give `human_name` and `bot_name` in the configuration file (--config)",
        )
    return f"{how.pre_text or ''}\n{how.human_name}: {prompt}\n\n{how.bot_name}: "


def _v2(prompt: str, how: Configuration, eos: str) -> str:
    before = how.pre_text or ""
    if before and how.add_prefix_tokens:
        before = f"<prefix>{before}</prefix>"
    return f"{before}<human>{prompt}<bot>"


def _v2_5(prompt: str, how: Configuration, eos: str) -> str:
    before = how.pre_text or ""
    if before and how.add_prefix_tokens:
        before = f"<|prefix_begin|>{before}<|prefix_end|>"
    return f"{before}<|prompter|>{prompt}{eos}<|assistant|>"


def _v3(prompt: str, how: Configuration, eos: str) -> str:
    before = f"<|system|>{how.pre_text}{eos}" if how.pre_text else ""
    return f"{before}<|prompter|>{prompt}{eos}<|assistant|>"


def _chatml(prompt: str, how: Configuration, eos: str) -> str:
    before = f"<|im_start|>system\n{how.pre_text}<|im_end|>\n" if how.pre_text else ""
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


WRITTEN: dict[Mode, Callable[[str, Configuration, str], str]] = {
    "legacy": _legacy,
    "v2": _v2,
    "v2_5": _v2_5,
    "v3": _v3,
    "chatml": _chatml,
}
"""What a prompt is written as, by published mode: of the prompt, the configuration and the end-of-text token."""


@dataclass(frozen=True)
class Writer:
    """Turns prompts to ids."""

    mode: Mode
    tokenizer: Tokenizer
    template: str
    """Of mode `template`."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        tokenizer = self.tokenizer
        if self.mode == "template":
            ends = generation_config(self.template, tokenizer)["eos_token_id"]
            return frozenset(ends if isinstance(ends, list) else [ends])
        found = [tokenizer.eos_id, tokenizer.id("<|im_end|>") if self.mode == "chatml" else None]
        return frozenset(id for id in found if id is not None)

    def ids(self, prompt: str, how: Configuration) -> list[int]:
        """Return a prompt as the model sees it.

        Special tokens that a prompt spells out become their ids, as in the published reports; with the chat template
        they are text.
        """
        if self.mode == "template":
            system = [Message("system", how.pre_text)] if how.pre_text else []
            said = [*system, Message("user", prompt)]
            return list(render(said, self.template, self.tokenizer, add_generation_prompt=True).ids)
        tokenizer = self.tokenizer
        head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        text = WRITTEN[self.mode](prompt, how, tokenizer.eos or "")
        return [*head, *tokenizer.encode(text, special=True)]

    def text(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Return what an answer's ids say, the one that stops among them."""
        return self.tokenizer.decode(ids, skip_special=skip_special)


@dataclass(frozen=True, order=True)
class Place:
    """Where an output stands in the report."""

    prompt: int
    configuration: int
    sample: int


@dataclass(frozen=True)
class Plan:
    """A report that is to be made."""

    prompts: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    args: Mapping[str, Any]
    num_samples: int
    seed: int
    skip_special_tokens: bool
    stem: str
    """What the name of its file ends with."""
    ends_in_newline: bool = False
    notes: tuple[str, ...] = ()
    """What its reader must know."""


def seed_of(seed: int, prompt: str, configuration: str, sample: int) -> int:
    """Return the seed of one output: it depends on what is asked, not on where in the file it stands."""
    said = json.dumps([seed, prompt, configuration, sample])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8]) >> 1


class Made(NamedTuple):
    """A report, and what its reader must know."""

    report: Report
    notes: tuple[str, ...]


def make(plan: Plan, model: Llama, writer: Writer, *, name: str, work: Path) -> Made:
    """Return a report, going on from what a run that was cut off left behind.

    Args:
        plan: What to ask and how.
        model: Who answers.
        writer: Writes prompts.
        name: What the report calls the model.
        work: Directory that keeps finished outputs until the report is there.
    """
    ways, notes = _ways(plan, writer)
    notes = [*plan.notes, *notes]
    todo = {place: request for place, request in _requests(plan, writer, ways)}
    limit = context_length(model.config)
    long = sorted({place.prompt for place, (request, _) in todo.items() if len(request.prompt) >= limit})
    if len(long) == len(plan.prompts):
        raise LlameroError(
            f"no prompt leaves room for an answer in the model's context of {limit} tokens", where=f"model {name}"
        )
    todo = {place: each for place, each in todo.items() if len(each[0].prompt) < limit}
    known = _Known(work / JOURNAL, {"model": fingerprint(model), "asked": _digest(todo)})
    with progress.Line(f"sample {name}", total=len(todo), unit="outputs", done=len(known.outputs)) as line:
        for place, ids, cut in _answers(model, {p: r for p, r in todo.items() if p not in known.outputs}):
            known.add(place, writer.text(ids, skip_special=plan.skip_special_tokens), cut)
            line.advance()
    notes += [f"{len(long)} prompts are as long as the context of {limit} tokens or longer: nothing was asked"] * (
        len(long) > 0
    )
    if known.cut:
        notes.append(f"{known.cut} of {len(todo)} outputs ended where the context of {limit} tokens did")
    asked = tuple(_asked(plan, ways, known.outputs, number) for number in range(len(plan.prompts)))
    date = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    args = {**plan.args, "model_name": name}
    return Made(Report(name, date, args, asked, plan.ends_in_newline), tuple(notes))


def _ways(plan: Plan, writer: Writer) -> tuple[list[Way | None], list[str]]:
    """Return how each configuration samples, `None` where it cannot be done here, and the notes on that."""
    ways: list[Way | None] = []
    notes: list[str] = []
    for configuration in plan.configurations:
        try:
            found = way(configuration, writer.stop_ids)
        except LlameroError as error:
            if len(plan.configurations) == 1:
                raise
            notes.append(f"{error.where}: {error.problem}: its {len(plan.prompts)} prompts have no outputs")
            ways.append(None)
            continue
        ways.append(found)
        notes += [found.note] if found.note else []
    return ways, notes


def _requests(plan: Plan, writer: Writer, ways: Sequence[Way | None]) -> Iterator[tuple[Place, tuple[Request, int]]]:
    """Yield what is to be asked: where it stands, the request, and its beams."""
    for number, prompt in enumerate(plan.prompts):
        for at, (configuration, one) in enumerate(zip(plan.configurations, ways, strict=True)):
            if one is None:
                continue
            ids = tuple(writer.ids(prompt, configuration))
            for sample in range(plan.num_samples if one.samples else 1):
                seed = seed_of(plan.seed, prompt, configuration.name, sample)
                yield Place(number, at, sample), (Request(ids, replace(one.sampling, seed=seed)), one.beams)


def _answers(model: Llama, todo: Mapping[Place, tuple[Request, int]]) -> Iterator[tuple[Place, list[int], bool]]:
    """Yield the ids of each answer as it is finished, and whether the context cut it off."""
    limit = context_length(model.config)
    plain = {place: request for place, (request, beams) in todo.items() if beams == 1}
    places, ids = list(plain), [list[int]() for _ in plain]
    for event in events(model, list(plain.values())):
        place = places[event.request]
        mine = ids[event.request]
        mine += [id for id in (event.id, event.stop_id) if id is not None]
        if event.finish:
            cut = event.finish == "length" and len(mine) < plain[place].sampling.max_new_tokens
            yield place, mine, cut
            ids[event.request] = []
    for place, (request, beams) in todo.items():
        if beams > 1:
            found = beam_search(model, request, beams=beams)
            room = limit - len(request.prompt)
            yield place, found, len(found) == room < request.sampling.max_new_tokens


def _asked(plan: Plan, ways: Sequence[Way | None], outputs: Mapping[Place, str], number: int) -> Asked:
    results: list[Outputs] = []
    for at, (configuration, one) in enumerate(zip(plan.configurations, ways, strict=True)):
        count = 0 if one is None else plan.num_samples if one.samples else 1
        places = [Place(number, at, sample) for sample in range(count)]
        said = tuple(outputs[place] for place in places if place in outputs)
        results.append(Outputs(configuration.name, configuration.generate_args, said))
    return Asked(plan.prompts[number], tuple(results))


class _Known:
    """Outputs that are there already: those of a run of the same report that was cut off, and those of this one."""

    def __init__(self, path: Path, of: Mapping[str, str]) -> None:
        self._journal = Journal(path)
        if not self._journal.records or self._journal.records[0] != dict(of):
            self._journal.rewrite([of])  # of another report: nothing of it is of use
        self.outputs: dict[Place, str] = {}
        self.cut = 0
        for record in self._journal.records[1:]:
            self._take(Place(*record["place"]), record["output"], record["cut"])

    def add(self, place: Place, output: str, cut: bool) -> None:
        self._journal.append({"place": [place.prompt, place.configuration, place.sample], "output": output, "cut": cut})
        self._take(place, output, cut)

    def _take(self, place: Place, output: str, cut: bool) -> None:
        self.outputs[place] = output
        self.cut += cut


def _digest(todo: Mapping[Place, tuple[Request, int]]) -> str:
    """Return a digest of all that is asked."""
    digest = hashlib.sha256()
    for place, (request, beams) in todo.items():
        told = {key: value for key, value in vars(request.sampling).items() if key != "stop_ids"}
        said = [place.prompt, place.configuration, place.sample, request.prompt, beams, told]
        digest.update(json.dumps([*said, sorted(request.sampling.stop_ids)]).encode())
    return digest.hexdigest()


def write(made: Made, plan: Plan, work: Path) -> Path:
    """Write a report under its published kind of name, forget what was kept for going on, and return where it is."""
    path = work / sampling_reports.file_name(made.report, plan.stem)
    files.write_atomically(path, sampling_reports.written(made.report))
    (work / JOURNAL).unlink(missing_ok=True)
    return path


def planned(
    *, prompts: Path, config: Path, called: tuple[str, str], mode: Mode, num_samples: int, seed: int, limit: int | None
) -> Plan:
    """Return the plan of a report of one's own.

    Args:
        prompts: File of prompts.
        config: File of configurations.
        called: What the report calls these two files.
        mode: How prompts are written.
        num_samples: Outputs of each prompt and configuration that draws.
        seed: Of all draws.
        limit: Prompts to take, from the first; all by default.
    """
    args = {
        "device": "cpu",
        "device_index": 0,
        "model_name": "",
        "mode": mode,
        "prompts": called[0],
        "report": None,
        "seed": seed,
        "verbose": False,
        "n": limit,
        "num_samples": num_samples,
        "config": called[1],
        "half": False,
        "int8": False,
        "skip_special_tokens": False,
        "model_type": "CausalLM",
        "max_input_len": None,
        "num_threads": 1,
    }
    asked = tuple(sampling_reports.read_prompts(prompts)[:limit])
    ways = tuple(sampling_reports.read_configurations(config))
    return Plan(asked, ways, args, num_samples, seed, False, Path(called[1]).stem)


def replayed(report: Path, *, config: Path | None, limit: int | None) -> Plan:
    """Return the plan of a published report's replay: the same prompts, ways and arguments.

    Args:
        report: The published one.
        config: File of its configurations, for the text and the names around a prompt, which a report does not hold;
            by default that of the report, where it lies as in oasst-model-eval.
        limit: Prompts to take, from the first; all by default.

    Raises:
        LlameroError: The report was made in a way that there is not here.
    """
    published = sampling_reports.read_report(report)
    args = published.args
    mode, model_type = args.get("mode"), args.get("model_type", "CausalLM")
    if mode not in WRITTEN:
        raise LlameroError(f"mode {mode!r} is not known", where=report, fix=did_you_mean(str(mode), WRITTEN))
    for key, value, only in (
        ("model_type", str(model_type).lower() in ("causallm", "llama"), "CausalLM"),
        ("max_input_len", args.get("max_input_len") is None, "no limit"),
    ):
        if not value:
            raise LlameroError(f"`{key}` {args[key]!r} cannot be replayed, only {only}", where=report)
    ways, notes = _around(sampling_reports.configurations(published, report), config or _beside(report, args))
    counts = Counter(len(each.outputs) for asked in published.prompts for each in asked.results)
    return Plan(
        prompts=tuple(asked.prompt for asked in published.prompts[:limit]),
        configurations=tuple(ways),
        args=args,
        num_samples=int(args.get("num_samples") or max(counts)),
        seed=int(args.get("seed") or 0),
        skip_special_tokens=bool(args.get("skip_special_tokens", False)),
        stem=Path(str(args.get("config", "replay"))).stem,
        ends_in_newline=published.ends_in_newline,
        notes=notes,
    )


def _beside(report: Path, args: Mapping[str, Any]) -> Path | None:
    """Return the configuration file of a report where oasst-model-eval keeps it, if it is there."""
    places = [parent / "model_eval" / "manual" / str(args.get("config")) for parent in report.resolve().parents]
    return next((place for place in places if place.is_file()), None)


def _around(ways: Sequence[Configuration], config: Path | None) -> tuple[list[Configuration], tuple[str, ...]]:
    """Return configurations with what stands around a prompt, which a report does not hold, and the notes on that."""
    if config is None:
        return list(ways), ("no configuration file was given (--config): nothing stands before a prompt",)
    read = {each.name: each for each in sampling_reports.read_configurations(config)}
    absent = [each.name for each in ways if each.name not in read]
    same = {(each.pre_text, each.human_name, each.bot_name, each.add_prefix_tokens) for each in read.values()}
    if absent and len(same) > 1:
        raise LlameroError(f"there is no configuration `{absent[0]}`, which the report has", where=config)
    other = next(iter(read.values()))
    found = [replace(read.get(each.name, other), name=each.name, generate_args=each.generate_args) for each in ways]
    notes = [f"what stands around prompts is that of {config.name}"]
    if absent:
        notes[0] += f", in which {', '.join(absent)} are missing: theirs is as in the others"
    return found, tuple(notes)


def run(task: SamplingTask, subject: Subject) -> list[Result]:
    """Make a report of one model, and write it into its directory of work, or where the program runs."""
    plan, work = _plan(task, subject), subject.work or Path()
    writer = Writer(plan.args["mode"], subject.tokenizer, subject.template)
    made = make(plan, subject.model, writer, name=subject.name, work=work)
    path = write(made, plan, work)
    protocol = (
        f"{len(plan.prompts)} prompts, mode {writer.mode}, {', '.join(each.name for each in plan.configurations)}"
    )
    protocol += f"; {plan.num_samples} samples where it draws, top_k {TOP_K} where none is said"
    about = {"report": path.name, "seed": plan.seed, "replay": task.replay is not None}
    return [subject.result("sampling", {}, protocol, notes=made.notes, **about)]


def _plan(task: SamplingTask, subject: Subject) -> Plan:
    config = None if task.config is None else subject.root / task.config
    if task.replay is not None:
        return replayed(subject.root / task.replay, config=config, limit=task.limit)
    assert task.prompts is not None  # held by the task
    assert task.config is not None
    assert config is not None
    own = subject.template != "auto" or subject.tokenizer.chat_template is not None
    plan = planned(
        prompts=subject.root / task.prompts,
        config=config,
        called=(task.prompts, task.config),
        mode=("template" if own else "legacy") if task.mode == "auto" else task.mode,
        num_samples=task.num_samples,
        seed=task.seed,
        limit=task.limit,
    )
    weight = subject.model.model.norm.weight
    here = {"device": device_of(subject.model).type, "num_threads": torch.get_num_threads()}
    return replace(plan, args={**plan.args, **here, "half": weight.dtype == torch.float16})
