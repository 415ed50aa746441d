"""Find a model's calibration from what it says, uncalibrated, of labelled questions.

The arithmetic is SciPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcat.calibration.calibration import Calibration, Conformal, OnTopic, log_odds
from qcat.encoding.scoring import Floats, log_shares, temper
from qcat.errors import DataError
from qcat.prediction import Prediction

LEVEL = 0.95
"""Confidence of the temperature's interval."""
FEWEST = 50
"""Questions, of which at least two may then be called off-topic."""
WIDEST = 2.0
"""The most that the interval's upper end may be of its lower one."""
ON_LIST = 0.95
"""Share of the questions that belong to the list which are not called off-topic."""
_KEPT = 2000  # scores kept for prediction sets: 2,000 know a coverage to half a point
_DIGITS = 6
_SPAN = (-3.0, 3.0)  # of log T

Ints = npt.NDArray[np.int_]


class Temperature(NamedTuple):
    """The temperature that makes the right labels most probable, and how sure that is."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether the interval is narrow enough to use the value."""
        return self.high <= WIDEST * self.low


class Fitted(NamedTuple):
    """A calibration, and what it lacks."""

    calibration: Calibration
    refused: str | None
    """Why the temperature was left at 1; None if it was not."""


def label_matrix(predictions: Sequence[Prediction], labels: Sequence[str]) -> Floats:
    """Label probabilities, shape (questions, labels), in the order of `labels`."""
    return np.array([[p.probabilities[label] for label in labels] for p in predictions])


def fit_temperature(log_probabilities: Floats, truth: Ints) -> Temperature:
    """The temperature with the least negative log-likelihood (Guo et al. 2017).

    Its interval holds the temperatures that a likelihood-ratio test does not refuse (Wilks).

    Args:
        log_probabilities: of the labels, natural logs, shape (questions, labels).
        truth: index of the right label, shape (questions,).
    """
    from scipy.optimize import brentq, minimize_scalar
    from scipy.special import log_softmax
    from scipy.stats import chi2

    rows = np.arange(len(truth))

    def loss(log_t: float) -> float:
        return -float(log_softmax(log_probabilities / np.exp(log_t), axis=1)[rows, truth].sum())

    best = minimize_scalar(loss, bounds=_SPAN, method="bounded", options={"xatol": 1e-6})
    limit = best.fun + chi2.ppf(LEVEL, 1) / 2
    ends = []
    for bound in _SPAN:
        if loss(bound) < limit:
            ends.append(bound)
        else:
            ends.append(brentq(lambda log_t: loss(log_t) - limit, *sorted((bound, best.x))))
    low, value, high = (float(np.exp(x)) for x in (ends[0], best.x, ends[1]))
    return Temperature(value, low, high)


def fit_on_topic(masses: Sequence[float], energies: Sequence[float]) -> OnTopic:
    """Where the signals of questions of the list lie, and under which score one in twenty does.

    Args:
        masses: label mass of each question.
        energies: its label energy.
    """
    odds = np.array([log_odds(mass) for mass in masses])
    places = {
        "mass_mean": float(odds.mean()),
        "mass_deviation": max(float(odds.std()), 1e-3),
        "energy_mean": float(np.mean(energies)),
        "energy_deviation": max(float(np.std(energies)), 1e-3),
    }
    bare = OnTopic(**places, threshold=0.0, mass_threshold=0.0)
    both = [bare.score(m, e) for m, e in zip(masses, energies, strict=True)]
    alone = [bare.score(mass, None) for mass in masses]
    return OnTopic(
        **places,
        threshold=float(np.quantile(both, 1 - ON_LIST, method="lower")),
        mass_threshold=float(np.quantile(alone, 1 - ON_LIST, method="lower")),
    )


def fit(predictions: Sequence[Prediction], truth: Ints, labels: Sequence[str]) -> Fitted:
    """Temperature, off-topic thresholds and scores for prediction sets; no threshold.

    Where the questions are too few, or answered too well, to tell the temperature, it stays 1.

    Args:
        predictions: of the model without its calibration, by the path that serves.
        truth: index of the right label, shape (questions,).
        labels: the task's.

    Raises:
        DataError: too few questions to say anything.
    """
    count = len(truth)
    if count < FEWEST:
        raise DataError(f"{count} questions say nothing of the confidence: give {FEWEST} or more")
    logs = log_shares(label_matrix(predictions, labels))
    found = fit_temperature(logs, truth)
    refused = None
    if not found.is_known:
        wrong = int((logs.argmax(1) != truth).sum())
        refused = (
            f"{count} questions, {wrong} of them answered wrong, leave the temperature between "
            f"{found.low:.2g} and {found.high:.2g}: the confidence stays as it is"
        )
    temperature = 1.0 if refused else found.value
    masses = [float(p.label_mass or 0.0) for p in predictions]
    energies = [float(p.energy or 0.0) for p in predictions]
    gate = fit_on_topic(masses, energies)
    # Every n-th question, not every n-th score: what is left is still a fair draw.
    kept = np.arange(0, count, -(-count // _KEPT))
    right = temper(logs, temperature)[np.arange(count), truth]
    calibration = Calibration(
        questions=count,
        temperature=temperature,
        temperature_interval=(found.low, found.high),
        on_topic=gate,
        conformal=Conformal(
            _ascending(right[kept]),
            _ascending([gate.score(masses[i], energies[i]) for i in kept]),
            _ascending([gate.score(masses[i], None) for i in kept]),
        ),
    )
    return Fitted(calibration, refused)


def _ascending(scores: npt.ArrayLike) -> tuple[float, ...]:
    # Rounded down, so that a score that is equal to the one kept is not under it.
    step = 10.0**_DIGITS
    return tuple((np.floor(np.sort(np.asarray(scores, np.float64)) * step) / step).tolist())
