"""The calibration of a model's confidence: numbers stored in its GGUF, and how they are applied.

Needs only numpy, because it runs together with the model. `qcat.calibration.fit` computes the
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from qcat.prediction import Reason

VERSION = 1
_GATE_SHARE = 0.2
"""Share of a prediction set's allowed misses that is used for calling questions off-topic."""
_FAR = 1e6  # larger than any log-odds, energy or score of a model


@dataclass(frozen=True)
class OnTopic:
    """A score for how on-topic a question is, from two signals of the model.

    It is the average of label mass (as log-odds) and energy, each in standard deviations from its
    mean over on-topic questions: about 0 for on-topic questions, far below for others. A server
    does not return the energy, so there the score uses label mass alone, with its own threshold.
    """

    mass_mean: float
    mass_deviation: float
    energy_mean: float
    energy_deviation: float
    threshold: float
    """Below this score a question counts as off-topic."""
    mass_threshold: float
    """The same for the score of label mass alone."""

    def score(self, mass: float, energy: float | None) -> float:
        """The score of one question.

        Args:
            mass: its label mass, from 0 to 1.
            energy: its `label_energy`; None if unknown.
        """
        by_mass = (log_odds(mass) - self.mass_mean) / self.mass_deviation
        if energy is None:
            return by_mass
        return (by_mass + (energy - self.energy_mean) / self.energy_deviation) / 2

    def is_off(self, score: float, energy: float | None) -> bool:
        """Whether a score, with or without energy, is below its threshold."""
        return score < (self.mass_threshold if energy is None else self.threshold)


@dataclass(frozen=True)
class Conformal:
    """Data for split-conformal prediction sets: scores of held-out questions, ascending.

    Vovk et al. 2005, Algorithmic Learning in a Random World; Sadinle et al. 2019, Least Ambiguous
    Set-Valued Classifiers, whose sets are the smallest on average. A set holds every label that
    is at least as probable as the k-th least probable right label of the held-out questions, and
    none if the question's on-topic score is below the k'-th lowest. Each of the two
    misses the right label of a new question with a probability of at most k / (n + 1), so that the
    probabilities add up to at most 1 − coverage, however good or bad the model is. This is exact if
    the questions were used for nothing else. Here the temperature and the signals' positions, five
    numbers, come from the same questions; bench/trust.py shows that this hardly matters.
    """

    truth: tuple[float, ...]
    """Probability of the right label."""
    on_topic: tuple[float, ...]
    """`OnTopic.score` of label mass and energy."""
    mass_on_topic: tuple[float, ...]
    """`OnTopic.score` of label mass alone."""

    @staticmethod
    def fewest(coverage: float) -> int:
        """Fewest questions for which a set smaller than all labels can have this coverage."""
        return math.ceil(1 / ((1 - _GATE_SHARE) * (1 - coverage)) - 1 - 1e-9)

    def least(self, coverage: float) -> float:
        """The probability that a label needs to be in the set; 0 if the questions are too few."""
        rank = _rank(len(self.truth), (1 - _GATE_SHARE) * (1 - coverage))
        return self.truth[rank - 1] if rank else 0.0

    def gate(self, coverage: float, *, energy: bool) -> float:
        """The on-topic score below which the set is empty; −∞ if the questions are too few."""
        scores = self.on_topic if energy else self.mass_on_topic
        rank = _rank(len(scores), _GATE_SHARE * (1 - coverage))
        return scores[rank - 1] if rank else -math.inf


@dataclass(frozen=True)
class Promise:
    """How a threshold was found by `qcat.calibration.thresholds`."""

    max_error: float
    """At most this share of the answered questions is answered wrong …"""
    level: float
    """… with this confidence."""
    questions: int
    """It was found on."""
    answered: int
    errors: int
    """Wrong answers among those answered."""


