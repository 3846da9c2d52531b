"""What a recipe says of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from llamero.core.config import Strict, parse
from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus import toy_world

if TYPE_CHECKING:
    from llamero.infer.backends.openai import Endpoint

HUB = "hub"
"""Stands for the files of the hub where a directory of benchmark files is asked for."""
TODAY = ("openllm", "truthfulqa_mc1", "winogrande", "gsm8k")
"""What the leaderboard of 2023 did not ask, or not by itself."""
WITH_MMLU = ("h4", "openllm", "mmlu")
"""Tasks that hold subjects of MMLU."""


OWN_ENGINE = "llamero"
"""The engine that is our own."""


class _Task(Strict):
    models: list[str] = ["base", "final", "variants"]
    """Which models: `base`, `final`, `variants` (all quantized ones), a training stage, or one variant."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while they are measured; quantized ones keep their codes."""

    @property
    def label(self) -> str:
        """Return what stages and files are named by."""
        return str(getattr(self, "tasks", "task"))

    @property
    def files(self) -> dict[str, str]:
        """Return every path that the task reads, by its role: their contents decide the result, not where they lie."""
        return {}

    @property
    def mixtures(self) -> list[str]:
        """Return the mixtures of the recipe that the task reads."""
        return []

    def decides(self) -> dict[str, object]:
        """Return what decides the result, files left out."""
        return self.model_dump(mode="json", exclude={"models", *self._paths})

    _paths: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold paths; `files` says which."""


class H4Task(_Task):
    """The Open LLM Leaderboard of 2023 and its parts, or today's group `openllm` of lm-eval."""

    tasks: Literal[
        "h4", "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc", "openllm", "truthfulqa_mc1", "winogrande", "gsm8k"
    ]
    """`h4` is the first four and their mean; `openllm` all of them, by `compat: lm-eval` only, as the last three."""
    data: str
    """Directory with the benchmark files, relative to the recipe (layout in docs/evaluate.md), or `hub`: they are
    fetched from the hub once and kept in its cache."""
    compat: Literal["leaderboard-2023", "lm-eval"] = "leaderboard-2023"
    """Whose prompts, few-shot draws, BOS rule and averages: of the published scores, or of lm-eval 0.4.13."""
    limit: int | None = Field(default=None, gt=0)
    """Questions of each task (for MMLU of each subject), after its shuffle."""
    subjects: int | list[str] | None = None
    """MMLU subjects to take: how many, the first ones by name, or their names; all by default."""
    truthfulqa: Literal["2021", "later"] | None = None
    """Edition of TruthfulQA; by default that of the protocol: the published scores used that of 2021, hubs serve the
    later one."""
    softmax_dtype: Literal["float32", "model"] = "float32"
    """Dtype of log-probabilities and of their sums; both harnesses compute them in that of the model's weights."""
    engine: str = Field(default=OWN_ENGINE, pattern=r"^(llamero|vllm|https?://.+)$")
    """Who runs the model: `llamero`, `vllm` where it is installed, or the address of an OpenAI-compatible server that
    echoes log-probabilities (http://localhost:8000/v1), which knows the model by the name that it has here."""
    _paths = frozenset({"data"})

    @property
    def label(self) -> str:
        """Return what stages and files are named by."""
        return self.tasks if self.compat == "leaderboard-2023" else f"{self.tasks}-{self.compat}"

    @property
    def files(self) -> dict[str, str]:
        """Return the benchmark directory."""
        return {} if self.data == HUB else {"data": self.data}

    def decides(self) -> dict[str, object]:
        """Return what decides the result."""
        own = {"engine"} if self.engine == OWN_ENGINE else set()
        said = {key: value for key, value in super().decides().items() if key not in own}
        return {**said, **({"data": HUB} if self.data == HUB else {})}

    @model_validator(mode="before")
    @classmethod
    def _today(cls, keys: Any) -> Any:
        """Let what only lm-eval asks be asked by it without saying so."""
        return {"compat": "lm-eval", **keys} if isinstance(keys, dict) and keys.get("tasks") in TODAY else keys

    @model_validator(mode="after")
    def _asked_by_somebody(self) -> Self:
        if self.tasks in TODAY and self.compat != "lm-eval":
            raise ValueError(f"`{self.tasks}` is asked by `compat: lm-eval`")
        if self.subjects is not None and self.tasks not in WITH_MMLU:
            raise ValueError(f"`{self.tasks}` has no subjects: leave `subjects` out")
        if isinstance(self.subjects, int) and self.subjects < 1:
            raise ValueError("`subjects` takes 1 at least")
        return self


