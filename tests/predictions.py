"""Predictions made by hand, all in one place."""

from __future__ import annotations

from qcat.prediction import Prediction


def prediction(label="pool", confidence=0.9, label_mass=0.95, reason=None):
    """An answer of which only what trust looks at matters."""
    return Prediction(
        label=label,
        confidence=confidence,
        abstained=reason is not None,
        reason=reason,
        probabilities={} if confidence is None else {label: confidence},
        exact=confidence is not None,
        label_mass=label_mass,
        margin=None,
        entropy=None,
        truncated=False,
    )
