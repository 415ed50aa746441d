"""Calibrate a bundle: ask it labelled questions as `qcat ask` does, and fit.

Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcat.bundle import CALIBRATION_KEY, REFERENCE_KEY, Bundle, write_sections
from qcat.classifier import Classifier, read_calibration
from qcat.prediction import Prediction
from qcat.scoring import Floats, temper
from qcat.trust.calibration import Calibration
from qcat.trust.decide import recalibrated
from qcat.trust.drift import Reference
from qcat.trust.fit import Fitted, fit, label_matrix
from qcat.trust.log import OWN_RULE
from qcat.trust.reliability import Reliability, reliability
from qcat.trust.thresholds import RiskCoverage, promise_threshold, risk_coverage

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """Labelled questions and what the uncalibrated model says of them."""

    labels: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    truth: npt.NDArray[np.int_]
    """Index of the right label, shape (questions,)."""

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Of the labels, shape (questions, labels)."""
        raw = label_matrix(self.predictions, self.labels)
        return temper(np.log(np.maximum(raw, np.finfo(np.float64).tiny)), temperature)

    def answers(self, calibration: Calibration) -> list[Prediction]:
        """What the model says with a calibration."""
        return [recalibrated(p, calibration, self.labels) for p in self.predictions]

    def judged(self, calibration: Calibration) -> Judged:
        """Which of these answers are right, and which may be given at all."""
        found = self.answers(calibration)
        truth = [self.labels[number] for number in self.truth]
        return Judged(
            [p.label for p in found],
            np.array([p.confidence for p in found], np.float64),
            np.array([p.label == label for p, label in zip(found, truth, strict=True)]),
            np.array([p.reason != "off_topic" for p in found]),
        )

    def fit(self) -> Fitted:
        """See `qcat.trust.fit.fit`. Raises DataError: too few questions."""
        return fit(self.predictions, self.truth, self.labels)

    def reliability(self, temperature: float = 1.0) -> Reliability:
        """How well calibrated the model is with a temperature."""
        return reliability(self.probabilities(temperature), self.truth)


@dataclass(frozen=True)
class Judged:
    """What a calibrated model answers; arrays of shape (questions,)."""

    labels: list[str]
    confidence: Floats
    right: npt.NDArray[np.bool_]
    answerable: npt.NDArray[np.bool_]
    """Whether the question is not off-topic."""

    def curve(self) -> RiskCoverage:
        """Error by share answered, at every threshold."""
        rows = self.answerable
        return risk_coverage(self.confidence[rows], self.right[rows], len(rows))

    def promise(
        self, calibration: Calibration, *, max_error: float, level: float, by_label: bool
    ) -> Calibration:
        """See `qcat.trust.thresholds.promise_threshold`. Raises DataError likewise."""
        return promise_threshold(
            calibration,
            self.labels,
            self.confidence,
            self.right,
            self.answerable,
            max_error=max_error,
            level=level,
            by_label=by_label,
        )

    def answered(self, calibration: Calibration) -> npt.NDArray[np.bool_]:
        """Whether each question is answered under the thresholds."""
        least = [calibration.label_thresholds.get(n, calibration.threshold) for n in self.labels]
        return self.answerable & (self.confidence >= np.array(least))


def carry_threshold(
    model: Path, old: Calibration, questions: Sequence[tuple[str, int]], progress: Progress
) -> Calibration:
    """Give a model the threshold of the one that it is to replace: the same promise, if it was one.

    Args:
        model: GGUF of the new model; changed if the old one has a threshold.
        old: calibration of the old one.
        questions: held out, with the index of the right label of each.
        progress: as in `ask_all`.

    Returns:
        The new model's calibration.

    Raises:
        DataError: the new model cannot keep the promise.
    """
    known = read_calibration(Bundle.read(model))
    if not (old.threshold or old.label_thresholds):
        return known
    asked = ask_all(model, questions, progress)
    if old.promise:
        known = asked.judged(known).promise(
            known,
            max_error=old.promise.max_error,
            level=old.promise.level,
            by_label=bool(old.label_thresholds),
        )
    else:
        known = known.with_threshold(old.threshold)
    write_sections(model, sections(known, asked))
    return known


def ask_all(model: Path, questions: Sequence[tuple[str, int]], progress: Progress) -> Asked:
    """Ask a bundle without its calibration, one question at a time: the path that serves.

    Args:
        model: the GGUF.
        questions: with the index of the right label of each.
        progress: told how many of them have been asked.

    Raises:
        BundleError, ModelError: the GGUF cannot be used.
    """
    found = []
    with Classifier.open(model, calibrated=False, review=False) as classifier:
        for done, (text, _) in enumerate(questions, 1):
            found.append(classifier.ask(text))
            progress(done, len(questions))
        labels = tuple(classifier.task.labels)
    return Asked(labels, tuple(found), np.array([label for _, label in questions]))


def sections(calibration: Calibration, asked: Asked) -> dict[str, dict[str, Any]]:
    """What goes into the GGUF: the calibration, and how a quiet time looks to `qcat drift`.

    Args:
        calibration: of the model.
        asked: questions that stand for such a time.
    """
    truth = [asked.labels[number] for number in asked.truth]
    reference = Reference.of(asked.answers(calibration), asked.labels, rule=OWN_RULE, truth=truth)
    return {CALIBRATION_KEY: calibration.to_dict(), REFERENCE_KEY: reference.to_dict()}


def summary(fitted: Fitted, fitted_on: Asked, measured: Asked | None) -> dict[str, Any]:
    """What a report says of a calibration.

    Args:
        fitted: the calibration.
        fitted_on: the questions that it was found on.
        measured: held-out questions to measure it by; None measures it on its own.
    """
    temperature = fitted.calibration.temperature
    asked = measured or fitted_on
    return {
        "questions": fitted.calibration.questions,
        "temperature": temperature,
        "temperature_interval": list(fitted.calibration.temperature_interval),
        "refused": fitted.refused,
        "measured_on": "held-out questions" if measured else "the questions it was found on",
        "before": asked.reliability().to_dict(),
        "after": asked.reliability(temperature).to_dict(),
    }
