"""Many conversations at once: each is rendered in the model's template; its reply is there as soon as it is whole."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from llamero.infer.context import context_length
from llamero.infer.generate import Request, events
from llamero.text.render import generation_config, render, resolve
from llamero.text.template import Template

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llamero.infer.sampler import Sampling
    from llamero.model.llama import Llama
    from llamero.text.messages import Message
    from llamero.text.tokenizer import Tokenizer


class Reply(NamedTuple):
    """What a model said."""

    text: str
    """Without white space around it."""
    tokens: int
    finish: str
    """`stop`; `length` where it was cut off; `too long` where the conversation leaves no room for a reply."""


def replies(
    model: Llama,
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[Sequence[Message], Sampling]],
    *,
    template: str,
) -> Iterator[tuple[int, Reply]]:
    """Yield the number of a conversation and its reply, in the order in which they end.

    Each draws from its own seed, so that it says the same whatever else is in the batch.

    Args:
        model: Who replies.
        tokenizer: Of the model.
        conversations: What was said, the user last, and how to choose the tokens of the reply.
        template: Name of the chat template; `auto` is the model's own.
    """
    resolved = resolve(template, tokenizer)
    ends = generation_config(resolved, tokenizer)["eos_token_id"]
    stop = frozenset(ends if isinstance(ends, list) else [ends])
    run_on = resolved.stop if isinstance(resolved, Template) else ()
    requests: list[Request] = []
    numbers: list[int] = []
    for number, (messages, sampling) in enumerate(conversations):
        prompt = render(messages, resolved, tokenizer, add_generation_prompt=True).ids
        if len(prompt) >= context_length(model.config):
            yield number, Reply("", 0, "too long")
            continue
        until = {"stop_ids": sampling.stop_ids | stop, "stop_strings": (*sampling.stop_strings, *run_on)}
        requests.append(Request(prompt, replace(sampling, **until)))
        numbers.append(number)
    texts, tokens = [""] * len(requests), [0] * len(requests)
    for event in events(model, requests, tokenizer):
        texts[event.request] += event.text
        tokens[event.request] += event.id is not None
        if event.finish is not None:
            yield numbers[event.request], Reply(texts[event.request].strip(), tokens[event.request], event.finish)
