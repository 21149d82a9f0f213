"""Figures of training, each as SVG and as PNG: learning curves, paired differences, drift.

Lines carry their names at their ends instead of a legend. The colours are those of M. Okabe and K. Ito, "Color
Universal Design" (2008), which people with every kind of colour vision tell apart; the network that others are compared
with is grey. No figure opens a window or touches matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reparam import ReparamError
from reparam.disk import make_folder, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Interval", "Panel", "difference_plot", "drift_plot", "learning_curves"]

GREY, INK, RULE = "#6b6b6b", "#222222", "#e3e3e3"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":")
"""A seventh line has the first colour again, dashed."""
COLUMNS = 4
"""Panels side by side at most."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "svg.hashsalt": "reparam",  # the same figure is the same file
}

Curve = tuple[Sequence[float], NDArray[np.float64]]
"""Positions ``(n,)`` and values ``(runs, n)``."""


@dataclass(frozen=True)
class Interval:
    """A difference with its interval and the single differences that it is the mean of; the ends may be NaN."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Lines over a common axis: by name, values ``(n,)``. ``reference`` is drawn in grey."""

    title: str
    lines: Mapping[str, Sequence[float]]
    logarithmic: bool = False
    reference: str = ""


@contextmanager
def _style() -> Iterator[None]:
    """The style, for what is drawn inside. Raises :class:`reparam.ReparamError` without matplotlib."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ReparamError(f"figures need matplotlib ({error}): pip install 'reparam[train]'") from error
    with rc_context(STYLE):
        yield


@_style()
def learning_curves(curves: Mapping[str, Curve], stem: Path) -> tuple[Path, Path]:
    """Test accuracy over epochs: a panel for each variant in blue, with the first one in grey in all of them.

    The line is the mean over the seeds, the band one standard deviation to either side.

    Args:
        curves: by variant: epochs, and accuracies in per cent, one row for each seed.
        stem: where to write, without suffix.

    Returns:
        the SVG and the PNG.
    """
    reference, *others = curves
    shown = others or [reference]
    figure, panels = _grid(len(shown), height=2.3)
    for axes, name in zip(panels, shown, strict=True):
        for each, colour in ({reference: GREY} | {name: COLOURS[0]}).items():
            epochs, values = curves[each]
            mean = values.mean(axis=0)
            axes.plot(epochs, mean, color=colour)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(name, color=COLOURS[0])
        axes.set_ylim(*_window(curves))
        axes.label_outer()
        axes.locator_params(axis="x", integer=True)
        if others:
            epochs, values = curves[reference]
            _name_ends(figure, axes, [(epochs[-1], values[:, -1].mean(), reference, GREY)])
    figure.supxlabel("epoch", size=9)
    figure.supylabel("test accuracy, %", size=9)
    return _save(figure, stem)


@_style()
def difference_plot(intervals: Sequence[Interval], reference: str, stem: Path) -> tuple[Path, Path]:
    """Differences of accuracy to ``reference`` in points: a dot for each seed, mean and interval on top.

    Whether an interval contains zero is seen from the line there. Returns the SVG and the PNG.
    """
    figure = _figure(7.0, 0.9 + 0.42 * len(intervals))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1.2)
    for row, each in enumerate(intervals):
        below = [row + 0.22] * len(each.values)
        axes.plot(each.values, below, "o", color=GREY, markersize=4, alpha=0.6, markeredgewidth=0)
        if math.isfinite(each.low):
            axes.plot((each.low, each.high), (row, row), color=COLOURS[0], linewidth=2.2, solid_capstyle="butt")
        axes.plot(each.mean, row, "D", color=COLOURS[0], markersize=6)
    axes.set_yticks(range(len(intervals)), [each.name for each in intervals], color=INK)
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_title("diamond: mean, bar: 95 % interval, dots: seeds", size=8.5, color=GREY)
    axes.set_xlabel(f"accuracy minus that of {reference}, points", color=INK)
    return _save(figure, stem)


@_style()
def drift_plot(steps: Sequence[int], panels: Sequence[Panel], stem: Path) -> tuple[Path, Path]:
    """Lines over training steps, one panel beside the other. Returns the SVG and the PNG.

    A value of zero has no place on a logarithmic axis: it is left out, and a line that is zero throughout is named in
    the panel's corner.
    """
    figure, places = _grid(len(panels), height=3.0, columns=2)
    references = {panel.reference for panel in panels}
    moving = (name for panel in panels for name, line in panel.lines.items() if np.any(line))
    names = [name for name in dict.fromkeys(moving) if name not in references]
    for axes, panel in zip(places, panels, strict=True):
        ends, zeros = [], []
        for name, line in panel.lines.items():
            values = np.asarray(line, dtype=float)
            if panel.logarithmic:
                values = np.where(values > 0, values, math.nan)
            if np.isnan(values).all():
                zeros.append(name)
                continue
            colour, dash = (GREY, "-") if name == panel.reference else _look(names.index(name))
            axes.plot(steps, values, color=colour, linestyle=dash)
            last = np.flatnonzero(~np.isnan(values))[-1]
            ends.append((steps[last], float(values[last]), name, colour))
        if panel.logarithmic:
            axes.set_yscale("log")
        if zeros:
            text = f"0 at every step: {', '.join(zeros)}"
            axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", color=GREY, size=8)
        axes.set_title(panel.title)
        _name_ends(figure, axes, ends)
    figure.supxlabel("step", size=9)
    return _save(figure, stem)


# ------------------------------------------------------------------------------------------------- parts


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _grid(count: int, *, height: float, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of ``height`` inches."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = _figure((2.9 if columns > 2 else 4.8) * columns, 0.5 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _window(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Limits of the accuracy axis: the later three quarters of all curves, or the first epochs would flatten it."""
    late = np.concatenate([values[:, values.shape[1] // 4 :].ravel() for _, values in curves.values()])
    low, high = float(late.min()), float(late.max())
    margin = max(0.08 * (high - low), 0.5)
    return low - margin, min(high + margin, 100.5)


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each line's name behind its end ``(x, y)``, the names moved apart where lines end together."""
    figure.draw_without_rendering()
    ends = sorted(ends, key=lambda end: end[1])
    lines = [float(axes.transData.transform(end[:2])[1]) for end in ends]
    heights: list[float] = []
    gap = 10.5 / 72 * figure.dpi
    for line in lines:
        heights.append(max(line, heights[-1] + gap) if heights else line)
    # What was moved beyond the top comes down again, with what it then meets.
    top = axes.bbox.y1
    for index in reversed(range(len(heights))):
        top = min(heights[index], top)
        heights[index], top = top, top - gap
    for (x, y, name, colour), line, height in zip(ends, lines, heights, strict=True):
        offset = (5, (height - line) * 72 / figure.dpi)
        style = {"va": "center", "color": colour, "size": 8.5, "annotation_clip": False}
        axes.annotate(name, (x, y), offset, textcoords="offset points", **style)


def _save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    make_folder(stem.parent)
    # Not with_suffix: a stem such as resnet18.acb has a dot of its own.
    files = Path(f"{stem}.svg"), Path(f"{stem}.png")
    replace_file(files[0], lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    replace_file(files[1], lambda path: figure.savefig(path, format="png", dpi=150))
    return files
