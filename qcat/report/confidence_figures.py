"""Plots of confidence: how reliable it is, and what a threshold on it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qcat.calibration.reliability import Reliability
from qcat.calibration.thresholds import RiskCoverage
from qcat.report.plot import BLUE, GREY, OPACITY, ORANGE, bare, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 300  # area of the point that stands for all questions


def reliability_png(after: Reliability, before: Reliability | None) -> bytes:
    """The reliability diagram as a PNG, with the one before calibration if it is given."""
    return png(_reliability(after, before))


def reliability_svg(after: Reliability, before: Reliability | None) -> str:
    """As `reliability_png`, an `<svg>` element."""
    return svg(_reliability(after, before), "reliability")


def risk_coverage_png(curve: RiskCoverage, chosen: float | None) -> bytes:
    """Error among the answered questions by their share, as a PNG.

    Args:
        curve: to draw.
        chosen: a threshold to mark on it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.step(curve.coverage, curve.risk, where="post", color=BLUE)
    if chosen is not None and (curve.thresholds >= chosen).any():
        at = int(np.flatnonzero(curve.thresholds >= chosen)[-1])
        point = (float(curve.coverage[at]), float(curve.risk[at]))
        axes.plot(*point, "o", color=ORANGE)
        axes.annotate(
            f"confidence ≥ {chosen:.3f}",
            point,
            xytext=(0, 10),
            textcoords="offset points",
            ha="right" if point[0] > 0.5 else "left",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0, top=max(0.02, 1.1 * float(curve.risk.max())))
    axes.set_xlabel("answered, of all questions")
    axes.set_ylabel("wrong, of the answered")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    bare(axes)
    return png(figure)


def _reliability(after: Reliability, before: Reliability | None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.plot((0, 1), (0, 1), ":", color=GREY)
    forms = [(before, "before calibration", ORANGE)] if before else []
    for form, name, colour in (*forms, (after, "after" if before else None, BLUE)):
        assert form is not None
        confidence = [found.confidence for found in form.bins]
        accuracy = [found.accuracy for found in form.bins]
        sizes = [_LARGEST * found.questions / form.questions for found in form.bins]
        axes.plot(confidence, accuracy, "-", color=(*colour, OPACITY), label=name)
        axes.scatter(confidence, accuracy, sizes, color=[(*colour, OPACITY)])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share answered right")
    bare(axes)
    if before:
        axes.legend(frameon=False, loc="upper left")
    return figure
