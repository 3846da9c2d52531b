"""The command line: one function a command, and the only place that prints."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Deferred, Interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.core.results import Result
    from llamero.infer.chat import Chat
    from llamero.infer.sampler import Sampling
    from llamero.model.llama import Llama
    from llamero.pipeline import Outcome, Row
    from llamero.text.tokenizer import Tokenizer

# On a machine that does other work too, threads that wait by spinning slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

out = Console()
err = Console(stderr=True)

app = App(
    name="llamero",
    help="From a Llama's base weights to a published, measured, served release: one recipe in.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `main` says what is kept
)

Override = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False, negative=())]
Recipe = Annotated[Path, Parameter(help="YAML file that describes the release.")]
Model = Annotated[str, Parameter(help="Model directory, or owner/name[:revision] of the hub.")]


@app.command
def run(
    recipe: Recipe, *, out_dir: Annotated[Path | None, Parameter(name="--out")] = None, set_: Override = ()
) -> None:
    """Make a release: every stage that is not there yet, from data to the card.

    Parameters
    ----------
    out_dir
        Run directory; runs/NAME by default. Run again to continue or to redo what a change touches.
    set_
        Override a key: --set train.sft.lr=1e-5 (a list item goes by its name or number).
    """
    from llamero import pipeline
    from llamero.recipe.load import load

    parsed = load(recipe, set_)
    target = out_dir or Path("runs") / parsed.name
    _import_uninterrupted("llamero.model.load")
    with _Bars():
        outcome = pipeline.run(parsed, root=recipe.parent, out=target, on_row=_say_row)
    _say_outcome(outcome)


@app.command
def check(
    recipe: Recipe, *, out_dir: Annotated[Path | None, Parameter(name="--out")] = None, set_: Override = ()
) -> None:
    """Validate a recipe and print what would run; trains nothing and needs no GPU.

    Parameters
    ----------
    out_dir
        Run directory to compare with; runs/NAME by default.
    set_
        Override a key, as for `run`.
    """
    from llamero import pipeline
    from llamero.core import artifact
    from llamero.recipe.load import load

    parsed = load(recipe, set_)
    target = out_dir or Path("runs") / parsed.name
    plan = pipeline.Plan(parsed, recipe.parent, target)
    table = Table("stage", "digest", "state", title=f"{recipe}: {parsed.name}")
    for stage in plan.stages:
        for name, identity in stage.identities.items():
            there = artifact.find(target, identity) is not None
            table.add_row(name, identity.digest[: artifact.DIGITS], "there" if there else "to make")
    out.print(table)


@app.command
def evaluate(
    model: Model,
    *,
    tasks: str,
    data: Path | None = None,
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=False, negative=())] = (),
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    limit: int | None = None,
    subjects: int | None = None,
    truthfulqa: Literal["2021", "later"] | None = None,
    window: int | None = None,
    stride: int | None = None,
    template: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure a model.

    Parameters
    ----------
    tasks
        h4, arc_challenge, hellaswag, mmlu, truthfulqa_mc, perplexity, samples or toy_world.
    data
        Directory of the benchmark files (for h4 and its parts).
    text
        Text file to measure perplexity on; may be given several times.
    prompt
        What to say to the model (samples); may be given several times.
    limit
        Questions of each task.
    subjects
        MMLU subjects to take, the first ones by name.
    truthfulqa
        Edition of TruthfulQA: 2021 by default, which the published scores used.
    window
        Tokens of a perplexity window, 512 by default.
    stride
        Tokens between windows, 256 by default.
    template
        Chat template of prompts (toy_world).
    json
        Also write the results to this file.
    """
    from llamero.core.download import resolve_model
    from llamero.core.results import write_file
    from llamero.evaluate.config import named

    given: dict[str, object] = {
        "data": None if data is None else str(data.resolve()),
        "texts": {path.name: str(path.resolve()) for path in text} or None,
        "prompts": list(prompt) or None,
        "limit": limit,
        "subjects": subjects,
        "truthfulqa": truthfulqa,
        "window": window,
        "stride": stride,
    }
    task = named(tasks, {key: value for key, value in given.items() if value is not None})
    directory = resolve_model(model)
    if json is not None and not json.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=json.parent)
    _import_uninterrupted("llamero.evaluate.run")
    from llamero.evaluate.run import run as measure

    with _Bars():
        found = measure(task, model=directory, name=model, template=template, root=Path())
    _say_results(found)
    if json is not None:
        write_file(json, found)


