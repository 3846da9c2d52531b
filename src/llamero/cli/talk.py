"""Commands that talk with a model: generate, chat."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape

from llamero.cli.display import Bars, err, out, say_error, size
from llamero.cli.options import Model, import_uninterrupted
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from llamero.infer.chat import Chat
    from llamero.infer.sampler import Sampling
    from llamero.model.llama import Llama
    from llamero.text.tokenizer import Tokenizer


@Parameter(name="*")
@dataclass(frozen=True)
class Answering:
    """How a model answers."""

    system: str = ""
    """System message."""
    template: str = "auto"
    """Chat template; auto is the model's own."""
    temperature: float | None = None
    """0 is greedy; by default what the model's generation_config.json says, else 0.7."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this probability; by default as the model says, else 1."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens, 0 keeps all; by default as the model says, else 0."""
    repetition_penalty: float | None = None
    """Above 1 makes repetition less likely; by default as the model says, else 1."""
    max_new_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    """Same seed, same text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision to compute in."""
    products: Literal["fast", "plain"] = "fast"
    """Of quantized layers: fast lets codes rest as the fastest product wants them, plain dequantizes every time."""

    def sampling(self, directory: Path) -> Sampling:
        """Return how tokens are chosen: as asked, else as the model's directory says."""
        from llamero.infer.chat import sampling_of

        asked = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        }
        said = {key: value for key, value in asked.items() if value is not None}
        return sampling_of(directory, said, max_new_tokens=self.max_new_tokens, seed=self.seed)

    def load(self, model: Path) -> tuple[Llama, Tokenizer]:
        """Return a model and its tokenizer."""
        import llamero
        from llamero.infer.context import check_tokenizer
        from llamero.model.linear import ways

        with Bars():
            loaded = llamero.load_model(model, dtype=self.dtype, products=self.products)
            tokenizer = llamero.load_tokenizer(model)
        check_tokenizer(loaded, tokenizer, where=model)
        weights = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
        unit = 1 if sys.platform == "darwin" else 1024  # systems differ in what they count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        err.print(f"[dim]model {size(weights)} in memory, peak of the process {size(peak)}[/dim]", highlight=False)
        for way, layers in ways(loaded).items():
            err.print(f"[dim]{layers} quantized layers: {escape(way)}[/dim]", highlight=False)
        return loaded, tokenizer


_AS_USUAL = Answering()


def generate(
    model: Model,
    prompt: Annotated[
        str | None, Parameter(help="What the user says; left out, it is read from standard input.")
    ] = None,
    *,
    raw: bool = False,
    answering: Answering = _AS_USUAL,
) -> None:
    """Answer one prompt, streaming.

    Parameters
    ----------
    raw
        Continue the prompt as it is, without a template.
    """
    import_uninterrupted("llamero.infer.chat")
    from llamero.core.download import resolve_model
    from llamero.infer.chat import Chat, continue_text

    directory = resolve_model(model)
    sampling = answering.sampling(directory)
    loaded, tokenizer = answering.load(directory)
    said = sys.stdin.read() if prompt is None else prompt
    if raw:
        pieces = continue_text(loaded, tokenizer, said, sampling)
    else:
        chat = Chat(loaded, tokenizer, template=answering.template, system=answering.system)
        pieces = chat.answer(said, sampling)
    for piece in pieces:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    out.print()


def chat(model: Model, *, answering: Answering = _AS_USUAL) -> None:
    """Talk with a model. /system TEXT, /reset and /quit are commands; Ctrl-C stops an answer, Ctrl-D ends."""
    import_uninterrupted("llamero.infer.chat")
    from llamero.core.download import resolve_model
    from llamero.infer.chat import Chat

    directory = resolve_model(model)
    sampling = answering.sampling(directory)
    loaded, tokenizer = answering.load(directory)
    talk = Chat(loaded, tokenizer, template=answering.template, system=answering.system)
    while True:
        try:
            said = out.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        command, _, rest = said.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            system = rest if command == "/system" else answering.system
            talk = Chat(loaded, tokenizer, template=answering.template, system=system)
        elif command.startswith("/"):
            out.print(f"unknown command {escape(command)}; there are /system TEXT, /reset, /quit")
        elif said:
            _answer(talk, said, sampling)


def _answer(talk: Chat, said: str, sampling: Sampling) -> None:
    try:
        for piece in talk.answer(said, sampling):
            out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()
    except KeyboardInterrupt:
        out.print("  (stopped)")
    except LlameroError as error:
        say_error(error)
