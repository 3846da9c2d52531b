"""Commands about data: tokenize a recipe's mixtures, look into a dataset, take over a published mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.markup import escape
from rich.text import Text

from llamero.cli.display import Bars, err, out, say_lengths, say_row, say_statistics
from llamero.cli.options import OutDir, Override, Recipe
from llamero.core import world
from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from llamero.corpus.dataset import Dataset
    from llamero.data.inspect import Piece, Sample, Turn
    from llamero.data.stats import SourceStats
    from llamero.recipe.schema import Recipe as ParsedRecipe

app = App(name="data", help="Tokenize mixtures, look into datasets.")


@app.command
def tokenize(
    recipe: Recipe,
    *,
    mixture: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    out_dir: OutDir = None,
    workers: int | None = None,
    set_: Override = (),
) -> None:
    """Tokenize the mixtures of a recipe, and stop there.

    Parameters
    ----------
    mixture
        Name of a mixture; may be given several times. All by default.
    out_dir
        Run directory; runs/NAME by default. Run again to continue.
    workers
        Processes that tokenize; one per core by default.
    set_
        Override a key, as for `run`.
    """
    from llamero import pipeline
    from llamero.core import artifact
    from llamero.data import stats
    from llamero.recipe.load import load

    parsed = load(recipe, set_ if workers is None else (*set_, f"parallel.workers={workers}"))
    wanted = _mixtures(mixture, parsed, recipe)
    target = out_dir or Path("runs") / parsed.name
    with Bars():
        outcome = pipeline.run(parsed, root=recipe.parent, out=target, on_row=say_row, datasets=wanted)
    for row in outcome.rows if world.rank() == 0 else ():
        if row.stage != "tokenizer":
            summary = artifact.read(row.path).summary
            for split in stats.splits(summary):
                say_statistics(f"{summary['mixture']}, {split}", *stats.describe(summary, split))
            for said in _found(summary):
                out.print(escape(said), highlight=False)
            out.print(f"{row.state}: {escape(str(row.path))}", highlight=False, soft_wrap=True)


def _found(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was found before anything was tokenized, and what one should be warned of."""
    if "decontamination" in summary:
        yield f"test sets: {summary['decontamination']['statement']}"
    if "duplicates" in summary:
        found = summary["duplicates"]
        alike = found["within_sources"] + found["across_sources"]
        what = "left out" if found["dropped"] else "kept"
        yield f"near-duplicates: {alike:,} of {found['samples']:,} samples, {what}"
    if summary.get("lengthen", {}).get("warning"):
        yield f"lengthen: {summary['lengthen']['warning']}"


def _mixtures(asked: Sequence[str], recipe: ParsedRecipe, where: Path) -> Collection[str]:
    known = recipe.data.mixtures
    for name in asked:
        if name not in known:
            raise LlameroError(f"there is no mixture `{name}`", where=where, fix=did_you_mean(name, known))
    if not known:
        raise LlameroError("the recipe has no mixtures", where=where, fix="give it some under `data.mixtures`")
    return asked or known


