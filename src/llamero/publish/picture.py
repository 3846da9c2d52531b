"""The picture of a release's quantized files: what each weighs, and how far it is from what it was made from."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from llamero.core import files
from llamero.engine.curves import ACCENT, INK, MUTED, SOURCES, WARM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_LABEL, _LETTER = 10.5, 4.7
"""Points from a label to the next one below it, and from a letter to the next."""
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LEAST = 1e-8
"""KL below which a logarithmic axis would show nothing but rounding."""


class Point(NamedTuple):
    """A quantized model on one text."""

    name: str
    size_bytes: int
    kl: float
    """Nats per token."""
    published: bool


def kl_against_size(texts: Mapping[str, Sequence[Point]], png: Path, title: str, *, max_kl: float | None) -> None:
    """Draw a panel for each text; what is not published is hollow. The same points give the same bytes.

    Args:
        texts: Points by the text that was measured on.
        png: Picture to write; no reader ever sees half of it.
        title: Its heading.
        max_kl: Drawn as a line where a point comes near it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(len(points) for points in texts.values())
    height = max(3.2, 0.24 * most + 1.2)
    figure = Figure(figsize=(9, height * len(texts)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(texts), squeeze=False)[:, 0]
    largest = max(point.size_bytes for points in texts.values() for point in points)
    unit, name = next((each for each in _SIZES if largest >= each[0]), _SIZES[-1])
    methods = list(dict.fromkeys(_method(point) for points in texts.values() for point in points))
    colors = dict(zip(methods, (ACCENT, WARM, *SOURCES[2:]), strict=False))
    for axes, (text, points) in zip(panels, texts.items(), strict=True):
        _draw(axes, points, colors, unit, max_kl)
        axes.set_ylabel(f"KL, nats per token\n{text}", color=INK)
        axes.set_xlabel(f"size of the files of weights, {name}", color=INK)
    panels[0].set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    figure.canvas.draw()  # which decides where points lie
    for axes, points in zip(panels, texts.values(), strict=True):
        _label(axes, points, colors, unit)
    picture = io.BytesIO()
    figure.savefig(picture, metadata={"Software": None})
    png.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(png, picture.getvalue())


def _method(point: Point) -> str:
    return point.name.partition("-")[0]


def _draw(axes: Axes, points: Sequence[Point], colors: Mapping[str, str], unit: float, max_kl: float | None) -> None:
    for point in points:
        color = colors.get(_method(point), MUTED)
        face = color if point.published else "white"
        axes.plot(point.size_bytes / unit, max(point.kl, _LEAST), "o", color=color, markerfacecolor=face, markersize=6)
    axes.set_yscale("log")
    sizes = [point.size_bytes / unit for point in points]
    room = 0.06 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    axes.set_xlim(min(sizes) - room, max(sizes) + 6 * room)  # labels stand on the right
    if max_kl is not None and max(point.kl for point in points) > max_kl / 10:
        axes.axhline(max_kl, color=MUTED, linewidth=1, linestyle="--")
        axes.annotate(f"limit {max_kl:g}", (1, max_kl), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                      textcoords="offset points", ha="right", color=MUTED, fontsize=8)  # fmt: skip
    axes.margins(y=0.15)
    axes.grid(axis="both", color=MUTED, alpha=0.25, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)


def _label(axes: Axes, points: Sequence[Point], colors: Mapping[str, str], unit: float) -> None:
    """Write names beside the points, moved apart where they would lie on each other."""
    to_points = 72 / axes.figure.dpi
    places = []
    for point in points:
        x, y = axes.transData.transform((point.size_bytes / unit, max(point.kl, _LEAST))) * to_points
        places.append((float(y), float(x), point))
    places.sort(key=lambda place: (-place[0], place[1]))
    taken: list[tuple[float, float, float]] = []  # left, right, height
    for y, x, point in places:
        said = point.name if point.published else f"{point.name} (not published)"
        left, right, height = x + 12, x + 12 + _LETTER * len(said), y
        for start, stop, other in sorted(taken, key=lambda label: -label[2]):
            if start < right and left < stop and abs(other - height) < _LABEL:
                height = other - _LABEL
        taken.append((left, right, height))
        axes.annotate(
            said,
            (point.size_bytes / unit, max(point.kl, _LEAST)),
            xytext=(12, height - y),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colors.get(_method(point), MUTED),
            arrowprops={
                "arrowstyle": "-",
                "color": MUTED,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
