"""From label probabilities to a `Prediction`: the answer, and whether the model abstains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcat.calibration.calibration import Calibration, Conformal
from qcat.encoding.scoring import Floats, entropy, log_shares, temper
from qcat.errors import BundleError
from qcat.prediction import Prediction, Reason

OWN_RULE = "the model's own"
"""The rule for abstaining if the model's thresholds were not overridden."""
_TINY = np.finfo(np.float64).tiny


def decide(
    calibration: Calibration,
    labels: Sequence[str],
    best: int,
    lower: Floats,
    upper: Floats,
    *,
    mass: float,
    energy: float | None,
    truncated: bool,
    coverage: float | None = None,
) -> Prediction:
    """The prediction of one question.

    Args:
        calibration: of the model.
        labels: the task's.
        best: index of the answer.
        lower: lower bound of each label's calibrated probability, shape (labels,).
        upper: upper bound, same shape; equal to `lower` if the probability is known.
        mass: `label_mass`, or its lower bound.
        energy: `label_energy`; None if unknown.
        truncated: whether the question was cut.
        coverage: of the prediction set, as `check_coverage` allows; None to use thresholds.
    """
    shown = np.where(lower > 0, lower, upper)
    spread = entropy(shown / max(shown.sum(), _TINY))
    shown[best] = confidence = float(lower[best])
    second = float(np.delete(upper, best).max())
    gate = calibration.on_topic
    score = gate.score(mass, energy) if gate else None
    chosen = None
    reason: Reason | None
    if coverage is None:
        off = gate is not None and score is not None and gate.is_off(score, energy)
        reason = calibration.reason(labels[best], confidence, second, off)
    else:
        chosen = _set(calibration, coverage, labels, best, upper, score, energy)
        reason = None if len(chosen) == 1 else "ambiguous" if chosen else "off_topic"
    order = _order(shown, best)
    return Prediction(
        label=labels[best],
        confidence=confidence,
        abstained=reason is not None,
        reason=reason,
        probabilities={labels[i]: float(shown[i]) for i in order},
        exact=not (lower < upper).any(),
        label_mass=mass,
        energy=energy,
        on_topic=score,
        prediction_set=chosen,
        margin=max(0.0, confidence - second),
        entropy=spread,
        truncated=truncated,
    )


def check_coverage(calibration: Calibration, coverage: float, name: str) -> None:
    """Assert that a model can give prediction sets with a coverage.

    Raises:
        BundleError: it is not calibrated, or calibrated on too few questions.
    """
    sets = calibration.conformal
    fewest = Conformal.fewest(coverage)
    if sets is None or len(sets.truth) < fewest:
        known = f"on {len(sets.truth)}" if sets else "on none"
        raise BundleError(
            f"{name}: sets with a coverage of {coverage:g} need a calibration on {fewest} "
            f"questions or more, and it has one {known}: `qcat calibrate` it with held-out ones"
        )


def recalibrated(
    prediction: Prediction, calibration: Calibration, labels: Sequence[str]
) -> Prediction:
    """A model's prediction under a calibration.

    Args:
        prediction: of the uncalibrated model, with all probabilities known.
        calibration: to use.
        labels: the task's.
    """
    raw = np.array([prediction.probabilities[label] for label in labels])
    known = temper(log_shares(raw), calibration.temperature)
    return decide(
        calibration,
        labels,
        list(labels).index(prediction.label),
        known,
        known,
        mass=prediction.label_mass or 0.0,
        energy=prediction.energy,
        truncated=prediction.truncated,
    )


def _set(
    calibration: Calibration,
    coverage: float,
    labels: Sequence[str],
    best: int,
    upper: Floats,
    score: float | None,
    energy: float | None,
) -> tuple[str, ...]:
    """The prediction set; it contains every label that may be probable enough."""
    sets = calibration.conformal
    assert sets is not None, "check_coverage was not called"
    if score is not None and score < sets.gate(coverage, energy=energy is not None):
        return ()
    least = sets.least(coverage)
    return tuple(labels[i] for i in _order(upper, best) if upper[i] >= least)


def _order(probabilities: Floats, best: int) -> list[int]:
    """The order with the answer first: another label's upper bound may be higher."""
    order: list[int] = np.argsort(-probabilities, kind="stable").tolist()
    order.remove(best)
    return [best, *order]
