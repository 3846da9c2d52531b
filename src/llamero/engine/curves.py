"""The picture of a training stage: loss, validation, learning rate; beneath them each source, and accuracies.

Drawn beside the metrics while a stage trains, and into the release.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.engine.metrics import read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

INK, MUTED, ACCENT, WARM = "#1f2933", "#8a94a0", "#2563a8", "#c2410c"
SOURCES = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d", "#4d5b6a")
"""Colours; sources beyond them are not drawn one by one."""

Lines = list[dict[str, float]]


def loss_curve(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw a stage: the loss of every step faintly, its local mean, validations, the learning rate.

    A second panel has the loss of each source where there are several, a third the accuracies, where something was
    measured more than once. The same metrics give the same bytes.

    Args:
        metrics_jsonl: Lines of the stage.
        png: Picture to write; no reader ever sees half of it.
        title: Its heading.

    Raises:
        LlameroError: There are no metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(metrics_jsonl)
    if not lines:
        raise LlameroError("no metrics of this stage", where=metrics_jsonl, fix="remove the stage and run it again")
    sources, accuracies = _sources(lines), _accuracies(lines)
    heights = [4.0, *([2.6] if sources else []), *([1.9] if accuracies else [])]
    figure = Figure(figsize=(8, sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_loss(panels[0], lines)
    if sources:
        _draw_sources(panels[1], lines, sources)
    if accuracies:
        _draw_accuracies(panels[-1], accuracies)
    panels[0].set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    first, last = lines[0]["step"], lines[-1]["step"]
    panels[-1].set_xlim(min(first - 1, 0.99 * last), last + 0.01 * (last - first + 1))
    panels[-1].set_xlabel("step", color=INK)
    picture = io.BytesIO()
    figure.savefig(picture, metadata={"Software": None})
    png.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(png, picture.getvalue())


# -- loss


def _draw_loss(axes: Axes, lines: Lines) -> None:
    import numpy as np

    steps, loss = _curve(lines, "loss")
    rate = axes.twinx()
    axes.set_zorder(rate.get_zorder() + 1)  # the loss lies over the learning rate
    axes.patch.set_visible(False)
    rate.fill_between(
        steps, [line["lr"] for line in lines], color=MUTED, alpha=0.13, linewidth=0, label="learning rate"
    )
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate", color=MUTED)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)

    window = len(loss) // 40
    axes.plot(steps, loss, color=ACCENT, alpha=0.35 if window > 1 else 1.0, linewidth=0.9, label="training loss")
    if window > 1:
        axes.plot(steps, smooth(loss, window), color=ACCENT, linewidth=1.9, label=f"mean of {2 * window + 1} steps")
    _validation(axes, lines)
    held = [line["validation_loss"] for line in lines if "validation_loss" in line]
    axes.set_ylim(_limits(np.concatenate([loss, held])))
    axes.set_ylabel("loss (nats per token)", color=INK)
    _tidy(axes, rate)
    rate.yaxis.get_offset_text().set_color(MUTED)


def _validation(axes: Axes, lines: Lines) -> None:
    steps, losses = _curve(lines, "validation_loss")
    if not len(steps):
        return
    axes.plot(steps, losses, "o-", color=WARM, markersize=4.5, linewidth=1, label="validation loss")
    _say(axes, f"{losses[-1]:.3f}", (float(steps[-1]), float(losses[-1])), WARM)


def _say(axes: Axes, text: str, at: tuple[float, float], color: str) -> None:
    axes.annotate(
        text,
        at,
        xytext=(-4, 8),
        textcoords="offset points",
        ha="right",
        color=color,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


# -- sources


def _sources(lines: Lines) -> list[str]:
    """Return the sources, those with tokens in most steps first."""
    seen: dict[str, int] = {}
    for line in lines:
        for key in line:
            if key.startswith("loss/"):
                seen[key.removeprefix("loss/")] = seen.get(key.removeprefix("loss/"), 0) + 1
    return sorted(seen, key=lambda name: (-seen[name], name))


def _draw_sources(axes: Axes, lines: Lines, sources: Sequence[str]) -> None:
    import numpy as np

    every = []
    for name, color in zip(sources, SOURCES, strict=False):
        steps, loss = _curve(lines, f"loss/{name}")
        window = len(loss) // 40
        mean = smooth(loss, window) if window > 1 else loss
        axes.plot(steps, mean, color=color, linewidth=1.4, label=name)
        axes.plot(*_curve(lines, f"validation_loss/{name}"), "o", color=color, markersize=3.5)
        every.append(mean)
    axes.set_ylim(_limits(np.flip(np.sort(np.concatenate(every)))))  # means have no spikes to leave out
    more = len(sources) - len(SOURCES)
    dots = "; dots are validations" if any(key.startswith("validation_loss/") for key in lines[-1]) else ""
    axes.set_ylabel("loss by source", color=INK)
    _tidy(axes, title=(f"and {more} more sources" if more > 0 else "mean over steps") + dots)


# -- accuracies


def _accuracies(lines: Lines) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return what was measured more than once, by what it is called."""
    keys = {"validation_accuracy": "validation tokens right", "probe_accuracy": "probe questions right"}
    found = {label: _curve(lines, key) for key, label in keys.items()}
    return {label: curve for label, curve in found.items() if len(curve[0]) > 1}


def _draw_accuracies(axes: Axes, curves: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> None:
    for (label, (steps, values)), color in zip(curves.items(), (WARM, SOURCES[2]), strict=False):
        axes.plot(steps, 100 * values, "o-", color=color, markersize=4, linewidth=1, label=label)
        _say(axes, f"{values[-1]:.1%}", (float(steps[-1]), float(100 * values[-1])), color)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(100.0, high + 0.35 * (high - low)))
    axes.set_ylabel("accuracy, %", color=INK)
    _tidy(axes, left=True)


# -- all of them


def _curve(lines: Lines, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    there = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([step for step, _ in there]), np.array([value for _, value in there])


def _limits(loss: NDArray[np.float64]) -> tuple[float, float]:
    """Return the range of the loss, a few single spikes left out at the top."""
    import numpy as np

    finite = loss[np.isfinite(loss)]
    if not len(finite):
        return 0.0, 1.0
    low, start = float(finite.min()), float(finite[0])
    high = max(start, float(np.percentile(finite, 99.5)))
    margin = 0.06 * (high - low) or 0.1
    return max(0.0, low - 2 * margin), high + margin


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of each value with up to `window` neighbours on either side, fewer at the ends."""
    import numpy as np

    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(window, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _tidy(axes: Axes, rate: Axes | None = None, title: str = "", *, left: bool = False) -> None:
    both = [axes, *([] if rate is None else [rate])]
    legends = [each.get_legend_handles_labels() for each in both]
    handles = [handle for of, _ in legends for handle in of]
    labels = [label for _, of in legends for label in of]
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        loc="upper left" if left else "upper right",
        title=title or None,
        title_fontsize=8,
        ncols=1 if len(labels) < 5 else 2,
    )
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.7)
    for each in both:
        for side in ("top", "left", "right"):
            each.spines[side].set_visible(False)
        each.spines["bottom"].set_color(MUTED)
        each.tick_params(colors=MUTED, length=0, labelsize=9)
        each.tick_params(axis="x", length=3)