class ToyWorldTask(_Task):
    """Held-out questions of the toy world, four options each."""

    tasks: Literal["toy_world"]
    """Name of the task."""
    seed: int = 1
    """Which world."""
    per_category: int = Field(default=200, gt=0)
    """Questions of each category."""

    def decides(self) -> dict[str, object]:
        """Return what decides the result."""
        return {**super().decides(), "version": toy_world.VERSION}


class PerplexityTask(_Task):
    """Perplexity of texts, and agreement with the unquantized model."""

    tasks: Literal["perplexity"]
    """Name of the task."""
    texts: dict[str, str] = {}
    """Text files by the name that reports use, relative to the recipe."""
    validation: list[str] = []
    """Mixtures of the recipe; their validation documents are measured, each by itself."""
    protocol: Literal["window", "llama.cpp"] = "window"
    """`window` slides over a text; `llama.cpp` cuts it into chunks and scores the second half of each, as its tool."""
    window: int = Field(default=512, ge=4)
    """Tokens of a window over a text, or of a chunk."""
    stride: int = Field(default=256, ge=1)
    """Tokens between sliding windows; the rest of a window is context."""
    tokens: int | None = Field(default=None, gt=1)
    """Tokens of each text to use, from its start; all by default."""

    _paths = frozenset({"texts"})

    @property
    def files(self) -> dict[str, str]:
        """Return the texts."""
        return {f"text {name}": path for name, path in self.texts.items()}

    @property
    def mixtures(self) -> list[str]:
        """Return the mixtures whose validation documents are measured."""
        return self.validation

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.texts and not self.validation:
            raise ValueError("give `texts` or `validation`")
        if self.protocol == "llama.cpp" and "stride" in self.model_fields_set:
            raise ValueError("llama.cpp's chunks have no `stride`: half of each is context")
        return self


class WikitextTask(_Task):
    """Perplexity per word and per byte of pages, as lm-evaluation-harness measures it on WikiText."""

    tasks: Literal["wikitext"]
    """Name of the task."""
    texts: dict[str, str] = Field(min_length=1)
    """WikiText's raw text (wiki.test.raw) or JSONL with `page`, by the name that reports use."""
    compat: Literal["lm-eval", "leaderboard-2023"] = "lm-eval"
    """How a page begins: `lm-eval` as today, with BOS (scored once if the tokenizer adds it); `leaderboard-2023` with
    the end-of-text token and no BOS."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a window; the model's `max_position_embeddings` by default."""
    limit: int | None = Field(default=None, gt=0)
    """Pages of each text, from its start; all by default."""

    _paths = frozenset({"texts"})

    @property
    def files(self) -> dict[str, str]:
        """Return the texts."""
        return {f"text {name}": path for name, path in self.texts.items()}


