"""The picture of a training stage: loss, validation, learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError
from llamero.engine.metrics import read_lines

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

INK, MUTED, ACCENT, WARM = "#1f2933", "#8a94a0", "#2563a8", "#c2410c"


def loss_curve(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw the loss of a stage: every step faintly, their local mean, validations, and the learning rate.

    Args:
        metrics_jsonl: Lines of the stage.
        png: Picture to write.
        title: Its heading.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(metrics_jsonl)
    if not lines:
        raise LlameroError("no metrics of this stage", where=metrics_jsonl, fix="remove the stage and run it again")
    steps = np.array([line["step"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.set_ylim(_limits(loss))
    axes.set_xlim(0, float(steps[-1]) * 1.01)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    _tidy(axes, rate)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, metadata={"Software": None})


def _validation(axes: Axes, lines: list[dict[str, float]]) -> None:
    points = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), "o-", color=WARM, markersize=4.5, linewidth=1, label="validation loss")
    axes.annotate(
        f"{points[-1][1]:.3f}",
        points[-1],
        xytext=(-4, 8),
        textcoords="offset points",
        ha="right",
        color=WARM,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


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


def _tidy(axes: Axes, rate: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    more, named = rate.get_legend_handles_labels()
    axes.legend(handles + more, labels + named, frameon=False, fontsize=8.5, labelcolor=INK, loc="upper right")
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.7)
    for each in (axes, rate):
        for side in ("top", "left", "right"):
            each.spines[side].set_visible(False)
        each.spines["bottom"].set_color(MUTED)
        each.tick_params(colors=MUTED, length=0, labelsize=9)
        each.tick_params(axis="x", length=3)
    rate.yaxis.get_offset_text().set_color(MUTED)
