"""The probes of a stage: which questions are asked while it trains, in what words, and who answers prompts."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from llamero.core.errors import LlameroError
from llamero.corpus import benchmarks, toy_world
from llamero.engine.metrics import Sample
from llamero.engine.probes import Answers, Probe
from llamero.engine.stage import ProbeConfig, StageConfig
from llamero.infer import choices
from llamero.infer.context import context_length
from llamero.infer.generate import generate
from llamero.infer.sampler import Sampling
from llamero.model.llama import Llama
from llamero.model.load import empty_model
from llamero.parallel.spread import Spread
from llamero.text.messages import Message
from llamero.text.render import generation_config, render
from llamero.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_MEMINFO = Path("/proc/meminfo")

Asked = tuple[str, choices.Item]
"""A question and its possible answers."""


def _arc(config: ProbeConfig) -> list[Asked]:
    rows = benchmarks.arc_challenge(Path(str(config.data)), "test")
    return [(row.question, choices.Item(row.choices, row.answer)) for row in rows]


def _toy_world(config: ProbeConfig) -> list[Asked]:
    per_category = -(-config.questions // 3)
    rows = toy_world.questions(toy_world.world(1), per_category=per_category)
    mixed = [row for at in range(per_category) for row in rows[at::per_category]]  # some of each category
    return [(row.question, choices.Item(row.options, row.answer, row.category)) for row in mixed]


QUESTIONS: dict[str, Callable[[ProbeConfig], list[Asked]]] = {"arc_challenge": _arc, "toy_world": _toy_world}
"""Who has questions. To add one: a line here and its name in `ProbeConfig.task`."""


def probe_of(stage: StageConfig, model: Llama, tokenizer: Tokenizer) -> Probe | None:
    """Return what a stage asks, or nothing.

    Args:
        stage: Says what.
        model: That is trained.
        tokenizer: Of the release.

    Raises:
        LlameroError: The questions are not there, or a prompt leaves no room for an answer.
    """
    config = stage.probe
    if config is None:
        return None
    asked = [] if config.task is None else list(islice(QUESTIONS[config.task](config), config.questions))
    words = _Words(stage, tokenizer)
    context = context_length(model.config)
    for text in config.prompts:
        if len(words.prompt(text)) >= context:
            problem = f"a probe prompt fills the model's context of {context} tokens: {text[:60]!r}"
            raise LlameroError(problem, where=f"stage {stage.name}", fix="shorten it")
    questions = [words.answers(question, item) for question, item in asked]
    items = [item for _, item in asked]

    def judge(log_likelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
        found = choices.accuracy(items, log_likelihoods)
        return {"probe_accuracy": found.acc.value, "probe_accuracy_per_character": found.acc_norm.value}

    return Probe(config.every, questions, judge, lambda spread: _speak(config, words, model, spread))


class _Words:
    """How a stage words questions: in the release's chat template, or as plain text where it learns plain text."""

    def __init__(self, stage: StageConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._chat = tokenizer, stage.objective == "sft"

    def answers(self, question: str, item: choices.Item) -> Answers:
        """Return the ids of a question and each of its answers."""
        if self._chat:
            return [choices.chat_answer(question, choice, "auto", self.tokenizer) for choice in item.choices]
        head = self._head()
        asked = f"Question: {question}\nAnswer:"
        pairs = [choices.plain_answer(asked, choice, self.tokenizer) for choice in item.choices]
        return [([*head, *context], answer) for context, answer in pairs]

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        if self._chat:
            return list(render([Message("user", text)], "auto", self.tokenizer, add_generation_prompt=True).ids)
        return [*self._head(), *self.tokenizer.encode(text)]

    @property
    def stop(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        if not self._chat:
            return frozenset() if self.tokenizer.eos_id is None else frozenset([self.tokenizer.eos_id])
        ends = generation_config("auto", self.tokenizer)["eos_token_id"]
        return frozenset(ends if isinstance(ends, list) else [ends])

    def _head(self) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos] if self.tokenizer.add_bos and bos is not None else []


def _speak(config: ProbeConfig, words: _Words, model: Llama, spread: Spread) -> list[Sample]:
    """Return what the model says to the prompts, by the likeliest token each time."""
    if not config.prompts:
        return []
    whole = whole_model(model, spread)
    if whole is None:
        return []
    sampling = Sampling(temperature=0, max_new_tokens=config.max_new_tokens, stop_ids=words.stop)
    said = generate(whole, [words.prompt(text) for text in config.prompts], sampling, words.tokenizer)
    return [{"prompt": prompt, "text": each.text} for prompt, each in zip(config.prompts, said, strict=True)]


def whole_model(model: Llama, spread: Spread) -> Llama | None:
    """Return the model as one process can run it: itself, or a copy that the first process gathers tensor by tensor.

    A copy is in bfloat16 on CUDA and in float32 on CPU. Where it does not fit, a warning says so and there is none.
    """
    world = spread.world
    if world.size == 1 and world.device.type == "cpu":
        return model
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    needed = sum(torch.Size(spec.shape).numel() for spec in spread.plain_specs.values()) * dtype.itemsize
    free = world.told(_free(world.device))
    if needed > free:
        if world.speaks:
            said = f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free on {world.device}"
            log.warning("probe prompts are not answered: the whole model would take %s", said)
        return None
    tensors = {name: tensor.to(world.device, dtype) for name, tensor in spread.plain()}
    if not world.speaks:
        return None
    whole = empty_model(spread.config)
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie()
    return whole.eval()


def _free(device: torch.device) -> int:
    """Return the bytes that can be had where this process works; of a CPU that does not tell, all of its memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    said = _MEMINFO.read_text() if _MEMINFO.exists() else ""
    found = re.search(r"^MemAvailable: *(\d+) kB", said, re.MULTILINE)
    if found is not None:  # with what the cache of files, such as that of the weights, gives back when asked
        return 1024 * int(found[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
