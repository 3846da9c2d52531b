"""This project's scorer as a model of lm-evaluation-harness: `--model llamero`, and all its tasks run through it.

Written against lm-eval 0.4.13. Requests become ids as its `hf` back end makes them, so its answers are the same;
what differs is the work: equal requests and shared prefixes are computed once, and nothing is padded.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from pydantic import Field

from llamero.core import progress
from llamero.core.config import Strict, parse
from llamero.core.download import resolve_model
from llamero.core.errors import LlameroError, did_you_mean
from llamero.evaluate import tokens
from llamero.infer.chat import ends_of
from llamero.infer.context import check_tokenizer, device_of
from llamero.infer.engine import OwnEngine
from llamero.infer.sampler import Sampling
from llamero.infer.score import Pair, Scored, Softmax
from llamero.model.load import load_model
from llamero.text import auto, render
from llamero.text.messages import Message
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_log = logging.getLogger(__name__)

NAME = "llamero"
MAX_GEN_TOKENS = 256
"""Of an answer whose task does not say: what lm-eval's `hf` takes."""
_SAMPLED = {"temperature", "top_p", "top_k", "repetition_penalty", "seed"}
_IGNORED = {"do_sample", "until", "max_gen_toks", "use_cache"}
"""Generation options that are read elsewhere, or change no text."""


class Arguments(Strict):
    """What `--model_args` may say."""

    pretrained: str
    """Model directory, GGUF file, or `owner/name[:revision]` of the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights: `auto` is that of the files."""
    device: str | None = None
    """Where to compute; CUDA if there is some."""
    tokenizer: str | None = None
    """Directory or file of another tokenizer."""
    tokenizer_name: str | None = None
    """What lm-eval's request cache calls the tokenizer; the model's name by default."""
    max_length: int | None = Field(default=None, gt=1)
    """Tokens the model may see at a time; `max_position_embeddings` by default, as with `hf`."""
    add_bos_token: bool | None = None
    """Begin texts with the beginning-of-text token; by default as the tokenizer does."""
    prefix_token_id: int | None = None
    """Stands for an empty context; by default the beginning-of-text token, or the end-of-text one."""
    softmax_dtype: Softmax = "float32"
    """`float32`, or `model` for that of the weights, which `hf` takes."""
    keep: str | None = None
    """Directory in which scores are kept as they come, so that a killed run goes on."""
    batch_size: int | str | None = None
    """Taken and not needed: requests are packed by tokens."""
    max_batch_size: int | None = None
    """Taken and not needed."""


