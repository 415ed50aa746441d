"""Metrics of answers against the right labels, from scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcat.evaluation.results import (
    LEVEL,
    RESAMPLES,
    SEED,
    Confusion,
    Estimate,
    LabelScore,
    Quality,
)
from qcat.task import Task

INVALID = -1
"""Marks a free answer that is not a label, among label indices."""


def quality(
    truth: npt.NDArray[np.int_],
    answers: npt.NDArray[np.int_],
    families: Sequence[npt.NDArray[np.int_]],
    resamples: int = RESAMPLES,
) -> Quality:
    """Accuracy and F1 with percentile bootstrap intervals over families of questions.

    Args:
        truth: index of the right label, shape (questions,).
        answers: index of the label given, or `INVALID`; same shape.
        families: rows that belong together; each row is in one family.
        resamples: number of bootstrap samples; each draws as many families, with replacement.
    """
    from scipy.stats import bootstrap

    values = _figures(truth, answers)
    low = high = [None, None, None]
    if len(families) > 1:

        def figures(drawn: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
            rows = np.concatenate([families[number] for number in drawn])
            return _figures(truth[rows], answers[rows])

        interval = bootstrap(
            (np.arange(len(families)),),
            figures,
            n_resamples=resamples,
            confidence_level=LEVEL,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        low, high = interval.low.tolist(), interval.high.tolist()
    return Quality(*(Estimate(float(v), a, b) for v, a, b in zip(values, low, high, strict=True)))


def _figures(truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
    """Accuracy, macro-F1 and weighted F1, as from `accuracy_score` and `f1_score`."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    occur = np.setdiff1d(np.union1d(truth, answers), [INVALID])
    _, _, f1, support = precision_recall_fscore_support(
        truth, answers, labels=occur, zero_division=0.0
    )
    return np.array([accuracy_score(truth, answers), f1.mean(), np.average(f1, weights=support)])


def label_scores(
    task: Task, truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_]
) -> tuple[LabelScore, ...]:
    """Precision, recall, F1 and support of every label, in the task's order; 0 for 0/0."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        truth, answers, labels=range(len(task.labels)), zero_division=0.0
    )
    rows = zip(task.labels, *(column.tolist() for column in columns), strict=True)
    return tuple(LabelScore(*row) for row in rows)


def confusion(
    task: Task, truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_], *, free: bool
) -> Confusion:
    """The confusion matrix, in the task's order; `free` adds answers that are not a label."""
    from sklearn.metrics import confusion_matrix

    count = len(task.labels)
    matrix = confusion_matrix(truth, answers, labels=[*range(count), INVALID])[:count].tolist()
    return Confusion(
        tuple(task.labels),
        tuple(tuple(row[:-1]) for row in matrix),
        tuple(row[-1] for row in matrix) if free else None,
    )


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p-value that two models have the same error rate (McNemar 1947).

    Args:
        fixed: questions that one of them alone gets right.
        broken: questions that the other alone gets right.
    """
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
