"""llamero: from a Llama's base weights to a published, measured, served release.

The library is the command line's twin; torch is loaded when a function that needs it is first called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.model.llama import Llama
    from llamero.pipeline import Outcome
    from llamero.text.messages import Message
    from llamero.text.pieces import Rendered
    from llamero.text.tokenizer import Tokenizer

__all__ = ["load_model", "load_tokenizer", "render", "run"]


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
