"""Finds the confidence above which answers are right as often as promised.

Selective classification with a guaranteed risk (Geifman and El-Yaniv 2017): a few candidate
thresholds, each with an exact binomial bound on the error above it, all bounds holding together
(Bonferroni). Of those that keep the promise, the one that answers the most is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.calibration.calibration import Calibration, Promise
from qcat.encoding.scoring import Floats
from qcat.errors import DataError

LEVEL = 0.95
_CANDIDATES = 8
"""Number of thresholds tried: more come closer to the best, but each widens all bounds."""

Bools = npt.NDArray[np.bool_]


class RiskCoverage(NamedTuple):
    """Risk and coverage of each threshold, strictest first; arrays of shape (thresholds,)."""

    thresholds: Floats
    coverage: Floats
    """Share of all questions that are answered."""
    risk: Floats
    """Share of the answered questions that are answered wrong."""


class _Cut(NamedTuple):
    threshold: float
    answered: int
    errors: int


def risk_coverage(confidence: Floats, right: Bools, asked: int) -> RiskCoverage:
    """Risk and coverage at every threshold that makes a difference.

    Args:
        confidence: confidence of the questions that may be answered, shape (n,).
        right: whether the answer is right, shape (n,).
        asked: number of all questions, including those never answered.
    """
    order = np.argsort(-confidence, kind="stable")
    scores = confidence[order]
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))  # of equal ones
    wrong = np.cumsum(~right[order])[last]
    answered = last + 1
    return RiskCoverage(scores[last], answered / asked, wrong / answered)


def error_bound(errors: int, answered: int, level: float) -> float:
    """Upper bound of the error, with confidence `level` (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    if not answered:
        return 1.0
    test = binomtest(errors, answered, alternative="less")
    return float(test.proportion_ci(level, method="exact").high)


def needed(max_error: float, level: float) -> int:
    """Fewest questions, all answered correctly, for which a promise is possible."""
    return int(np.ceil(np.log((1 - level) / _CANDIDATES) / np.log1p(-max_error)))


def promise_threshold(
    calibration: Calibration,
    answers: Sequence[str],
    confidence: Floats,
    right: Bools,
    answerable: Bools,
    *,
    max_error: float,
    level: float = LEVEL,
    by_label: bool = False,
) -> Calibration:
    """Set the thresholds with which at most `max_error` of the answered questions are wrong.

    Args:
        calibration: the model's, to be completed.
        answers: the label given to each held-out question.
        confidence: its calibrated probability, shape (questions,).
        right: whether it is right, shape (questions,).
        answerable: whether the question is not off-topic, shape (questions,).
        max_error: the promise, above 0 and below 1.
        level: the confidence that it is kept, over draws of the held-out questions.
        by_label: give separate thresholds to labels that have enough questions; the others share
            one. The promise then holds for each of these.

    Raises:
        DataError: there are too few questions, or no threshold keeps the promise.
    """
    labels = np.array(answers)
    names, counts = np.unique(labels[answerable], return_counts=True)
    groups: list[str] = []
    if by_label:
        # The bounds of all groups must hold together, so each group needs more questions.
        share = (1 - level) / (1 + len(names))
        enough = needed(max_error, 1 - share)
        groups = [str(n) for n, count in zip(names, counts, strict=True) if count >= 2 * enough]
    level_each = 1 - (1 - level) / (1 + len(groups))
    found: dict[str, _Cut | None] = {}
    for name in groups:
        rows = answerable & (labels == name)
        found[name] = _best_cut(confidence[rows], right[rows], max_error, level_each)
    rest = answerable & ~np.isin(labels, groups)
    if rest.any():
        found[""] = _best_cut(confidence[rest], right[rest], max_error, level_each)
    cuts = [cut for cut in found.values() if cut]
    if not cuts:
        least = needed(max_error, level_each)
        shares = (percent / 100 for percent in range(1, 51) if percent / 100 > max_error)
        rows = (confidence[answerable], right[answerable])
        possible = next((share for share in shares if _best_cut(*rows, share, level)), None)
        raise DataError(
            f"an error of at most {max_error:g} cannot be promised from {len(right)} questions "
            f"with {level:.0%} confidence (at least {least} of them must be answered, all right): "
            + (f"{possible:g} can; or " if possible else "")
            + "give more questions"
        )
    answered, errors = sum(c.answered for c in cuts), sum(c.errors for c in cuts)
    common = found.get("")
    return replace(
        calibration,
        # Without a promise nothing is answered, which a threshold of 1 achieves.
        threshold=common.threshold if common else 1.0,
        label_thresholds={n: cut.threshold if (cut := found[n]) else 1.0 for n in groups},
        promise=Promise(max_error, level, len(right), answered, errors),
    )


def _best_cut(confidence: Floats, right: Bools, max_error: float, level: float) -> _Cut | None:
    """The lowest candidate threshold whose error bound keeps the promise.

    A candidate lies just above the (n + 1)-th highest confidence for an n chosen beforehand. Given
    that confidence, the questions above it are a random sample of all that are above it, so the
    binomial bound is exact.
    """
    order = np.argsort(-confidence, kind="stable")
    scores = confidence[order]
    wrong = np.cumsum(~right[order])
    least = needed(max_error, level)
    if least > len(scores):
        return None
    each = 1 - (1 - level) / _CANDIDATES
    for count in np.geomspace(least, len(scores), _CANDIDATES).round().astype(int).tolist()[::-1]:
        floor = scores[count] if count < len(scores) else -1.0
        above = int((scores > floor).sum())  # fewer than `count` if others are equal to it
        if above and error_bound(int(wrong[above - 1]), above, each) <= max_error:
            threshold = max(0.0, float(np.nextafter(floor, 2)))
            return _Cut(threshold, above, int(wrong[above - 1]))
    return None
