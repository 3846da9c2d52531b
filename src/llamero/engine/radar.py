"""Scores by category, one outline for each model around one centre."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any, Literal

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.engine.curves import INK, MUTED, SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.projections.polar import PolarAxes


_LETTERS = 104
"""That the legend has room for beside each other; each name needs eight more."""


def radar(
    models: Mapping[str, Mapping[str, float]], png: Path, title: str, *, categories: Sequence[str], highest: float
) -> None:
    """Draw the scores of models by category. The same scores give the same bytes.

    Args:
        models: Score of each category by model; the first ones are drawn, as many as there are colours.
        png: Picture to write; no reader ever sees half of it.
        title: Its heading.
        categories: Directions, clockwise from the top.
        highest: Best possible score, at the rim; the centre is 0.

    Raises:
        LlameroError: There are no categories.
    """
    if not categories:
        raise LlameroError("no scores by category", where=png)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = list(models.items())[: len(SOURCES)]
    columns = min(len(drawn), max(1, _LETTERS // (max(map(len, models)) + 8)))
    height = 6.2 + 0.19 * math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(7.6, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: PolarAxes = figure.add_subplot(projection="polar")  # type: ignore[assignment]  # what "polar" makes
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * index / len(categories) for index in range(len(categories))]
    for (model, scores), color in zip(drawn, SOURCES, strict=False):
        heights = [scores.get(category, math.nan) for category in categories]
        around, closed = [*angles, angles[0]], [*heights, heights[0]]
        axes.plot(around, closed, "o-", color=color, linewidth=1.8, markersize=4, label=model)
        if len(drawn) <= 2 and not any(map(math.isnan, heights)):
            axes.fill(around, closed, color=color, alpha=0.12)
    _frame(axes, angles, categories, highest)
    left_out = len(models) - len(drawn)
    axes.set_title(title + (f" ({left_out} more models not drawn)" if left_out else ""),
                   color=INK, fontsize=11, fontweight="bold", pad=18)  # fmt: skip
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)
    picture = io.BytesIO()
    figure.savefig(picture, metadata={"Software": None})
    png.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(png, picture.getvalue())


def _frame(axes: PolarAxes, angles: Sequence[float], categories: Sequence[str], highest: float) -> None:
    axes.set_ylim(0, highest)
    axes.set_yticks([highest * part / 5 for part in range(1, 6)])
    axes.set_rlabel_position(math.degrees(angles[1]) / 2 if len(angles) > 1 else 0)
    axes.set_xticks(list(angles), list(categories))
    axes.tick_params(axis="x", colors=INK, labelsize=10, pad=4)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):  # beside the circle, not across it
        label.set_horizontalalignment(_side(math.sin(angle), "left", "right"))
        label.set_verticalalignment(_side(math.cos(angle), "bottom", "top"))
    axes.tick_params(axis="y", colors=MUTED, labelsize=8)
    axes.grid(color=MUTED, alpha=0.35, linewidth=0.7)
    axes.spines["polar"].set_color(MUTED)


def _side(offset: float, positive: Literal["left", "bottom"], negative: Literal["right", "top"]) -> Any:
    return "center" if abs(offset) < 0.1 else positive if offset > 0 else negative