@dataclass(frozen=True)
class Calibration:
    """A calibration. The default leaves probabilities unchanged and never abstains."""

    questions: int = 0
    """Number of questions it was fitted on; 0 for the default."""
    temperature: float = 1.0
    temperature_interval: tuple[float, float] = (1.0, 1.0)
    """With 95 % confidence."""
    threshold: float | None = None
    """Confidence below which the model abstains; None if not set."""
    label_thresholds: Mapping[str, float] = field(default_factory=dict)
    """The same for answers with these labels."""
    promise: Promise | None = None
    on_topic: OnTopic | None = None
    gate: bool = True
    """Whether the model abstains on a question whose on-topic score is low."""
    conformal: Conformal | None = None

    def with_threshold(self, threshold: float) -> Calibration:
        """A copy with one threshold, set by hand; with 0 the model never abstains."""
        return replace(
            self, threshold=threshold, label_thresholds={}, promise=None, gate=threshold > 0
        )

    def reason(self, label: str, confidence: float, second: float, off: bool) -> Reason | None:
        """The reason why the model abstains on a question, if it does.

        Args:
            label: the most probable label.
            confidence: its probability.
            second: the second best label's.
            off: whether the on-topic score is below its threshold.
        """
        if off and self.gate:
            return "off_topic"
        threshold = self.label_thresholds.get(label, self.threshold)
        if threshold is None:
            return None
        # A threshold of 1 answers nothing, though rounding can make a confidence 1.
        if confidence >= threshold and threshold < 1:
            return None
        return "ambiguous" if confidence + second >= threshold else "low_confidence"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = {
            "version": VERSION,
            "questions": self.questions,
            "temperature": self.temperature,
            "temperature_interval": list(self.temperature_interval),
            "threshold": self.threshold,
            "gate": self.gate,
        }
        if self.label_thresholds:
            found["label_thresholds"] = dict(self.label_thresholds)
        if self.promise:
            found["promise"] = vars(self.promise)
        if self.on_topic:
            found["on_topic"] = vars(self.on_topic)
        if self.conformal:
            found["conformal"] = {key: list(value) for key, value in vars(self.conformal).items()}
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], labels: Sequence[str]) -> Calibration:
        """Rebuild and check the result of `to_dict`; the default if it is empty.

        Args:
            data: from a file, so it may be anything.
            labels: the task's.

        Raises:
            ValueError: what is wrong, in a few words.
        """
        if not data:
            return cls()
        if data.get("version") != VERSION:
            raise ValueError("is of another version of qcat")
        by_label = _mapping(data, "label_thresholds")
        if not set(by_label) <= set(labels):
            raise ValueError("has thresholds of labels that the task lacks")
        low, high = _numbers(data, "temperature_interval", 0, math.inf)
        gate, threshold = data.get("gate") is not False, data.get("threshold")
        if threshold is not None:
            threshold = _checked(threshold, "threshold", 0, 1)
        # Earlier versions wrote this for no threshold, before None; a promise always sets one.
        if gate and threshold == 0 and not data.get("promise"):
            threshold = None
        promise, topic, sets = (_mapping(data, k) for k in ("promise", "on_topic", "conformal"))
        return cls(
            questions=_count(data, "questions"),
            temperature=_number(data, "temperature", 1e-3, 1e3),
            temperature_interval=(low, high),
            threshold=threshold,
            label_thresholds={label: _number(by_label, label, 0, 1) for label in by_label},
            gate=gate,
            promise=_promise(promise) if promise else None,
            on_topic=_on_topic(topic) if topic else None,
            conformal=_conformal(sets) if sets else None,
        )


def log_odds(share: float) -> float:
    """log(p / (1 − p)), with p kept as far from 0 and 1 as float32 can distinguish."""
    kept = min(max(share, 1e-9), 1 - 1e-6)
    return math.log(kept / (1 - kept))


def _rank(count: int, missed: float) -> int:
    # The tiny addition keeps 0.05 · 100 from being 4.999…
    return math.floor((count + 1) * missed + 1e-9)


def _promise(data: Mapping[str, Any]) -> Promise:
    shares = {key: _number(data, key, 0, 1) for key in ("max_error", "level")}
    counts = {key: _count(data, key) for key in ("questions", "answered", "errors")}
    return Promise(shares["max_error"], shares["level"], **counts)


def _on_topic(data: Mapping[str, Any]) -> OnTopic:
    anywhere = ("mass_mean", "energy_mean", "threshold", "mass_threshold")
    positive = ("mass_deviation", "energy_deviation")
    return OnTopic(
        **{key: _number(data, key, -_FAR, _FAR) for key in anywhere},
        **{key: _number(data, key, 1 / _FAR, _FAR) for key in positive},
    )


def _conformal(data: Mapping[str, Any]) -> Conformal:
    truth = _numbers(data, "truth", 0, 1)
    topics = [_numbers(data, k, -_FAR, _FAR) for k in ("on_topic", "mass_on_topic")]
    for scores in (truth, *topics):
        if not scores or list(scores) != sorted(scores):
            raise ValueError("has scores for prediction sets that are not in order")
    return Conformal(truth, *topics)


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"has no object under {key!r}")
    return value


def _number(data: Mapping[str, Any], key: str, least: float, most: float) -> float:
    return _checked(data.get(key), key, least, most)


def _numbers(data: Mapping[str, Any], key: str, least: float, most: float) -> tuple[float, ...]:
    values = data.get(key)
    if not isinstance(values, list):
        raise ValueError(f"has no list under {key!r}")
    return tuple(_checked(value, key, least, most) for value in values)


def _checked(value: Any, key: str, least: float, most: float) -> float:
    with suppress(OverflowError):  # a whole number of 400 digits
        if type(value) in (int, float) and math.isfinite(value) and least <= value <= most:
            return float(value)
    raise ValueError(f"has no sensible number under {key!r}")


def _count(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"has no count under {key!r}")
    return value
