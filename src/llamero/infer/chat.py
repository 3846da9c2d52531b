"""A conversation with a model: what people say is rendered, what it answers is streamed and remembered."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamero.checkpoint import hf
from llamero.checkpoint.gguf_names import generation_config
from llamero.core import gguf
from llamero.core.errors import LlameroError
from llamero.infer.generate import Request, events
from llamero.infer.sampler import Sampling
from llamero.model.llama import Llama
from llamero.text.messages import Message
from llamero.text.render import generation_config as stops_of
from llamero.text.render import render, resolve
from llamero.text.tokenizer import Tokenizer


class Chat:
    """A conversation.

    Args:
        model: Who answers.
        tokenizer: Of the model.
        template: Name of the chat template; `auto` is the model's own.
        system: System message; empty for none.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, *, template: str, system: str = "") -> None:
        self._model, self._tokenizer = model, tokenizer
        self._template = resolve(template, tokenizer)
        stop = stops_of(self._template, tokenizer)["eos_token_id"]
        self._stop = frozenset(stop if isinstance(stop, list) else [stop])
        self.messages: list[Message] = [Message("system", system)] if system else []

    def answer(self, said: str, sampling: Sampling) -> Iterator[str]:
        """Yield the answer piece by piece; one that is broken off is not remembered, nor what it answers."""
        asked = [*self.messages, Message("user", _text(said))]
        prompt = render(asked, self._template, self._tokenizer, add_generation_prompt=True).ids
        pieces: list[str] = []
        for piece in self._stream(prompt, sampling):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, Message("assistant", "".join(pieces).strip() or " ")]

    def _stream(self, prompt: tuple[int, ...], sampling: Sampling) -> Iterator[str]:
        return stream(self._model, self._tokenizer, prompt, replace(sampling, stop_ids=self._stop))


def stream(model: Llama, tokenizer: Tokenizer, prompt: tuple[int, ...], sampling: Sampling) -> Iterator[str]:
    """Yield the text of an answer as it becomes certain."""
    for event in events(model, [Request(prompt, sampling)], tokenizer):
        if event.text:
            yield event.text


def continue_text(model: Llama, tokenizer: Tokenizer, text: str, sampling: Sampling) -> Iterator[str]:
    """Yield how a model goes on from plain text, with no template; the end-of-text token ends it."""
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    stop = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
    return stream(model, tokenizer, (*head, *tokenizer.encode(_text(text))), replace(sampling, stop_ids=stop))


def sampling_of(directory: Path, asked: Mapping[str, float], *, max_new_tokens: int, seed: int) -> Sampling:
    """Return how to choose tokens: as asked, else as a model's generation_config.json says, else at 0.7.

    Args:
        directory: Of the model, or its GGUF file, which says it in its metadata.
        asked: `temperature`, `top_p`, `top_k`, `repetition_penalty`, as far as somebody said them.
        max_new_tokens: Longest answer.
        seed: Of the draws.
    """
    written = _generation_config(directory)
    keys = ("temperature", "top_p", "top_k", "repetition_penalty")
    said = {key: written[key] for key in keys if written.get(key) is not None}
    return Sampling(max_new_tokens=max_new_tokens, seed=seed, **{"temperature": 0.7, **said, **asked})


def ends_of(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's own, and those that generation_config.json names."""
    said = _generation_config(directory).get("eos_token_id")
    named = said if isinstance(said, list) else [said]
    return frozenset(id for id in (*named, tokenizer.eos_id) if id is not None)


def _generation_config(directory: Path) -> dict[str, Any]:
    path, in_gguf = directory / "generation_config.json", gguf.find(directory)
    if in_gguf is not None:
        return generation_config(gguf.read_header(in_gguf).metadata)
    return hf.read_json(path) if path.exists() else {}


def _text(said: str) -> str:
    """Return what somebody said, if it is whole characters."""
    try:
        said.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LlameroError(f"the prompt is not UTF-8 text (at character {error.start})") from error
    return said
