"""A page about a dataset: numbers, lengths, languages, what was left out, and samples token by token."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from llamero.core import files
from llamero.data import inspect, stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.corpus.dataset import Dataset
    from llamero.data.stats import SourceStats
    from llamero.text.tokenizer import Tokenizer

PAGE, PICTURE = "index.html", "lengths.png"
SAMPLES = 5
"""Samples shown of each source."""
INK, MUTED, ACCENT = "#1f2933", "#8a94a0", "#2563a8"

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["count"] = "{:,.0f}".format
_ENVIRONMENT.filters["percent"] = "{:.1%}".format


def write(directory: Path, summary: Mapping[str, Any], dataset: Dataset, tokenizer: Tokenizer, *, seed: int) -> None:
    """Write `index.html`, which needs no other file, and `lengths.png`.

    Args:
        directory: Where to.
        summary: Of the dataset, as in its artifact.
        dataset: Whose samples are shown.
        tokenizer: That it was made with.
        seed: Decides which samples are drawn.
    """
    drawn = inspect.draw(dataset, "train", summary, seed=seed, count=SAMPLES) if "train" in dataset.splits else {}
    page = _ENVIRONMENT.get_template("page.html.jinja").render(
        name=summary["mixture"],
        splits=[Split(split, *stats.describe(summary, split)) for split in stats.splits(summary)],
        samples=inspect.samples(dataset, "train", drawn, tokenizer) if drawn else {},
        seed=seed,
    )
    files.write_atomically(directory / PAGE, page)
    draw_lengths(directory / PICTURE, summary)


class Split(NamedTuple):
    """What the page says of a split."""

    name: str
    parts: Sequence[SourceStats]
    whole: SourceStats

    @property
    def rows(self) -> list[SourceStats]:
        """Return the rows of its table: the total only where it is one of several."""
        return [*self.parts, *([self.whole] if len(self.parts) > 1 else [])]

    @property
    def histograms(self) -> list[Histogram]:
        """Return one picture for each source that has documents, all with the same axis of lengths."""
        bars = self.whole.lengths.bars()
        return [_histogram(part, first=bars[0].start, last=bars[-1].stop) for part in self.parts if part.documents]

    @property
    def losses(self) -> list[tuple[str, str, str, int]]:
        """Return source, stage, reason and number (of rows, samples or threads) for all that was not taken."""
        return [
            (part.name, stage, reason, number)
            for part in self.parts
            for stage, reasons in (("before selection", part.left_out), ("after selection", part.skipped))
            for reason, number in reasons.most_common()
        ]


class Histogram(NamedTuple):
    """A picture of lengths, in a box of 320 × 90."""

    part: SourceStats
    bars: list[tuple[float, float, float, str]]
    """Left edge, width, height, and what it says of each."""
    ticks: list[tuple[float, str]]
    """Place and label of each tick of the axis."""


WIDTH, HEIGHT = 320.0, 90.0


def _histogram(part: SourceStats, *, first: int, last: int) -> Histogram:
    low, high = math.floor(math.log2(max(1, first))), math.ceil(math.log2(max(2, last)))
    scale = WIDTH / (high - low)

    def place(tokens: int) -> float:
        return max(0.0, math.log2(max(1, tokens)) - low) * scale

    bars = part.lengths.bars()
    most = max(bar.documents for bar in bars)
    drawn = [
        (
            place(bar.start),
            max(1.0, place(bar.stop) - place(bar.start) - 0.6),
            bar.documents / most * HEIGHT,
            f"{bar.start:,} to {bar.stop - 1:,} tokens: {bar.documents:,}",
        )
        for bar in bars
        if bar.documents
    ]
    powers = range(low, high + 1)[:: math.ceil((high - low) / 6)]
    return Histogram(part, drawn, [(place(2**power), short(2**power)) for power in powers])


def short(tokens: int) -> str:
    """Return a power of two as people say it: 512, 4k, 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)


def draw_lengths(png: Path, summary: Mapping[str, Any]) -> None:
    """Draw how long the documents of each source of the training split are, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    parts = [part for part in stats.describe(summary, "train")[0] if part.documents]
    figure = Figure(figsize=(8, 1.0 + 1.5 * len(parts)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0] if parts else []
    for axes, part in zip(rows, parts, strict=True):
        bars = part.lengths.bars()
        edges, widths = [max(bar.start, 0.75) for bar in bars], [bar.stop - max(bar.start, 0.75) for bar in bars]
        axes.bar(edges, [bar.documents for bar in bars], widths, align="edge", color=ACCENT, edgecolor="white", lw=0.4)
        axes.axvline(part.quantile(0.5), color=INK, linewidth=1, linestyle=(0, (4, 2)))
        title = f"{part.name}: {part.documents:,} documents, half of them up to {part.quantile(0.5):,} tokens"
        axes.set_title(title.replace("$", r"\$"), loc="left", color=INK, fontsize=9.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=24))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(int(tokens)) if tokens >= 1 else ""))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(colors=MUTED, labelsize=8.5)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
    if parts:
        rows[-1].set_xlabel("tokens of a document (four steps to each doubling)", color=INK)
        figure.supylabel("documents", color=INK, fontsize=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks: boxes
        figure.savefig(png, metadata={"Software": None})