@app.command
def quantize(
    model: Model,
    out_dir: Annotated[Path, Parameter(help="Directory that gets one directory per variant.")],
    *,
    variant: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (
        "gptq-4bit-128g-actorder_True",
    ),
    text: Path,
    sequence: int = 512,
    tokens: int = 65_536,
    damp: float = 0.01,
    sym: bool = True,
) -> None:
    """Quantize a model to one or more variants, from one look at a calibration text.

    Parameters
    ----------
    variant
        gptq-4bit-128g-actorder_True, rtn-4bit-128g and so on; may be given several times.
    text
        Calibration text (a .txt file).
    sequence
        Tokens of a calibration sequence.
    tokens
        Calibration tokens in all.
    damp
        Dampening, as a fraction of the mean of the Hessian's diagonal.
    sym
        Symmetric grids.
    """
    from llamero.core.config import parse
    from llamero.core.download import resolve_model
    from llamero.core.files import disk_errors_named
    from llamero.quantize.config import QuantizeConfig

    calibration = {"text": str(text), "sequence": sequence, "tokens": tokens}
    keys = {"variants": variant, "calibration": calibration, "damp": damp, "sym": sym}
    config: QuantizeConfig = parse(QuantizeConfig, keys)
    directory = resolve_model(model)
    taken = [str(out_dir / name) for name in config.variants if (out_dir / name).exists()]
    if taken:
        raise LlameroError(f"is there already: {', '.join(taken)}", where=out_dir, fix="choose another directory")
    _import_uninterrupted("llamero.quantize.run")
    from llamero.quantize.run import run as make
    from llamero.quantize.sequences import from_text
    from llamero.text.tokenizer import load_tokenizer

    partial = {name: out_dir / f"{name}.partial" for name in config.variants}
    for path in partial.values():
        shutil.rmtree(path, ignore_errors=True)  # of a run that was cut off
    with _Bars(), disk_errors_named(out_dir):
        sequences = from_text(text, load_tokenizer(directory), config.calibration)
        reports = make(config, model=directory, out=lambda variant: partial[variant.name], tokens=sequences)
    for name, path in partial.items():
        path.rename(out_dir / name)
    table = Table("variant", "size", "bits per weight", "error per weight")
    for report in reports:
        bits, error = f"{report.bits_per_weight:.2f}", f"{report.error_per_weight:.3e}"
        table.add_row(report.variant.name, _size(report.size_bytes), bits, error)
    out.print(table)
    out.print(f"written to {out_dir}")


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

        with _Bars():
            loaded, tokenizer = llamero.load_model(model, dtype=self.dtype), llamero.load_tokenizer(model)
        check_tokenizer(loaded, tokenizer, where=model)
        size = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
        unit = 1 if sys.platform == "darwin" else 1024  # systems differ in what they count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        err.print(f"[dim]model {_size(size)} in memory, peak of the process {_size(peak)}[/dim]", highlight=False)
        return loaded, tokenizer


_AS_USUAL = Answering()


@app.command
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
    _import_uninterrupted("llamero.infer.chat")
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


@app.command
def chat(model: Model, *, answering: Answering = _AS_USUAL) -> None:
    """Talk with a model. /system TEXT, /reset and /quit are commands; Ctrl-C stops an answer, Ctrl-D ends."""
    _import_uninterrupted("llamero.infer.chat")
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
        _say_error(error)


@app.command
def watch(
    run_dir: Annotated[Path, Parameter(help="Run directory, for example runs/quickstart.")],
    *,
    to: Literal["tensorboard", "wandb"] = "tensorboard",
    follow: bool = False,
) -> None:
    """Show the training curves of a run in TensorBoard or Weights & Biases.

    Parameters
    ----------
    to
        Where to show them; TensorBoard files go to RUN/tensorboard.
    follow
        Keep looking for new steps until Ctrl-C.
    """
    from llamero.engine.watch import watch as show

    steps = show(run_dir, to, follow=follow)
    out.print(f"{steps} steps shown")
    if to == "tensorboard":
        out.print(f"look at them: tensorboard --logdir {run_dir / 'tensorboard'}")


