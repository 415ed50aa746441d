"""`Prediction`: what is known of the answer to one question. Plain data, no model behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["off_topic", "ambiguous", "low_confidence"]
"""Why the model abstained. `off_topic`: the question seems to belong to no label. `ambiguous`:
the two best labels have between them what an answer needs, or a prediction set has several labels.
`low_confidence`: not even that."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one question.

    An Ollama server older than 0.12.11 gives no log-probabilities: there is a label and no more.
    Confidence, label mass, margin and entropy are None then, and `probabilities` is empty.
    """

    label: str
    """The most probable label, or where a server leaves that open the one that the model writes:
    always one of the task's, also where the model abstained. See `answer`."""
    confidence: float | None
    """Its probability given the question, from 0 to 1, calibrated if the model is; the least that
    it can be if not `exact`."""
    abstained: bool
    """Whether the model is not sure enough to answer."""
    reason: Reason | None
    """Why; None unless `abstained`."""
    probabilities: Mapping[str, float]
    """All labels, the answer first, then the most probable; they sum to 1 if `exact`."""
    exact: bool
    """Whether all probabilities are known. Ollama shows the best twenty tokens only: a label
    beyond them, or too improbable to look for further, has the most that its probability can be;
    the others, and the answer, have the least."""
    label_mass: float | None
    """Share of the model's whole next-token probability that falls on labels at all."""
    energy: float | None
    """`qcat.encoding.scoring.label_energy`; None through a server, which does not show it."""
    on_topic: float | None
    """How much the question is like those of the list: about 0 for these, in standard deviations
    (`qcat.calibration.calibration.OnTopic`); None if the model is not calibrated."""
    prediction_set: tuple[str, ...] | None
    """The labels among which the right one is with the coverage asked for, most probable first;
    empty for a question off the list. None unless a coverage was asked for."""
    margin: float | None
    """The best probability less the second best; the least that it can be if not `exact`."""
    entropy: float | None
    """Of the label distribution, in nats; if not `exact`, of `probabilities` scaled to sum to 1."""
    truncated: bool
    """Whether the question was too long and its end was cut."""

    @property
    def answer(self) -> str | None:
        """The label, or None where the model abstained: a guess cannot be taken for an answer."""
        return None if self.abstained else self.label

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "answer": self.answer,
            **vars(self),
            "probabilities": dict(self.probabilities),
        }
