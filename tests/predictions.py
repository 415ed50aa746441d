"""Predictions for tests of what sees nothing else of a model."""

from __future__ import annotations

from qcat.prediction import Prediction, Reason

LABELS = ("pool", "fence", "car", "water heater")


def prediction(
    label: str = "pool", confidence: float = 0.4, reason: Reason | None = "low_confidence"
) -> Prediction:
    """An answer that leaves the question to a person, unless there is no reason to."""
    others = [other for other in LABELS if other != label]
    share = (1 - confidence) / len(others)
    return Prediction(
        label=label,
        confidence=confidence,
        abstained=reason is not None,
        reason=reason,
        probabilities={label: confidence} | dict.fromkeys(others, share),
        exact=True,
        label_mass=0.9,
        energy=10.0,
        on_topic=0.0,
        prediction_set=None,
        margin=confidence - share,
        entropy=1.0,
        truncated=False,
    )