def _import_uninterrupted(module: str) -> None:
    """Import what takes a second; a Ctrl-C in the middle of it would be lost in some library."""
    with Deferred() as stop:
        importlib.import_module(module)
    if stop.asked:
        raise KeyboardInterrupt


# -- what people see


class _Bars:
    """Progress bars on standard error while a block runs; a plain line per loop where there is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
        )

    def __enter__(self) -> None:
        if err.is_terminal:
            self._progress.start()
            progress.install(self)

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._progress.stop()
            progress.install(None)

    def start(self, name: str, *, total: int | None, unit: str, done: int) -> int:
        """Open a line."""
        return self._progress.add_task(escape(name), total=total, completed=done, unit=unit, note="")

    def advance(self, line: int, amount: int, note: str) -> None:
        """Move a line on."""
        self._progress.update(TaskID(line), advance=amount, note=note)

    def stop(self, line: int) -> None:
        """Remove a line."""
        self._progress.remove_task(TaskID(line))


def _say_row(row: Row) -> None:
    if row.state == "made":
        err.print(f"  made [bold]{escape(row.stage)}[/bold] in {row.seconds:.1f} s")


def _say_outcome(outcome: Outcome) -> None:
    table = Table("stage", "", "seconds", title="What was done")
    for row in outcome.rows:
        table.add_row(row.path.name, row.state, f"{row.seconds:.1f}" if row.state == "made" else "")
    out.print(table)
    if outcome.results:
        _say_results(outcome.results)
    if all(row.state == "kept" for row in outcome.rows):
        out.print("nothing to do: everything is there already")
    out.print(f"all of it stands in {outcome.rows[0].path.parent}", soft_wrap=True)
    if outcome.release is not None:
        out.print(f"release: [bold]{outcome.release}[/bold]", soft_wrap=True)
    if outcome.model is not None:
        out.print(f"talk to it: llamero chat {outcome.model}", soft_wrap=True)


def _say_results(found: Sequence[Result]) -> None:
    groups: dict[str, list[Result]] = {}
    for result in found:
        if not result.metrics:
            continue
        about = result.inputs.get("text")
        groups.setdefault(f"{result.task} ({about})" if about else result.task, []).append(result)
    for title, results in groups.items():
        keys = dict.fromkeys(key for result in results for key in result.metrics if not key.endswith("_stderr"))
        table = Table("model", *(key.rpartition("/")[2] for key in keys), title=title, caption=results[0].protocol)
        for result in results:
            table.add_row(result.model, *(_measured(result, key) for key in keys))
        out.print(table)
    for result in found:
        for said in result.samples:
            out.print(f"[bold]> {escape(said['prompt'])}[/bold]\n{escape(said['answer'])}  [dim]({result.model})[/dim]")
    for note in dict.fromkeys(note for result in found for note in result.notes):
        out.print(f"note: {note}", highlight=False)


def _measured(result: Result, key: str) -> str:
    if key not in result.metrics:
        return ""
    error = result.metrics.get(f"{key}_stderr")
    return _number(result.metrics[key]) + (f" ± {_number(error)}" if error is not None else "")


def _number(value: float) -> str:
    if isinstance(value, float) and 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _say_error(error: LlameroError) -> None:
    where = f"{error.where}: " if error.where else ""
    err.print(f"[bold red]error[/bold red] {escape(where + error.problem)}", highlight=False, soft_wrap=True)
    if error.fix:
        err.print(f"  fix: {escape(error.fix)}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake is one message and exit code 2, `--debug` shows where it came from."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        app(given)
    except LlameroError as error:
        if debug:
            raise
        _say_error(error)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is None:
            raise
        _say_error(LlameroError(str(error.strerror), where=error.filename))
        sys.exit(2)
    except Interrupted as stopped:
        err.print(f"stopped: {stopped}. Run the same command again to go on.", highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        err.print("stopped. Finished stages are kept; run the same command again to go on.", highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
