"""The confidence above which answers are right as often as promised.

Selective classification with a guaranteed risk (Geifman and El-Yaniv 2017): a few candidate
thresholds, each with an exact binomial bound on the error above it, all bounds holding together
(Bonferroni); of those that keep the promise the one that answers most is taken.
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
"""Thresholds tried: more come closer to the best one, but each makes all bounds wider."""

Bools = npt.NDArray[np.bool_]


class RiskCoverage(NamedTuple):
    """What each threshold would give, from the strictest on; arrays of shape (thresholds,)."""

    thresholds: Floats
    coverage: Floats
    """Share of all questions that are answered."""
    risk: Floats
    """Share of the answered ones that are answered wrong."""


class _Cut(NamedTuple):
    threshold: float
    answered: int
    errors: int


def risk_coverage(confidence: Floats, right: Bools, asked: int) -> RiskCoverage:
    """Risk and coverage at every threshold that makes a difference.

    Args:
        confidence: of the questions that may be answered, shape (n,).
        right: whether the answer is right, shape (n,).
        asked: all questions, those never answered among them.
    """
    order = np.argsort(-confidence, kind="stable")
    scores = confidence[order]
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))  # of equal ones
    wrong = np.cumsum(~right[order])[last]
    answered = last + 1
    return RiskCoverage(scores[last], answered / asked, wrong / answered)


def error_bound(errors: int, answered: int, level: float) -> float:
    """The most that the error may be, with confidence `level` (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    if not answered:
        return 1.0
    test = binomtest(errors, answered, alternative="less")
    return float(test.proportion_ci(level, method="exact").high)


def needed(max_error: float, level: float) -> int:
    """Questions, all answered right, without which no promise can be made."""
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
    """Set the thresholds under which at most `max_error` of the answered questions are wrong.

    Args:
        calibration: the model's, to be completed.
        answers: the label given to each held-out question.
        confidence: its calibrated probability, shape (questions,).
        right: whether it is right, shape (questions,).
        answerable: whether the question is not off-topic, shape (questions,).
        max_error: the promise, above 0 and under 1.
        level: the confidence that it is kept, over draws of the held-out questions.
        by_label: give labels that have enough questions thresholds of their own; the others
            share one. The promise then holds for each of these.

    Raises:
        DataError: the questions are too few, or no threshold keeps the promise.
    """
    labels = np.array(answers)
    names, counts = np.unique(labels[answerable], return_counts=True)
    groups: list[str] = []
    if by_label:
        # Bounds of more groups have to hold together, so each needs more questions.
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
        # Where there is no promise nothing is answered: a threshold of 1 does that.
        threshold=common.threshold if common else 1.0,
        label_thresholds={n: cut.threshold if (cut := found[n]) else 1.0 for n in groups},
        promise=Promise(max_error, level, len(right), answered, errors),
    )


def _best_cut(confidence: Floats, right: Bools, max_error: float, level: float) -> _Cut | None:
    """The lowest candidate threshold whose error bound keeps the promise.

    A candidate lies just above the (n + 1)-th highest confidence for an n chosen beforehand. Given
    that confidence the questions above it are a fair draw of all that are above it, so the
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
        above = int((scores > floor).sum())  # fewer than count where others are equal to it
        if above and error_bound(int(wrong[above - 1]), above, each) <= max_error:
            threshold = max(0.0, float(np.nextafter(floor, 2)))
            return _Cut(threshold, above, int(wrong[above - 1]))
    return None
