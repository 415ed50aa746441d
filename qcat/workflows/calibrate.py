"""Calibrate a bundle: ask it labelled questions as `qcat ask` does, and fit.

Independent of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcat.calibration.calibration import Calibration
from qcat.calibration.decide import OWN_RULE, recalibrated
from qcat.calibration.fit import Fitted, fit, label_matrix
from qcat.calibration.groups import one_of_each
from qcat.calibration.reliability import Reliability, reliability
from qcat.calibration.thresholds import RiskCoverage, promise_threshold, risk_coverage
from qcat.classifier import Classifier
from qcat.data.dataset import Example
from qcat.encoding.scoring import Floats, log_shares, temper
from qcat.errors import DataError
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import CALIBRATION_KEY, REFERENCE_KEY, write_sections
from qcat.monitor.drift import Reference
from qcat.opening import read_calibration
from qcat.prediction import Prediction
from qcat.progress import Count


@dataclass(frozen=True)
class Asked:
    """Labelled questions and the uncalibrated model's answers to them."""

    labels: tuple[str, ...]
    """The task's."""
    predictions: tuple[Prediction, ...]
    truth: npt.NDArray[np.int_]
    """Index of the right label, shape (questions,)."""
    groups: tuple[str | None, ...]
    """As in `Example`."""

    def one_of_each(self) -> Asked:
        """One question of each group; counting every paraphrase would overstate a bound."""
        return self.part(one_of_each(self.groups))

    def part(self, rows: Sequence[int]) -> Asked:
        """A subset of the questions."""
        return Asked(
            self.labels,
            tuple(self.predictions[row] for row in rows),
            self.truth[list(rows)],
            tuple(self.groups[row] for row in rows),
        )

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Probabilities of the labels, shape (questions, labels)."""
        return temper(log_shares(label_matrix(self.predictions, self.labels)), temperature)

    def answers(self, calibration: Calibration) -> list[Prediction]:
        """The model's answers under a calibration."""
        return [recalibrated(p, calibration, self.labels) for p in self.predictions]

    def judged(self, calibration: Calibration) -> Judged:
        """Which of these answers are right, and which the model may give at all."""
        found = self.answers(calibration)
        truth = [self.labels[number] for number in self.truth]
        return Judged(
            [p.label for p in found],
            np.array([p.confidence for p in found], np.float64),
            np.array([p.label == label for p, label in zip(found, truth, strict=True)]),
            np.array([p.reason != "off_topic" for p in found]),
            np.array([not p.abstained for p in found]),
        )

    def promise(
        self, calibration: Calibration, *, max_error: float, level: float, by_label: bool
    ) -> Calibration:
        """Set thresholds by `qcat.calibration.thresholds.promise_threshold`, one question a group.

        Raises:
            DataError: the promise is not possible.
        """
        judged = self.one_of_each().judged(calibration)
        return promise_threshold(
            calibration,
            judged.labels,
            judged.confidence,
            judged.right,
            judged.answerable,
            max_error=max_error,
            level=level,
            by_label=by_label,
        )

    def fit(self) -> Fitted:
        """See `qcat.calibration.fit.fit`. Raises DataError if there are too few questions."""
        return fit(self.predictions, self.truth, self.labels)

    def reliability(self, temperature: float = 1.0) -> Reliability:
        """How well calibrated the model is with a temperature."""
        return reliability(self.probabilities(temperature), self.truth)


@dataclass(frozen=True)
class Judged:
    """A calibrated model's answers; arrays of shape (questions,)."""

    labels: list[str]
    confidence: Floats
    right: npt.NDArray[np.bool_]
    answerable: npt.NDArray[np.bool_]
    """Whether the question is not off-topic."""
    answered: npt.NDArray[np.bool_]
    """Whether it is answered under the thresholds."""

    def curve(self) -> RiskCoverage:
        """Error against share answered, at every threshold. Raises DataError if there is none."""
        rows = self.answerable
        if not rows.any():
            raise DataError("all questions are called off-topic: a curve needs others")
        return risk_coverage(self.confidence[rows], self.right[rows], len(rows))


def carry_threshold(
    model: Path, old: Calibration, questions: Sequence[Example], progress: Count
) -> Calibration:
    """Give a model the threshold of the model it will replace, or the same promise if it had one.

    Args:
        model: GGUF of the new model; whatever threshold it has is replaced.
        old: calibration of the old one.
        questions: held-out questions.
        progress: as in `ask_all`.

    Returns:
        The new model's calibration.

    Raises:
        DataError: the new model cannot keep the promise; the file is unchanged.
    """
    known = read_calibration(Bundle.read(model))
    known = replace(known, threshold=None, label_thresholds={}, promise=None, gate=old.gate)
    asked = ask_all(model, questions, progress)
    if old.promise:
        known = asked.promise(
            known,
            max_error=old.promise.max_error,
            level=old.promise.level,
            by_label=bool(old.label_thresholds),
        )
    elif old.threshold is not None:
        known = known.with_threshold(old.threshold)
    write_sections(model, sections(known, asked))
    return known


def ask_all(model: Path, questions: Sequence[Example], progress: Count) -> Asked:
    """Ask a bundle without its calibration, one question at a time, as in normal use.

    Args:
        model: the GGUF.
        questions: with their right labels.
        progress: called with how many of them have been asked.

    Raises:
        BundleError, ModelError: the GGUF cannot be used.
    """
    found = []
    with Classifier.open(model, calibrated=False) as classifier:
        for done, question in enumerate(questions, 1):
            found.append(classifier.ask(question.text))
            progress(done, len(questions))
        labels = tuple(classifier.task.labels)
    return Asked(
        labels,
        tuple(found),
        np.array([question.label for question in questions]),
        tuple(question.group for question in questions),
    )


def sections(calibration: Calibration, asked: Asked) -> dict[str, dict[str, Any]]:
    """What is stored in the GGUF: the calibration, and the reference for `qcat drift`.

    Args:
        calibration: of the model.
        asked: questions that represent a reference period.
    """
    truth = [asked.labels[number] for number in asked.truth]
    reference = Reference.of(
        asked.answers(calibration), asked.labels, rule=OWN_RULE, truth=truth, groups=asked.groups
    )
    return {CALIBRATION_KEY: calibration.to_dict(), REFERENCE_KEY: reference.to_dict()}


def summary(fitted: Fitted, fitted_on: Asked, measured: Asked | None) -> dict[str, Any]:
    """The description of a calibration in a report.

    Args:
        fitted: the calibration.
        fitted_on: the questions that it was fitted on.
        measured: held-out questions to measure it on; None uses the questions it was fitted on.
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