class MtBenchTask(_Task):
    """MT-Bench: 80 questions of two turns; another model rates the answers 1 to 10 (FastChat's files and rules)."""

    tasks: Literal["mt_bench"]
    """Name of the task."""
    judge: str = "gpt-4"
    """Who judges: a model of OpenAI by its name; the address of any server with OpenAI's interface (`http://…/v1`, see
    `judge_model`); or a model to run here: a hub name `owner/name`, or a path that begins with `/`, `~` or `.`."""
    judge_model: str | None = None
    """What the judge is called on its server."""
    judge_key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the judge's API key; OPENAI_API_KEY by default."""
    judge_template: str = "auto"
    """Chat template of a judge that runs here; `auto` is its own."""
    judge_temperature: float = Field(default=0.0, ge=0)
    """How freely the judge words its judgments; FastChat has 0."""
    judge_threads: int = Field(default=8, gt=0)
    """Questions to a served judge that are under way at a time."""
    votes: int = Field(default=1, gt=0)
    """Judgments of each answer; with several, their spread is reported. They differ only as the judge does."""
    judge_mode: Literal["single", "pairwise-baseline", "pairwise-all"] = "single"
    """Rate each answer; or compare it with the baseline's, or all models with each other, always in both orders."""
    answers: str | None = None
    """Answers of other models to compare with, relative to the recipe: FastChat's `model_answer/` or a file of it."""
    baseline: str = "gpt-3.5-turbo"
    """Which of them `pairwise-baseline` compares with."""
    data: str = HUB
    """Directory with FastChat's files (questions, reference answers, judge prompts), relative to the recipe; `hub` is
    the hub's copy."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """Longest answer."""
    seed: int = Field(default=0, ge=0)
    """Of the draws; each question has its own from it."""
    limit: int | None = Field(default=None, gt=0)
    """Questions to ask, from the first; all by default."""
    unanswered: Literal["refuse", "count"] = "refuse"
    """What becomes of questions that the judge did not answer after all tries: the run ends, and the next one asks them
    again; or they are counted, and left out of the means."""
    models: list[str] = ["final"]
    """Which models."""

    _paths = frozenset({"data", "answers"})

    def decides(self) -> dict[str, object]:
        """Return what decides the result; how the judge is reached does not."""
        beside = {"judge_threads", "judge_key_variable", "unanswered", *({"judge"} & self.files.keys())}
        decided = {key: value for key, value in super().decides().items() if key not in beside}
        return decided | ({"data": HUB} if self.data == HUB else {})

    def endpoint(self) -> Endpoint | None:
        """Return where the judge is served, `None` if it runs here; nothing is asked of it.

        Raises:
            LlameroError: Its key is missing.
        """
        from llamero.infer.backends.openai import OPENAI, Endpoint

        if self.judge_is_local:
            return None
        served = self.judge.startswith(("http://", "https://"))
        name = self.judge_model or self.judge  # an address has a model, see below
        return Endpoint(self.judge if served else OPENAI, name, key_variable=self.judge_key_variable)

    @property
    def judge_is_local(self) -> bool:
        """Return whether the judge runs here."""
        return "/" in self.judge and "://" not in self.judge

    @property
    def files(self) -> dict[str, str]:
        """Return the benchmark's files, the answers of others, and a judge that lies on the disk."""
        found = {"data": None if self.data == HUB else self.data, "answers": self.answers}
        if self.judge.startswith(("/", "~", ".")):
            found["judge"] = self.judge
        return {role: path for role, path in found.items() if path is not None}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.judge.startswith(("http://", "https://")) and self.judge_model is None:
            raise ValueError("give `judge_model`: which model of that server judges")
        if self.judge_mode == "single" and self.answers is not None:
            raise ValueError("`answers` are of others to compare with: set `judge_mode` to pairwise-baseline or -all")
        if self.judge_mode != "single" and self.answers is None:
            raise ValueError(f"`{self.judge_mode}` needs `answers` of other models")
        if self.judge_mode != "single" and self.votes > 1:
            raise ValueError("several `votes` are for `judge_mode: single`")
        return self


class SamplesTask(_Task):
    """What the model says to a few prompts, greedily: read it before you believe a score."""

    tasks: Literal["samples"]
    """Name of the task."""
    prompts: list[str] = Field(min_length=1)
    """What the user says, one conversation each."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest answer."""
    models: list[str] = ["final"]
    """Which models."""


class SamplingTask(_Task):
    """A sampling report: what the model says to many prompts, sampled in several ways, in OpenAssistant's layout."""

    tasks: Literal["sampling"]
    """Name of the task."""
    prompts: str | None = None
    """File of prompts, a JSON string on each line (`.gz` too), relative to the recipe."""
    config: str | None = None
    """File of configurations (`noprefix2.json` …), relative to the recipe."""
    replay: str | None = None
    """A published report: its prompts, configurations and arguments are taken, and `config` only for what stands around
    a prompt (by default the report's own file, where it lies as in oasst-model-eval)."""
    mode: Literal["auto", "legacy", "v2", "v2_5", "v3", "chatml", "template"] = "auto"
    """How prompts are written: as OpenAssistant's program of that mode did, or with the chat `template`; `auto` is
    `template` where there is one, else `legacy`. A replay has its report's."""
    num_samples: int = Field(default=2, gt=0)
    """Outputs of each prompt and configuration that draws; greedy ones are one. A replay has its report's."""
    seed: int = Field(default=42, ge=0)
    """Of all draws; each output has a seed of its own that comes of it. A replay has its report's."""
    limit: int | None = Field(default=None, gt=0)
    """Prompts to take, from the first; all by default."""
    models: list[str] = ["final"]
    """Which models."""

    _paths = frozenset({"prompts", "config", "replay"})

    @property
    def files(self) -> dict[str, str]:
        """Return the files of prompts and configurations, and the report."""
        given = {"prompts": self.prompts, "configurations": self.config, "report": self.replay}
        return {role: path for role, path in given.items() if path is not None}

    def decides(self) -> dict[str, object]:
        """Return what decides the result: the report says what its files were called, and is called after one."""
        return {**super().decides(), "called": [self.prompts, self.config]}

    @model_validator(mode="after")
    def _something_to_say(self) -> Self:
        if self.replay is None and (self.prompts is None or self.config is None):
            raise ValueError(
                "give `prompts` and `config` (--prompts FILE --config FILE), or `replay` (--replay REPORT)"
            )
        own = {"prompts", "mode", "num_samples", "seed"} & self.model_fields_set
        if self.replay is not None and own:
            raise ValueError(f"a replay takes `{min(own)}` from its report: leave it out")
        return self


