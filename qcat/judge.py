"""From a backend's scores to a `Prediction`: which label, how sure, and whether to abstain.

Independent of where the scores come from, and of how a question is encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcat.calibration.calibration import Calibration
from qcat.calibration.decide import decide
from qcat.encoding.scoring import (
    BoundedScores,
    Floats,
    Scores,
    label_log_probabilities,
    temper,
    temper_bounds,
)
from qcat.encoding.trie import LabelTrie
from qcat.errors import ModelError, ServerError
from qcat.prediction import Prediction


@dataclass(frozen=True)
class Judge:
    """What decides about the answers of one open model."""

    name: str
    """Of the model, for messages."""
    labels: tuple[str, ...]
    """Those that may be answered."""
    among: tuple[int, ...]
    """Their numbers in the trie, which may hold others too, except for a model on a server."""
    trie: LabelTrie
    calibration: Calibration
    coverage: float | None
    """Of the prediction sets; None to use thresholds."""
    accepts: Callable[[int], bool]
    """Whether the grammar accepts a label, by its number in the trie. It has the last word."""

    def predict(self, scores: Scores | BoundedScores, truncated: bool) -> Prediction:
        """The prediction for a question's scores.

        If the model knows more labels than may be answered, the probabilities of these are scaled
        to sum to 1: they are given that one of them is right.

        Args:
            scores: what the backend found.
            truncated: whether the question was cut.

        Raises:
            ModelError: the grammar accepts no label, or not the server's.
            ServerError: sets are asked for, and the server gives no probabilities.
        """
        if isinstance(scores, BoundedScores):
            return self._predict_bounded(scores, truncated)
        logs = label_log_probabilities(self.trie, scores.logits)[list(self.among)]
        probabilities = temper(logs, self.calibration.temperature)
        order = np.argsort(-probabilities, kind="stable")
        best = next((int(i) for i in order if self.accepts(self.among[i])), None)
        if best is None:
            raise ModelError(f"{self.name}: its grammar accepts no label: export it again")
        known = (probabilities, probabilities)
        return self._decide(best, known, scores.mass, scores.energy, truncated)

    def _predict_bounded(self, scores: BoundedScores, truncated: bool) -> Prediction:
        if not self.accepts(scores.label):
            raise ModelError(f"{self.name}: gave an answer that is no label: ask again")
        if scores.mass is None:
            return self._without_probabilities(scores.label, truncated)
        bounds = temper_bounds(scores.lower, scores.upper, self.calibration.temperature)
        return self._decide(scores.label, bounds, scores.mass, None, truncated)

    def _without_probabilities(self, label: int, truncated: bool) -> Prediction:
        if self.coverage is not None:
            raise ServerError(
                f"{self.name}: this Ollama gives no probabilities, which sets need: 0.12.11 or "
                "later does"
            )
        best = self.labels[label]
        nothing_known = self.calibration.reason(best, 0.0, 0.0, False)
        return Prediction(
            label=best,
            confidence=None,
            abstained=nothing_known is not None,
            reason=nothing_known,
            probabilities={},
            exact=False,
            label_mass=None,
            energy=None,
            on_topic=None,
            prediction_set=None,
            margin=None,
            entropy=None,
            truncated=truncated,
        )

    def _decide(
        self,
        best: int,
        bounds: tuple[Floats, Floats],
        mass: float,
        energy: float | None,
        truncated: bool,
    ) -> Prediction:
        return decide(
            self.calibration,
            self.labels,
            best,
            *bounds,
            mass=mass,
            energy=energy,
            truncated=truncated,
            coverage=self.coverage,
        )
