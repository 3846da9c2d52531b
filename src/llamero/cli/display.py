"""What people see: progress bars, tables, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from llamero.core import progress, world
from llamero.publish.measurements import MT_BENCH, PRINTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.core.errors import LlameroError
    from llamero.core.results import Result
    from llamero.data.stats import Lengths, SourceStats
    from llamero.pipeline import Outcome, Row
    from llamero.quantize.gate import Verdict

out = Console(emoji=False)  # a place such as `file.jsonl:100:` is no emoji
err = Console(stderr=True, emoji=False)


class _Remaining(TimeRemainingColumn):
    """How long it still takes, where it is known how much there is to do."""

    def render(self, task: Task) -> Text:
        """Return it, or nothing."""
        return Text() if task.total is None else Text.assemble(super().render(task), " left")


class Bars:
    """Progress bars on standard error while a block runs, where that is a terminal."""

    def __init__(self) -> None:
        self._shown = err.is_terminal and world.rank() == 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            _Remaining(),
            console=err,
            transient=True,
        )

    def __enter__(self) -> None:
        if self._shown:
            self._progress.start()
            progress.install(self)

    def __exit__(self, *_: object) -> None:
        if self._shown:
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


def say_row(row: Row) -> None:
    """Say that an artifact was made."""
    if row.state == "made":
        err.print(f"  made [bold]{escape(row.stage)}[/bold] in {row.seconds:.1f} s")


def say_outcome(outcome: Outcome) -> None:
    """Say what a run did, and what to do with it."""
    table = Table("stage", "", "seconds", title="What was done")
    for row in outcome.rows:
        table.add_row(row.path.name, row.state, f"{row.seconds:.1f}" if row.state == "made" else "")
    out.print(table)
    say_left_out(outcome.left_out)
    say_faults(outcome.faults)
    if outcome.results:
        say_results(outcome.results)
    if all(row.state == "kept" for row in outcome.rows):
        out.print("nothing to do: everything is there already")
    out.print(f"all of it stands in {outcome.rows[0].path.parent}", soft_wrap=True)
    if outcome.release is not None:
        out.print(f"release: [bold]{outcome.release}[/bold]", soft_wrap=True)
    if outcome.model is not None:
        out.print(f"talk to it: llamero chat {outcome.model}", soft_wrap=True)


def say_left_out(variants: Mapping[str, str]) -> None:
    """Say which of the default variants are not made, and why."""
    if variants:
        out.print(f"{len(variants)} of the default variants cannot be made of this model:", highlight=False)
    for name, why in variants.items():
        out.print(f"  {name}: {why}", highlight=False, soft_wrap=True)


def say_faults(verdicts: Mapping[str, Verdict]) -> None:
    """Say which variants are not published, or are all the same, and what is wrong with them."""
    for name, verdict in verdicts.items():
        if verdict.reason is None:
            continue
        said = "published all the same" if verdict.published else "not published"
        out.print(
            f"[bold]{said}[/bold]: {escape(name)}: {escape(str(verdict.reason))}", highlight=False, soft_wrap=True
        )


def say_results(found: Sequence[Result]) -> None:
    """Show measurements, a table for each task."""
    groups: dict[str, list[Result]] = {}
    for result in found:
        if not result.metrics:
            continue
        about = result.inputs.get("text")
        groups.setdefault(f"{result.task} ({about})" if about else result.task, []).append(result)
    for title, results in groups.items():
        keys = dict.fromkeys(key for result in results for key in result.metrics if not key.endswith("_stderr"))
        names = [key.rpartition("/")[2] for key in keys]
        if len(keys) > _MOST_COLUMNS:  # a line for each number
            table = Table("", *(escape(result.model) for result in results))
            for key, name in zip(keys, names, strict=True):
                table.add_row(name, *(_measured(result, key) for result in results))
        else:
            table = Table("model", *names)
            for result in results:
                table.add_row(result.model, *(_measured(result, key) for key in keys))
        table.title, table.caption = title, results[0].protocol
        out.print(table)
    for result in found:
        for said in result.samples:
            out.print(f"[bold]> {escape(said['prompt'])}[/bold]\n{escape(said['answer'])}  [dim]({result.model})[/dim]")
    for note in dict.fromkeys(note for result in found for note in result.notes):
        out.print(f"note: {note}", highlight=False)


_MOST_COLUMNS = 8
_MT_BENCH = {metric.key: metric for metric in PRINTED[MT_BENCH].metrics}
"""Are published to five decimals."""


def _measured(result: Result, key: str) -> str:
    if key not in result.metrics:
        return ""
    if result.task == MT_BENCH and (metric := _MT_BENCH.get(key)):
        return metric.show(result.metrics)
    error = result.metrics.get(f"{key}_stderr")
    return _number(result.metrics[key]) + (f" ± {_number(error)}" if error is not None else "")


def _number(value: float) -> str:
    if isinstance(value, float) and 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def size(bytes: int) -> str:
    """Return a size in GB, or in MB if it is small."""
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e8 else f"{bytes / 1e6:.2f} MB"


def say_error(error: LlameroError) -> None:
    """Say what is wrong, where, and the way out."""
    where = f"{error.where}: " if error.where else ""
    err.print(f"[bold red]error[/bold red] {escape(where + error.problem)}", highlight=False, soft_wrap=True)
    if error.fix:
        err.print(f"  fix: {escape(error.fix)}", highlight=False, soft_wrap=True)


def say_statistics(title: str, parts: Sequence[SourceStats], whole: SourceStats) -> None:
    """Show what became of the samples of each source, and below it why some were not taken."""
    table = Table("source", title=title)
    for column in ("samples", "taken", "tokens", "learned", "turns", "median", "longest"):
        table.add_column(column, justify="right")
    for part in [*parts, *([whole] if len(parts) > 1 else [])]:
        copies = f" (+{part.repeated:,})" if part.repeated else ""
        learned = part.supervised_tokens / (part.tokens or 1)
        cells = [f"{part.samples:,}", f"{part.accepted:,}{copies}", f"{part.tokens:,}", f"{learned:.1%}"]
        cells += [f"{part.turns:,}", f"{part.quantile(0.5):,}", f"{part.longest:,}"]
        table.add_row(escape(part.name), *cells, end_section=part is parts[-1])
    out.print(table)
    if whole.unknown_tokens:
        out.print(f"unknown tokens: {whole.unknown_tokens:,}", highlight=False)
    for label, counts in (("skipped", whole.skipped), ("left out", whole.left_out), ("languages", whole.languages)):
        if counts:
            said = ", ".join(f"{reason} ({number:,})" for reason, number in counts.most_common())
            out.print(f"{label}: {escape(said)}", highlight=False)


_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_ROWS = 24


def say_lengths(lengths: Lengths, *, width: int = 40, mark: int | None = None) -> None:
    """Show how many documents are how long, and where the mark lies."""
    bars = lengths.bars()
    together = -(-len(bars) // _MOST_ROWS)
    groups = [bars[first : first + together] for first in range(0, len(bars), together or 1)]
    counts = [sum(bar.documents for bar in group) for group in groups]
    most = max(counts, default=0)
    table = Table("tokens", "documents", Column("", justify="right"), box=None, title="how long documents are")
    for group, count in zip(groups, counts, strict=True):
        first, last = group[0].start, group[-1].stop - 1
        here = " ◀" if mark is not None and first <= mark <= last else ""
        table.add_row(
            f"{first:,}" if first == last else f"{first:,}–{last:,}", block(count / most, width) + here, f"{count:,}"
        )
    out.print(table, highlight=False)


def block(share: float, width: int) -> str:
    """Return a bar of block characters, an eighth of one at the least where there is anything."""
    eighths = max(round(share * width * 8), 1) if share else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
