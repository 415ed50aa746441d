"""`Prediction`: everything known about the answer to one question. Plain data, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["off_topic", "ambiguous", "low_confidence"]
"""Why the model abstained. `off_topic`: the question seems to belong to no label. `ambiguous`:
the two best labels together reach the threshold, or a prediction set has several labels.
`low_confidence`: they do not."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one question.

    An Ollama server older than 0.12.11 returns no log-probabilities, so there is only a label:
    confidence, label mass, margin and entropy are None, and `probabilities` is empty.
    """

    label: str
    """The most probable label or, if a server's bounds do not decide, the one the model writes.
    It is always one of the task's labels, even if the model abstained. See `answer`."""
    confidence: float | None
    """Its probability given the question, from 0 to 1, calibrated if the model is; a lower
    bound if not `exact`."""
    abstained: bool
    """Whether the model is not sure enough to answer."""
    reason: Reason | None
    """Why; None unless `abstained`."""
    probabilities: Mapping[str, float]
    """All labels, the answer first, then the most probable; they sum to 1 if `exact`."""
    exact: bool
    """Whether all probabilities are known exactly. Ollama returns only the best twenty tokens: a
    label beyond them, or too improbable to examine further, has an upper bound of its
    probability; the other labels, and the answer, have a lower bound."""
    label_mass: float | None
    """Share of the model's whole next-token probability that falls on labels at all."""
    energy: float | None
    """`qcat.encoding.scoring.label_energy`; None with a server, which does not return it."""
    on_topic: float | None
    """How similar the question is to on-topic ones: about 0 for these, in standard deviations
    (`qcat.calibration.calibration.OnTopic`); None if the model is not calibrated."""
    prediction_set: tuple[str, ...] | None
    """The labels that contain the right one with the requested coverage, most probable first; empty
    for an off-topic question. None unless a coverage was requested."""
    margin: float | None
    """The best probability minus the second best; a lower bound if not `exact`."""
    entropy: float | None
    """Entropy of the labels in nats; if not `exact`, of `probabilities` scaled to sum to 1."""
    truncated: bool
    """Whether the question was too long and was cut at the end."""

    @property
    def answer(self) -> str | None:
        """The label, or None if the model abstained; so a guess cannot pass for an answer."""
        return None if self.abstained else self.label

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "answer": self.answer,
            **vars(self),
            "probabilities": dict(self.probabilities),
        }