class LmEvalTask(_Task):
    """Tasks of lm-evaluation-harness, by its own code and this project's scorer."""

    tasks: Literal["lm-eval"]
    """Name of the task."""
    names: list[str] = Field(min_length=1)
    """Tasks, groups or tags, as `llamero lm-eval ls tasks` lists them."""
    include: str | None = None
    """Directory with more tasks in lm-eval's YAML, relative to the recipe."""
    shots: int | None = Field(default=None, ge=0)
    """Examples before each question; by default as each task says."""
    limit: int | None = Field(default=None, gt=0)
    """Questions of each task, from the first."""
    chat: bool = False
    """Ask in the model's chat template, or in that which the recipe names; examples become turns."""
    system: str | None = None
    """System message."""
    multiturn: bool = True
    """Examples are turns of their own; else they stand in the question's. Only with `chat`."""
    bos: bool | None = None
    """Whether texts begin with the beginning-of-text token; by default as the tokenizer does."""
    softmax_dtype: Literal["float32", "model"] = "float32"
    """Dtype of log-probabilities."""
    _paths = frozenset({"include"})

    @property
    def label(self) -> str:
        """Return what stages and files are named by."""
        return "lm-eval-" + "-".join(self.names)

    @property
    def files(self) -> dict[str, str]:
        """Return the directory of more tasks."""
        return {} if self.include is None else {"tasks": self.include}