@app.command
def inspect(
    dataset: Annotated[Path, Parameter(help="Artifact of a mixture, or any directory with Megatron pairs.")],
    *,
    source: str | None = None,
    samples: int = 5,
    split: str = "train",
    seed: int = 0,
    lengths: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Show the statistics of a tokenized dataset, how long its documents are, and samples token by token.

    Parameters
    ----------
    source
        Show this source only.
    samples
        Samples of each source to show; 0 shows none.
    split
        train or val.
    seed
        Decides which samples are drawn.
    lengths
        Also say what becomes of the documents at this sequence length.
    tokenizer
        Directory of the tokenizer; that of an artifact is found by itself.
    """
    from llamero.corpus.dataset import Dataset
    from llamero.data import inspect, stats

    if samples < 0 or (lengths is not None and lengths < 1):
        raise LlameroError("--samples must be at least 0, --lengths at least 1")
    opened = Dataset(dataset)
    opened.stem(split, "text")  # says which splits there are
    with Bars():
        summary = inspect.statistics(opened)
    parts, whole = stats.describe(summary, split)
    drawn = inspect.draw(opened, split, summary, seed=seed, count=samples)
    if source is not None:
        parts, drawn = _only(source, parts, drawn, dataset)
        whole = stats.total(parts)
    say_statistics(f"{summary['mixture']}, {split}", parts, whole)
    say_lengths(whole.lengths, mark=lengths)
    if lengths is not None:
        _say_at_length(opened, split, lengths)
    if samples:
        _say_samples(opened, split, drawn, tokenizer)


def _only(
    source: str, parts: Sequence[SourceStats], drawn: Mapping[str, list[int]], where: Path
) -> tuple[list[SourceStats], dict[str, list[int]]]:
    chosen = [part for part in parts if part.name == source]
    if not chosen:
        fix = did_you_mean(source, (part.name for part in parts))
        raise LlameroError(f"there is no source `{source}`", where=where, fix=fix)
    return chosen, {name: numbers for name, numbers in drawn.items() if name == source}


def _say_at_length(dataset: Dataset, split: str, sequence: int) -> None:
    from llamero.data.inspect import at_length

    found = at_length(dataset, split, sequence)
    out.print(
        f"at a sequence length of {sequence:,}: {found.longer:,} documents of the split are longer, which cuts off "
        f"{found.lost:,} tokens; packed into {found.rows:,} rows, {found.fill:.1%} filled",
        highlight=False,
    )


def _say_samples(dataset: Dataset, split: str, drawn: Mapping[str, list[int]], directory: Path | None) -> None:
    from llamero.data import inspect
    from llamero.text.tokenizer import load_tokenizer

    tokenizer = inspect.find_tokenizer(dataset) if directory is None else load_tokenizer(directory)
    if tokenizer is None:
        out.print("to see samples, name the tokenizer of this dataset: --tokenizer DIR")
        return
    for source, samples in inspect.samples(dataset, split, drawn, tokenizer).items():
        for sample in samples:
            out.print()
            said = f"{source}, document {sample.number:,}: {sample.tokens:,} tokens, {sample.learned:,} learned"
            out.print(Text(said, style="bold"), soft_wrap=True)
            for line in _lines(sample):
                out.print(line, soft_wrap=True)


def _lines(sample: Sample) -> Iterator[Text]:
    for turn in sample.head:
        yield _line(turn)
    if sample.cut:
        yield Text(f"   … {sample.cut:,} tokens left out …", style="italic")
    for turn in sample.tail:
        yield _line(turn)


_LEARNED, _READ = ("underline green", "underline bright_green"), ("default", "bright_blue")
"""Styles of neighbouring tokens, in turn."""
_OPEN, _CLOSE = "⟦", "⟧"
"""Stand around what is learned where text has no style."""


def _line(turn: Turn) -> Text:
    line = Text(f"{turn.speaker:>9} ", style="default")
    line.stylize("bold", 0, 10)
    within = False
    for number, piece in enumerate(turn.pieces):
        if not out.is_terminal and piece.learned != within:
            line.append(_CLOSE if within else _OPEN)
            within = piece.learned
        line.append(piece.text, style=_style(piece, number % 2))
    if within:
        line.append(_CLOSE)
    line.right_crop(line.plain.endswith("\n"))  # the next turn begins a line anyway
    return line


def _style(piece: Piece, turn: int) -> str:
    if piece.special:
        return "reverse underline green" if piece.learned else "reverse"
    return "dim" if piece.scaffold else (_LEARNED if piece.learned else _READ)[turn]


@app.command(name="import")
def import_(
    file: Annotated[Path, Parameter(help="YAML file of Open-Assistant's pretokenizer, or a model card with one.")],
    section: Annotated[str, Parameter(help="Name of the section; several with commas between.")],
    *,
    out_file: Annotated[Path | None, Parameter(name="--out")] = None,
) -> None:
    """Turn a published mixture into the `data:` of a recipe, naming what has no counterpart.

    Parameters
    ----------
    out_file
        File to write; standard output by default.
    """
    from llamero.core.files import write_atomically
    from llamero.recipe.openassistant import convert

    if out_file is not None and out_file.exists():
        raise LlameroError("is there already", where=out_file, fix="name another file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlameroError("not a text file in UTF-8", where=file, fix="name a YAML file or a model card") from error
    converted = convert(text, section, where=str(file))
    if out_file is None:
        out.print(converted.yaml, end="", markup=False, highlight=False, soft_wrap=True)
    else:
        write_atomically(out_file, converted.yaml)
    for note in converted.notes:
        err.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for key in converted.unmapped:
        err.print(f"[bold]not taken over[/bold]: {escape(key)}", highlight=False, soft_wrap=True)
