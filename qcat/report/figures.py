"""Plots of training and evaluation, as `qcat.report.plot` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcat.evaluation.results import Confusion
from qcat.report.plot import BLUE, GREY, OPACITY, ORANGE, bare, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qcat.monitor.drift import Drift

_MAX_INCHES = 25  # of the matrix without the names around it
_MAX_COUNTS = 50  # columns up to which the cells show their counts
_MAX_CHARS = 30  # of a label
_BINS = 20


def confusion_png(confusion: Confusion) -> bytes:
    """The confusion matrix as a PNG: labels that occur only, cells shaded by share of their row."""
    return png(_confusion(confusion))


def confusion_svg(confusion: Confusion) -> str:
    """As `confusion_png`, an `<svg>` element."""
    return svg(_confusion(confusion), "confusion")


def mass_svg(on: Sequence[float], off: Sequence[float]) -> str:
    """Histograms of label mass, of questions on and off the list, as an `<svg>` element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5))
    axes = figure.add_axes((0, 0, 1, 1))
    for masses, name, colour in ((on, "on the list", BLUE), (off, "off the list", ORANGE)):
        axes.hist(
            masses,
            bins=_BINS,
            range=(0, 1),
            weights=np.full(len(masses), 1 / len(masses)),
            color=(*colour, OPACITY),
            label=name,
        )
    axes.set_xlabel("label mass")
    axes.set_ylabel("share of questions")
    bare(axes)
    axes.legend(frameon=False)
    return svg(figure, "mass")


def training_png(history: Sequence[Mapping[str, Any]], best: int) -> bytes:
    """Losses and macro-F1 by epoch as a PNG, the best epoch marked.

    Args:
        history: of each epoch its number and figures, as `run.json` has them.
        best: the number of the epoch that was kept.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [epoch["epoch"] for epoch in history]
    left.plot(
        epochs, [epoch["train_loss"] for epoch in history], "o-", color=BLUE, label="training"
    )
    left.plot(
        epochs,
        [epoch["validation_loss"] for epoch in history],
        "o-",
        color=ORANGE,
        label="validation",
    )
    left.set_ylabel("loss, nats")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(epochs, [epoch["validation_macro_f1"] for epoch in history], "o-", color=ORANGE)
    right.set_ylabel("validation macro-F1")
    for axes in (left, right):
        axes.axvline(best, color=GREY, linestyle=":")
        axes.set_xlabel(f"epoch (best: {best})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def drift_png(points: Sequence[tuple[datetime, Drift]]) -> bytes:
    """The signals of drift over time as a PNG, a panel each; windows that drifted are orange.

    Args:
        points: windows in the order of time, at least one, each with the time of its last answer.
    """
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    titles = {
        "label mix": "label mix, PSI",
        "confidence": "mean confidence",
        "label mass": "mean label mass",
    }
    names = list(dict.fromkeys(signal.name for _, drift in points for signal in drift.signals))
    figure = Figure(figsize=(7, 1.5 * len(names) + 0.5), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        found = [(time, s) for time, drift in points for s in drift.signals if s.name == name]
        times = [time for time, _ in found]
        values = [s.change if s.window is None else s.window for _, s in found]
        axes.plot(times, values, "-", color=BLUE)
        colours = [ORANGE if signal.drifted else BLUE for _, signal in found]
        axes.scatter(times, values, s=16, c=colours, zorder=3)
        for _, signal in found[-1:]:
            if signal.reference is not None:
                axes.axhline(signal.reference, color=GREY, linestyle=":")
        axes.set_title(titles.get(name, name), loc="left", fontsize=10)
        axes.margins(y=0.15)
        bare(axes)
    first, last = points[0][0], points[-1][0]
    if first == last:  # matplotlib would show four years around a single time
        panels[-1].set_xlim(first - timedelta(hours=12), last + timedelta(hours=12))
    panels[-1].set_xlabel("end of the window; dotted: the reference; orange: drift")
    locator = AutoDateLocator()  # type: ignore[no-untyped-call]
    panels[-1].xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
    panels[-1].xaxis.set_major_formatter(formatter)
    return png(figure)


def _confusion(confusion: Confusion) -> Figure:
    from matplotlib.figure import Figure

    used = confusion.used()
    counts = np.array(used.matrix)
    names = [label if len(label) <= _MAX_CHARS else label[:29] + "…" for label in used.labels]
    columns = list(names)
    if used.invalid is not None:
        counts = np.column_stack([counts, used.invalid])
        columns.append("(no label)")
    cell = min(0.32, _MAX_INCHES / len(columns))
    size = min(9.0, 72 * 0.8 * cell)

    figure = Figure(figsize=(cell * len(columns), cell * len(names)))
    axes = figure.add_axes((0, 0, 1, 1))  # names and titles stand around: `plot` makes room
    axes.imshow(_cell_colours(counts), interpolation="nearest", aspect="auto")
    # Labels are a user's text: a dollar sign in them begins no formula.
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_color(GREY)
    axes.set_xlabel("answer")
    axes.set_ylabel("right label")
    if len(columns) <= _MAX_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(column, row, str(count), ha="center", va="center", fontsize=size)
    return figure


def _cell_colours(counts: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
    """RGBA for each cell: blue where right, orange where wrong, opaque by share of the row."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(*counts.shape, dtype=np.bool_)
    colours = np.where(right[..., None], BLUE, ORANGE)
    # The square root lets a single mistake be seen.
    return np.dstack([colours, OPACITY * np.sqrt(share)])