class HumanEvalTask(_Task):
    """Python functions that a model completes, run against tests in a sandbox."""

    tasks: Literal["humaneval"]
    """Name of the task."""
    data: str
    """Directory with the benchmark files, relative to the recipe (layout in docs/evaluate.md)."""
    num_samples: int = Field(default=1, gt=0)
    """Answers to each problem; pass@10 needs ten."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the draws; 0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the likeliest tokens that together have this probability."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """Longest answer; never more than half of the context."""
    limit: int | None = Field(default=None, gt=0)
    """Problems to take, from the first; all by default."""
    seconds: float = Field(default=3.0, gt=0)
    """Processor time of each program."""
    memory_mib: int = Field(default=1024, ge=64)
    """Memory of each program, in MiB."""

    _paths = frozenset({"data"})

    @property
    def files(self) -> dict[str, str]:
        """Return the benchmark directory."""
        return {"data": self.data}

    @model_validator(mode="after")
    def _several_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("greedy answers are all the same: give `temperature`, or one sample")
        return self


class NeedleTask(_Task):
    """A number told somewhere in a long text and asked for at its end, in a grid of lengths and depths."""

    tasks: Literal["needle"]
    """Name of the task."""
    haystack: str
    """Text file, or directory of `.txt` files, relative to the recipe; it repeats where it is too short."""
    to: int = Field(gt=0)
    """Longest haystack, in tokens."""
    shortest: int = Field(default=100, gt=0)
    """Shortest haystack, in tokens."""
    interval: int | None = Field(default=None, gt=0)
    """Tokens from one length to the next; by default ten lengths are spread evenly."""
    steps: int = Field(default=5, gt=0)
    """Depths are 0, 1/steps … 1."""
    num_samples: int = Field(default=2, gt=0)
    """Numbers; each is asked for at every length and depth."""
    digits: int = Field(default=7, gt=0)
    """Digits of a number at most: small ones are not filled up with zeros."""
    distinct: int | None = Field(default=None, gt=0)
    """Tokens of the haystack that differ: after so many it repeats. All of it by default."""
    space: bool = False
    """Put a space after the question, for tokenizers that write none before a number (Llama 3)."""
    freely: bool = False
    """Let the model answer freely too, and look for the number in what it says."""
    seed: int = 24242424
    """Of the numbers."""
    models: list[str] = ["final"]
    """Which models."""

    _paths = frozenset({"haystack"})

    @property
    def files(self) -> dict[str, str]:
        """Return the haystack."""
        return {"haystack": self.haystack}

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of the grid, in tokens."""
        interval = self.interval or max(1, -(-(self.to - self.shortest) // 9))
        return list(range(self.shortest, self.to + 1, interval))

    @property
    def depths(self) -> list[float]:
        """Return the depths of the grid."""
        return [step / self.steps for step in range(self.steps + 1)]

    @model_validator(mode="after")
    def _from_short_to_long(self) -> Self:
        if self.to < self.shortest:
            raise ValueError(f"`to` is {self.to}, below `shortest`, {self.shortest}")
        return self


EvaluateConfig = Annotated[
    H4Task
    | ToyWorldTask
    | PerplexityTask
    | WikitextTask
    | MtBenchTask
    | SamplesTask
    | SamplingTask
    | HumanEvalTask
    | NeedleTask
    | LmEvalTask,
    Field(discriminator="tasks"),
]
"""Every task there is. To add one: a class here (its `files` too, or changed files would go unnoticed), a function in
`TASKS` of evaluate/run.py, how cards print what it measures in `PRINTED` of publish/measurements.py, a test."""


def named(name: str, given: Mapping[str, object]) -> EvaluateConfig:
    """Return the task that a command line describes; an option that the task does not have is refused.

    Args:
        name: Of the task; `hendrycksTest-SUBJECT` and `mmlu_SUBJECT` are subjects of `mmlu`.
        given: Options that were given.
    """
    kinds = _kinds()
    subject = _subject(name)
    if subject and "subjects" not in given:
        name, given = "mmlu", {**given, "subjects": [subject]}
    if name not in kinds:
        raise LlameroError(f"unknown task `{name}`", fix=did_you_mean(name, kinds))
    kind = kinds[name]
    missing = [key for key, field in kind.model_fields.items() if field.is_required() and key not in {"tasks", *given}]
    if missing or ("texts" in kind.model_fields and "texts" not in given):
        option = {
            "haystack": "--haystack FILE",
            "to": "--to TOKENS",
            "haystackto": "--haystack FILE --to TOKENS",
            "names": "--tasks lm-eval:TASK[,TASK]",
            "data": "--data DIR (layout: docs/evaluate.md)",
            "prompts": "--prompt TEXT",
        }
        raise LlameroError(f"`{name}` of what?", fix=f"give {option.get(''.join(missing), '--text FILE')}")
    return parse(kind, {"tasks": name, **given})


def several(names: str, given: Mapping[str, object]) -> list[EvaluateConfig]:
    """Return the tasks that a command line names, with commas between; of several, each takes the options it has.

    Args:
        names: Of the tasks, each once.
        given: Options that were given; one that none of the tasks has is refused.
    """
    wanted, harness = _named_tasks(names)
    if harness:
        given = {**given, "names": harness}
        wanted = [*wanted, "lm-eval"]
    subjects = [subject for name in wanted if (subject := _subject(name))]
    if subjects:  # one task
        if "subjects" in given or "mmlu" in wanted:
            raise LlameroError("subjects of MMLU are named twice", fix="name `mmlu`, or its subjects")
        given = {**given, "subjects": subjects}
        wanted = list(dict.fromkeys("mmlu" if _subject(name) else name for name in wanted))
    if len(wanted) < 2:
        return [named(wanted[0] if wanted else names, given)]
    kinds = _kinds()
    fields = [set(kinds[name].model_fields) if name in kinds else set(H4Task.model_fields) for name in wanted]
    nobody = [key for key in given if not any(key in mine for mine in fields)]
    if nobody:
        raise LlameroError(f"`{nobody[0]}` is not an option of any of {', '.join(wanted)}")
    return [
        named(
            name,
            {key: value for key, value in given.items() if key in mine and (key != "subjects" or name in WITH_MMLU)},
        )
        for name, mine in zip(wanted, fields, strict=True)
    ]


def _named_tasks(names: str) -> tuple[list[str], list[str]]:
    """Return this project's tasks and those of lm-eval: what follows `lm-eval:`, to the end."""
    own, _, theirs = names.partition("lm-eval:")
    parts = [list(dict.fromkeys(name.strip() for name in part.split(",") if name.strip())) for part in (own, theirs)]
    return parts[0], parts[1]


def _subject(name: str) -> str:
    """Return the subject of MMLU that is named, as the harness of 2023 or today's does; else nothing."""
    prefixes = ("hendrycksTest-", "mmlu_")
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), "")


def _kinds() -> dict[str, type[_Task]]:
    return {tag: kind for kind in _Task.__subclasses__() for tag in get_args(kind.model_fields["tasks"].annotation)}
