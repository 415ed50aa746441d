"""Results of an evaluation, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qcat.calibration.reliability import Detection, Reliability

Decode = Literal["label", "free"]
RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
WARM_UP = 3
"""Questions asked before the clock starts."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap interval; without bounds if there is only one family."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True)
class Quality:
    """How good the answers of one system are."""

    accuracy: Estimate
    macro_f1: Estimate
    """Unweighted mean over the labels that occur, as the right one or as an answer."""
    weighted_f1: Estimate
    """Mean over labels, weighted by how often each is the right one."""


@dataclass(frozen=True)
class Bootstrap:
    """How the intervals were made: percentiles over resamples of whole families."""

    unit: Literal["group", "question"]
    units: int
    resamples: int = RESAMPLES
    level: float = LEVEL
    seed: int = SEED

    def __str__(self) -> str:
        if self.units < 2:
            return f"No intervals: there is only one {self.unit}."
        text = (
            f"Intervals: {self.level:.0%} percentile bootstrap, {self.resamples} resamples of "
            f"{self.units} {self.unit}s, seed {self.seed}"
        )
        if self.unit == "group":
            text += "; whole groups are drawn, since paraphrases are not independent"
        return f"{text}."


@dataclass(frozen=True)
class LabelScore:
    """One row of the table by label."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Questions with this right label."""


@dataclass(frozen=True)
class Confusion:
    """Counts of questions by right label (rows) and answer (columns)."""

    labels: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    invalid: tuple[int, ...] | None
    """Free answers that are not a label, by right label; None if that cannot happen."""

    def pairs(self) -> list[tuple[str, str, int]]:
        """Confused pairs (right label, answer, count), most frequent first."""
        found = [
            (truth, answer, count)
            for truth, row in zip(self.labels, self.matrix, strict=True)
            for answer, count in zip(self.labels, row, strict=True)
            if count and truth != answer
        ]
        return sorted(found, key=lambda pair: -pair[2])

    def used(self) -> Confusion:
        """Only the labels that occur, as the right one or as an answer."""
        counts = np.array(self.matrix)
        missed = np.array(self.invalid or [0] * len(self.labels))
        kept = np.flatnonzero(counts.sum(0) + counts.sum(1) + missed)
        return Confusion(
            tuple(self.labels[i] for i in kept),
            tuple(tuple(int(self.matrix[i][j]) for j in kept) for i in kept),
            tuple(self.invalid[i] for i in kept) if self.invalid else None,
        )


@dataclass(frozen=True)
class Answer:
    """One question of the file and the model's answer."""

    line: int
    text: str
    truth: str
    answer: str | None
    """None for a free answer that is not a label."""
    confidence: float | None
    """Probability of the answer among the labels."""
    label_mass: float
    said: str | None
    """The free answer, stripped; None unless asked for."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per question, asked one at a time after warm-up."""

    median_ms: float
    p95_ms: float
    questions: int
    warm_up: int = WARM_UP


@dataclass(frozen=True)
class Mass:
    """Label mass over the questions of the file."""

    median: float
    p5: float
    """Five in a hundred questions have less."""
    least: float


@dataclass(frozen=True)
class Signal:
    """One figure of a prediction, for on-topic questions and for others."""

    name: str
    median_on: float
    median_off: float
    detection: Detection


@dataclass(frozen=True)
class OffTopic:
    """How well figures of a prediction separate on-topic questions (on) from others (off)."""

    data: str
    questions: int
    signals: tuple[Signal, ...]
    """All are higher for on-topic questions."""
    caught: int
    """Off-topic questions that the model calls off-topic …"""
    false_alarms: int
    """… and on-topic questions that it calls off-topic."""
    masses: tuple[float, ...]
    """Label mass of the off-topic questions, in file order."""


@dataclass(frozen=True)
class Confidence:
    """How well calibrated the model is."""

    temperature: float
    calibrated: bool
    """If true and the temperature is 1, there were too few questions to fit it."""
    before: Reliability
    after: Reliability


@dataclass(frozen=True)
class Flip:
    """A question that two models answer differently."""

    line: int
    text: str
    truth: str
    other: str | None
    this: str | None


@dataclass(frozen=True)
class Abstaining:
    """The effect of the thresholds in the model."""

    reasons: Mapping[str, int]
    """Questions that the model abstained on, by reason."""
    answered: int
    errors: int
    """Wrong answers among those answered."""

    @property
    def left(self) -> int:
        """Questions that the model abstained on."""
        return sum(self.reasons.values())


@dataclass(frozen=True)
class Comparison:
    """Comparison of this model with another on the same questions."""

    model: str
    quality: Quality
    flips: tuple[Flip, ...]
    fixed: int
    """Questions that the other got wrong and this one got right."""
    broken: int
    """Questions that the other got right and this one got wrong."""
    p_value: float
    """McNemar's exact test, two-sided; it assumes independent questions."""
    abstaining: Abstaining
    """Of the other model."""


@dataclass(frozen=True)
class Baseline:
    """A baseline's quality on the same questions."""

    name: str
    train_data: str
    train_questions: int
    quality: Quality


@dataclass(frozen=True)
class Evaluation:
    """All results."""

    model: str
    task: str
    data: str
    decode: Decode
    questions: int
    truncated: int
    """Questions that were too long and were cut."""
    inexact: int
    """Answers of an Ollama server for which some probabilities are bounds."""
    bootstrap: Bootstrap
    quality: Quality
    per_label: tuple[LabelScore, ...]
    confusion: Confusion
    mistakes: tuple[Answer, ...]
    """The most confident ones."""
    invalid: int | None
    """How many free answers are not a label; None if that cannot happen."""
    latency: Latency
    label_mass: Mass
    confidence: Confidence
    abstaining: Abstaining
    off_topic: OffTopic | None
    comparison: Comparison | None
    baselines: tuple[Baseline, ...]
    answers: tuple[Answer, ...]

    def systems(self) -> list[tuple[str, Quality]]:
        """The model and those it is compared with, by name."""
        others = [(c.model, c.quality) for c in (self.comparison,) if c]
        others += [(b.name, b.quality) for b in self.baselines]
        return [(self.model, self.quality), *others]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def off_topic_rows(off: OffTopic) -> list[tuple[str, ...]]:
    """The signals as a table, heading first."""
    rows: list[tuple[str, ...]] = [("median", "on the list", "off the list", "AUROC", "FPR95")]
    for signal in off.signals:
        medians = (f"{signal.median_on:.4f}", f"{signal.median_off:.4f}")
        found = signal.detection
        rows.append((signal.name, *medians, f"{found.auroc:.3f}", f"{found.fpr:.3f}"))
    return rows
