"""Predictions made by hand, all in one place."""

from __future__ import annotations

from qcat.prediction import Prediction, Reason

LABELS = ("pool", "fence", "car", "water heater")


def prediction(
    label: str = "pool",
    confidence: float | None = 0.4,
    label_mass: float | None = 0.9,
    reason: Reason | None = "low_confidence",
) -> Prediction:
    """An answer that leaves the question to a person, unless there is no reason to."""
    others = [other for other in LABELS if other != label]
    share = (1 - (confidence or 0)) / len(others)
    known = confidence is not None
    return Prediction(
        label=label,
        confidence=confidence,
        abstained=reason is not None,
        reason=reason,
        probabilities={label: confidence, **dict.fromkeys(others, share)} if known else {},
        exact=known,
        label_mass=label_mass,
        energy=10.0,
        on_topic=0.0,
        prediction_set=None,
        margin=confidence - share if known else None,
        entropy=1.0 if known else None,
        truncated=False,
    )