class LlameroLM(TemplateLM):
    """A model directory, GGUF file or hub name, behind lm-eval's interface.

    Args:
        engine: The model, where somebody has it already.
        arguments: See `Arguments`.
    """

    def __init__(self, engine: OwnEngine | None = None, **arguments: Any) -> None:
        super().__init__()
        asked: Arguments = parse(Arguments, arguments)
        directory = resolve_model(asked.pretrained, weights=engine is None)
        self.engine = _opened(directory, asked) if engine is None else engine
        assert self.engine.tokenizer is not None
        self.own = self.engine.tokenizer
        self._device = device_of(self.engine.model)
        self.ends = ends_of(directory, self.own)
        self.pretrained, self._name = asked.pretrained, asked.tokenizer_name
        self.softmax: Softmax = asked.softmax_dtype
        self._max_length = asked.max_length or self.engine.model.config.max_position_embeddings
        self._bos = self.own.add_bos if asked.add_bos_token is None else asked.add_bos_token
        self._prefix = asked.prefix_token_id
        self._template: str | None = None
        self.truncated = 0
        """Requests that lost the beginning of their context."""

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LlameroLM":
        """Return the model that a command line describes; what `--model_args` says goes before other options.

        Args:
            arg_dict: `--model_args`.
            additional_config: lm-eval's own options: batch size and device.
        """
        more = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{**more, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "LlameroLM":
        """Return the model that `key=value,key=value` describes, see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    # -- what lm-eval asks about

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        if self.own.eos_id is None:
            raise LlameroError("the tokenizer names no end-of-text token", fix="name one in tokenizer_config.json")
        return self.own.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that stands for an empty context."""
        return tokens.prefix_id(self.own, bos=True) if self._prefix is None else self._prefix

    @property
    def max_length(self) -> int:
        """Return the tokens that the model may see at a time."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Return the longest answer of a task that does not say."""
        return MAX_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Return what lm-eval calls the tokenizer in its cache."""
        return (self._name or self.pretrained).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes of the model into its results."""
        count = sum(parameter.numel() for parameter in self.engine.model.parameters())
        described = self.engine.describe()
        return {
            "model_num_parameters": count,
            "model_dtype": described["dtype"],
            "model_revision": None,
            "model_sha": "",
            "llamero": {**described, "tokenizer": self.own.digest, "bos": self._bos, "softmax_dtype": self.softmax},
        }

    # -- text to ids

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, with the beginning-of-text token where this tokenizer puts one.

        Args:
            string: The text; one that begins with that token as text gets no second one.
            add_special_tokens: False leaves it out.
        """
        if add_special_tokens is None:
            return tokens.text(self.own, string, bos=self._bos)
        head = [self.own.bos_id] if add_special_tokens and self.own.add_bos and self.own.bos_id is not None else []
        return [*head, *tokens.text(self.own, string, bos=False)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the Jinja that `apply_chat_template` writes with from now on.

        Args:
            chat_template: True for the tokenizer's own, or the name of one of ours (`chatml`, `llama3` …).
        """
        if not chat_template:
            self._template = None
        elif isinstance(chat_template, str):
            if chat_template not in TEMPLATES:
                raise LlameroError(
                    f"unknown chat template `{chat_template}`", fix=did_you_mean(chat_template, TEMPLATES)
                )
            self._template = render.chat_template(chat_template, self.own)
        else:
            self._template = self._own_template()
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; a template that knows no system message gets none, as with `hf`.

        Args:
            chat_history: `role` and `content` of each message.
            add_generation_prompt: Open an answer; else the last message stays open, to be gone on with.
        """
        source = self._template or self._own_template()
        try:
            return self._written(source, chat_history, add_generation_prompt)
        except LlameroError:
            bare = [message for message in chat_history if message["role"] != "system"]
            if len(bare) == len(chat_history):
                raise
            _log.warning("the chat template refuses the system message: it is left out")
            return self._written(source, bare, add_generation_prompt)

    def _own_template(self) -> str:
        if self.own.chat_template is None:
            raise LlameroError(
                "the model has no chat template",
                where=self.pretrained,
                fix=f"name one: --apply_chat_template NAME, of {', '.join(TEMPLATES)}",
            )
        return self.own.chat_template

    def _written(self, source: str, history: Sequence[Mapping[str, str]], to_answer: bool) -> str:
        messages = [Message(message["role"], message["content"]) for message in history]  # type: ignore[arg-type]
        text = auto.written(source, messages, self.own, add_generation_prompt=to_answer, today=date.today())
        return text if to_answer else _left_open(text, history[-1]["content"])

    # -- the three questions

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        scored = self._score([(context, continuation) for _, context, continuation in requests])
        answers = [(each.log_likelihood, each.greedy) for each in scored]
        for (said, _, _), answer in zip(requests, answers, strict=True):
            if said is not None:
                self.cache_hook.add_partial("loglikelihood", said, answer)
        return answers

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows whose tokens are predicted once each.

        Args:
            requests: Each with its text.
            disable_tqdm: Nothing: progress goes wherever this project's goes.
        """
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(_args(request)[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in map(utils.make_disjoint_window, windows):
                owners.append(number)
                pairs.append(window)
        sums = [0.0] * len(requests)
        for owner, scored in zip(owners, self._score(pairs), strict=True):
            sums[owner] += scored.log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", _args(request), total)
        return sums

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return answers, cut where the first of their stop strings begins.

        Args:
            requests: Each with its context and generation options.
            disable_tqdm: Nothing: progress goes wherever this project's goes.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(_args(request)[1].items(), key=lambda item: item[0])), []).append(number)
        answers = [""] * len(requests)
        with progress.Line("generate", total=len(requests), unit="answers") as line:
            for numbers in groups.values():
                for number, text in self._answers(numbers, requests):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", _args(requests[number]), text)
                line.advance(len(numbers))
        return answers

    def _answers(self, numbers: Sequence[int], requests: "Sequence[Instance]") -> Iterator[tuple[int, str]]:
        """Yield the answers to requests with the same options."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(_args(requests[numbers[0]])[1], self.max_gen_toks))
        end = self.own.eos
        until = handle_stop_sequences(list(options["until"]), eos=end)
        most = int(options["max_gen_toks"])
        if most >= self.max_length:
            raise LlameroError(
                f"answers of {most} tokens leave no room for a prompt: the model sees {self.max_length}",
                fix="give less max_gen_toks",
            )
        contexts = [self.tok_encode(_args(requests[number])[0]) for number in numbers]
        cut = [context[-(self.max_length - most) :] for context in contexts]
        self._count(sum(len(a) > len(b) for a, b in zip(contexts, cut, strict=True)))
        strings = tuple(term for term in until if term and term != end)
        sampling = _sampling(options, most, self.ends, strings)
        for number, answer in zip(numbers, self.engine.generate(cut, sampling), strict=True):
            text = self.own.decode(answer.ids)  # by itself, as `hf` reads it: without the space that opens it
            for term in filter(None, until):
                text = text.split(term)[0]
            yield number, text

    def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
        found = self.engine.score(pairs, max_length=self.max_length, softmax=self.softmax)
        self._count(sum(each.truncated > 0 for each in found))
        return found

    def _count(self, cut: int) -> None:
        if cut:
            self.truncated += cut
            _log.warning("%d requests were longer than %d tokens and lost their beginning", cut, self.max_length)


def _args(request: "Instance") -> tuple[Any, ...]:
    """Return what lm-eval asks: its own types leave open what that is."""
    return request.args


def _opened(directory: Path, asked: Arguments) -> OwnEngine:
    device = asked.device or "cuda"
    if device.startswith("cuda") and not torch.cuda.is_available():
        if asked.device not in (None, "cuda:0"):  # lm-eval's command line says cuda:0 of itself
            raise LlameroError(f"there is no device `{device}` here", fix="give device=cpu")
        device = "cpu"
    dtype = None if asked.dtype == "auto" else getattr(torch, asked.dtype)
    loaded = load_model(directory, dtype=dtype, device=device)
    tokenizer = load_tokenizer(directory if asked.tokenizer is None else resolve_model(asked.tokenizer, weights=False))
    check_tokenizer(loaded, tokenizer, where=directory)
    return OwnEngine(loaded, tokenizer, kept=None if asked.keep is None else Path(asked.keep))


def _sampling(options: Mapping[str, Any], most: int, ends: frozenset[int], strings: tuple[str, ...]) -> Sampling:
    """Return how tokens are chosen; an option that would change the text and is not known is refused."""
    unknown = [key for key in options if key not in _SAMPLED | _IGNORED]
    if unknown:
        raise LlameroError(
            f"`{unknown[0]}` is no generation option here", fix=f"there are {', '.join(sorted(_SAMPLED))}"
        )
    asked = {key: options[key] for key in _SAMPLED if options.get(key) is not None}
    if not options["do_sample"]:
        asked = {"temperature": 0.0, **{key: asked[key] for key in ("repetition_penalty",) if key in asked}}
    elif not asked.get("temperature"):
        asked["temperature"] = 1.0
    return Sampling(max_new_tokens=most, stop_ids=ends, stop_strings=strings, **asked)


def _left_open(text: str, last: str) -> str:
    """Return a conversation up to the end of its last message: what a template writes behind it goes."""
    bare = last.strip()
    at = text.rfind(bare)
    if at < 0:
        raise LlameroError("the chat template rewrites the message that is to be gone on with")
    end = at + len(last.lstrip())
    return text[:end] if text[at:end] == last.lstrip() else text[: at + len(bare)]


def register() -> None:
    """Make the model known to lm-eval under `NAME`; again does nothing."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=LlameroLM)
