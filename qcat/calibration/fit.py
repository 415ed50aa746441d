"""Fits a model's calibration to its uncalibrated answers to labelled questions.

Uses SciPy for the computations.
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
"""Fewest questions, so that at least two of them may be called off-topic."""
WIDEST = 2.0
"""Largest allowed ratio of the interval's upper to its lower end."""
ON_LIST = 0.95
"""Share of on-topic questions that are not called off-topic."""
_KEPT = 2000  # scores kept for prediction sets: 2,000 determine a coverage to half a point
_DIGITS = 6
_SPAN = (-3.0, 3.0)  # of log T

Ints = npt.NDArray[np.int_]


class Temperature(NamedTuple):
    """The temperature that makes the right labels most probable, with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether the interval is narrow enough to use the value."""
        return self.high <= WIDEST * self.low


class Fitted(NamedTuple):
    """A fitted calibration, and why the temperature is missing, if it is."""

    calibration: Calibration
    refused: str | None
    """Why the temperature was left at 1; None if it was fitted."""


def label_matrix(predictions: Sequence[Prediction], labels: Sequence[str]) -> Floats:
    """Label probabilities, shape (questions, labels), in the order of `labels`."""
    return np.array([[p.probabilities[label] for label in labels] for p in predictions])


def fit_temperature(log_probabilities: Floats, truth: Ints) -> Temperature:
    """The temperature with the least negative log-likelihood (Guo et al. 2017).

    Its interval contains the temperatures that a likelihood-ratio test does not reject (Wilks).

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
    """Fit the signals of on-topic questions, and the score below which one in twenty falls.

    Args:
        masses: label mass of each question.
        energies: label energy of each question.
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
    """Fit temperature, off-topic thresholds and scores for prediction sets, but no threshold.

    If there are too few questions, or too few wrong answers, to fit the temperature, it stays 1.

    Args:
        predictions: of the model without its calibration, made as in normal use.
        truth: index of the right label, shape (questions,).
        labels: the task's.

    Raises:
        DataError: there are too few questions.
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
    # Every n-th question, not every n-th score, so that the rest is still a random sample.
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
    # Rounded down, so that an equal score is not below the threshold.
    step = 10.0**_DIGITS
    return tuple((np.floor(np.sort(np.asarray(scores, np.float64)) * step) / step).tolist())
