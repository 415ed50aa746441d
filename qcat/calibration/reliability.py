"""Measures how well confidence matches accuracy, and how well scores detect off-topic questions.

Uses SciPy and scikit-learn for the computations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcat.encoding.scoring import Floats

BINS = 10
_FALSE_ALARM = 0.05


@dataclass(frozen=True)
class Bin:
    """Questions with similar confidence."""

    questions: int
    confidence: float
    """Mean."""
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How well calibrated a model's confidence is."""

    questions: int
    ece: float
    """Expected calibration error (Naeini et al. 2015): the mean over questions of |accuracy −
    confidence| of the bin each is in, `BINS` bins of equal width."""
    adaptive_ece: float
    """The same with bins of equally many questions (Nguyen and O'Connor 2015)."""
    brier: float
    """Mean over questions of the squared distance of the label distribution from the truth,
    0 to 2 (Brier 1950)."""
    log_loss: float
    """Negative log-likelihood of the right label, nats a question."""
    bins: tuple[Bin, ...]
    """Those of equal width that are not empty: the reliability diagram."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for reports."""
        return asdict(self)


def reliability(probabilities: Floats, truth: npt.NDArray[np.int_]) -> Reliability:
    """Measure the confidence of the most probable label.

    Args:
        probabilities: of the labels, shape (questions, labels), each row summing to 1.
        truth: index of the right label, shape (questions,).
    """
    from sklearn.metrics import brier_score_loss, log_loss

    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == truth).astype(np.float64)
    equal_width = _bins(confidence, right, np.linspace(0, 1, BINS + 1))
    edges = np.quantile(confidence, np.linspace(0, 1, BINS + 1))
    labels = range(probabilities.shape[1])
    return Reliability(
        questions=len(truth),
        ece=_error(equal_width),
        adaptive_ece=_error(_bins(confidence, right, np.unique(edges))),
        brier=float(brier_score_loss(truth, probabilities, labels=labels, scale_by_half=False)),
        log_loss=float(log_loss(truth, np.maximum(probabilities, 1e-300), labels=labels)),
        bins=equal_width,
    )


UNSCALED = "not scaled: the questions it was calibrated on say too little of the temperature"
FIGURES = {
    "ece": "expected calibration error",
    "adaptive_ece": "adaptive calibration error",
    "brier": "Brier score",
    "log_loss": "log loss, nats",
}


def reliability_rows(after: Reliability, before: Reliability | None) -> list[tuple[str, ...]]:
    """The figures as a table with a header; with those before calibration, if given."""
    forms = [("before", before), ("after", after)] if before else [("value", after)]
    rows: list[tuple[str, ...]] = [("", *(name for name, _ in forms))]
    for key, name in FIGURES.items():
        rows.append((name, *(f"{getattr(form, key):.3f}" for _, form in forms)))
    return rows


def _bins(confidence: Floats, right: Floats, edges: Floats) -> tuple[Bin, ...]:
    from scipy.stats import binned_statistic

    if len(edges) < 2:  # all questions have the same confidence
        return (Bin(len(right), float(confidence[0]), float(right.mean())),)
    counts, sums, hits = (
        binned_statistic(confidence, [np.ones_like(right), confidence, right], "sum", edges)
    ).statistic
    return tuple(
        Bin(int(count), float(total / count), float(hit / count))
        for count, total, hit in zip(counts, sums, hits, strict=True)
        if count
    )


def _error(bins: Sequence[Bin]) -> float:
    gaps = [abs(found.accuracy - found.confidence) for found in bins]
    return float(np.average(gaps, weights=[found.questions for found in bins]))


@dataclass(frozen=True)
class Detection:
    """How well one score separates on-topic questions (high) from others (low)."""

    auroc: float
    """Probability that an on-topic question has a higher score than an off-topic one."""
    fpr: float
    """Share of off-topic questions that pass at the threshold where 95 % of on-topic ones pass."""


def detection(on: Sequence[float], off: Sequence[float]) -> Detection:
    """Measure one score.

    Args:
        on: scores of on-topic questions.
        off: scores of off-topic questions.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    belongs = [1] * len(on) + [0] * len(off)
    scores = [*on, *off]
    fpr, tpr, _ = roc_curve(belongs, scores, drop_intermediate=False)
    return Detection(
        float(roc_auc_score(belongs, scores)), float(fpr[tpr >= 1 - _FALSE_ALARM].min())
    )
