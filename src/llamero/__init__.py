"""llamero: from a Llama's base weights to a published, measured, served release.

The library is the command line's twin; torch is loaded when a function that needs it is first called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.infer.generate import Completion
    from llamero.infer.sampler import Sampling
    from llamero.infer.score import Pair, Scored, Softmax
    from llamero.model.llama import Llama
    from llamero.pipeline import Outcome
    from llamero.text.messages import Message
    from llamero.text.pieces import Rendered
    from llamero.text.tokenizer import Tokenizer

__all__ = ["generate", "load_model", "load_tokenizer", "render", "run", "score"]


def load_model(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str = "cpu",
    products: Literal["fast", "plain"] = "fast",
) -> Llama:
    """Return a model as a torch module: int64 ids [batch, time] → logits [batch, time, vocabulary].

    Args:
        path: Hugging Face model directory (plain, quantized, PEFT's of an adapter), GGUF file, or
            `owner/name[:revision]` of the hub.
        dtype: Dtype of weights and products; that of the files by default.
        device: Where to put it.
        products: How quantized layers compute: `fast` lets their codes rest in another form than that of the files,
            `plain` dequantizes every time; `llamero.model.linear.ways` says what became of it.

    Raises:
        LlameroError: The directory is not a model, or not one that we understand in full.
    """
    from llamero.core.download import resolve_model
    from llamero.core.errors import LlameroError, did_you_mean
    from llamero.model.load import DTYPES
    from llamero.model.load import load_model as load

    if dtype is not None and dtype not in DTYPES:
        raise LlameroError(f"unknown dtype `{dtype}`", fix=did_you_mean(dtype, DTYPES))
    return load(resolve_model(path), dtype=None if dtype is None else DTYPES[dtype], device=device, products=products)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a model: of its directory, `tokenizer.json`, `tokenizer.model`, GGUF file or hub name."""
    from llamero.core.download import resolve_model
    from llamero.text.tokenizer import load_tokenizer as load

    if Path(path).is_file():
        return load(Path(path))
    directory = resolve_model(path)
    if (directory / "adapter_config.json").exists() and not any(directory.glob("tokenizer*")):
        from llamero.model.adapter_files import base_of

        directory = base_of(directory)
    return load(directory)


def render(
    messages: Sequence[Message | Mapping[str, str]],
    template: str,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Return a conversation as text, ids, a role per token, and which tokens are learned.

    Args:
        messages: `{"role": "user", "content": "…"}` and so on.
        template: `chatml`, `llama-3`, …; `auto` is the tokenizer's own.
        tokenizer: From `load_tokenizer`.
        add_generation_prompt: End with the header of the assistant's answer.
    """
    from llamero.text.render import render as render_

    return render_(messages, template, tokenizer, add_generation_prompt=add_generation_prompt)


def score(
    model: Llama, requests: Sequence[Pair], *, max_length: int | None = None, softmax: Softmax = "float32"
) -> list[Scored]:
    """Return the log-likelihood in nats of each continuation after its context, in the order of the requests.

    No token is computed twice: requests share whatever they begin with alike.

    Args:
        model: From `load_model`.
        requests: (context, continuation) ids, as the model sees them: nothing is added, a BOS least of all.
        max_length: Tokens that the model may see at a time; contexts lose what is too much on their left. Its own
            context by default.
        softmax: `float32`, or `model` to round log-probabilities to the dtype of the model as older harnesses do.

    Returns:
        `log_likelihood` (nats, summed over the continuation), `greedy`, `tokens` (of the continuation), `truncated`
        (tokens that the context lost) for each.

    Raises:
        LlameroError: A request cannot be scored, or the answer is not a number; `where` names it by its number.
    """
    from llamero.infer.likelihood import log_likelihoods

    return log_likelihoods(model, requests, max_length=max_length, softmax=softmax)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Return the answers to prompts, in their order, computed together; each draws as if it were alone.

    Args:
        model: From `load_model`.
        prompts: Ids of each prompt, as the model sees them.
        sampling: `temperature` (0: the likeliest token each time), `top_p`, `top_k`, `repetition_penalty`, `seed`,
            `max_new_tokens`, `stop_ids`, `stop_strings`, for all prompts; those of `infer.sampler.Sampling` by default.
        tokenizer: From `load_tokenizer`; without it answers have no `text`, and there are no stop strings.

    Returns:
        `ids` (without the token that stops), `text`, `finish` (`stop` or `length`) for each.
    """
    from llamero.infer.generate import generate as generate_
    from llamero.infer.sampler import Sampling

    how = sampling if isinstance(sampling, Sampling) else Sampling(**(sampling or {}))
    return generate_(model, prompts, how, tokenizer)


def run(recipe: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = ()) -> Outcome:
    """Run a recipe, making what is not there yet, and return what was done and measured.

    Args:
        recipe: YAML file.
        out: Run directory; `runs/<name>` by default.
        overrides: `key.key=value`, as with `--set`.
    """
    from llamero import pipeline
    from llamero.recipe.load import load

    parsed = load(Path(recipe), overrides)
    return pipeline.run(parsed, root=Path(recipe).parent, out=Path(out or Path("runs") / parsed.name))
