"""Drift: tests whether a window of answers differs from the reference. Pure computation.

Each signal has a separate test: the label mix by chi-square, confidence and label mass by
Kolmogorov-Smirnov, the share abstained and the accuracy by Fisher's exact test, all SciPy's. The
p-values are corrected for their number (Bonferroni), so that without drift a window is
flagged no more often than the level allows. A change too small to matter is ignored, however
significant it is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from qcat.calibration.groups import one_of_each
from qcat.errors import DataError
from qcat.monitor.log import Record
from qcat.task import MAX_LABELS

FEWEST = 100
"""Fewest questions of a window and a reference: the label mix of fewer is mostly noise."""
LEVEL = 0.01
"""By default, the largest share of windows without drift that may be flagged."""
LEAST_PSI = 0.1
"""Population stability index below which a label mix counts as unchanged, a common value."""
LEAST_SHARE = 0.05
"""Share of the questions below which any other change is ignored."""
SAMPLE = 2000
"""Number of confidences, and of label masses, to keep, evenly spaced over their order."""
MOST = 10**6
"""Largest number of questions in a stored reference, of at most `MAX_LABELS` labels."""

_DIGITS = 3  # smaller differences come from the processor and the batch shape
_RESAMPLES = 9999
_FEWEST_EXPECTED = 5  # below which chi-square's own p-value is not reliable
_MOST_DRAWN = 2 * MAX_LABELS  # no two sets of answers have more labels, and drawing takes long

Name = Literal["label mix", "confidence", "label mass", "share abstained", "accuracy"]


class Answered(Protocol):
    """The fields of an answer that are compared; `Prediction` and a log's `Record` have them."""

    @property
    def label(self) -> str: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def label_mass(self) -> float | None: ...
    @property
    def abstained(self) -> bool: ...


@dataclass(frozen=True)
class Reference:
    """The summary of a set of answers that others are compared with; windows are summarized too."""

    questions: int
    labels: Mapping[str, int]
    """How often each label was the answer."""
    confidence: tuple[float, ...]
    """From 0 to 1, sorted, at most `SAMPLE`; empty if the backend returned none."""
    label_mass: tuple[float, ...]
    """Likewise."""
    abstained: int
    """How many questions the model abstained on."""
    rule: str | None
    """What decided that, as in `Record`; None if it was not always the same."""
    right: int | None = None
    """How many answers were right; None if unknown."""

    @classmethod
    def of(
        cls,
        answers: Iterable[Answered],
        labels: Iterable[str] = (),
        *,
        rule: str | None,
        truth: Sequence[str] | None = None,
        groups: Sequence[Hashable | None] | None = None,
    ) -> Reference:
        """Summarize answers.

        Args:
            answers: the answers, in any order.
            labels: labels to count even if they never occur, such as all of the task's.
            rule: as above.
            truth: the right label of each answer, in the same order, if known.
            groups: the paraphrase group of each answer, or None if it has none. One question of
                each group counts, since the tests assume independent questions.
        """
        rows = list(answers)
        if groups is not None:
            if len(groups) != len(rows):
                raise ValueError("a group for each answer expected")
            kept = one_of_each(groups)
            rows = [rows[row] for row in kept]
            truth = truth and [truth[row] for row in kept]
        right = None
        if truth is not None:
            right = sum(row.label == label for row, label in zip(rows, truth, strict=True))
        return cls(
            questions=len(rows),
            labels={**dict.fromkeys(labels, 0), **Counter(row.label for row in rows)},
            confidence=_sample([row.confidence for row in rows]),
            label_mass=_sample([row.label_mass for row in rows]),
            abstained=sum(row.abstained for row in rows),
            rule=rule,
            right=right,
        )

    @classmethod
    def of_log(cls, records: Sequence[Record]) -> Reference:
        """Summarize records of a log, which contain the rule but not the right labels."""
        rules = {record.rule for record in records}
        return cls.of(records, rule=rules.pop() if len(rules) == 1 else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reference:
        """Rebuild the result of `to_dict`.

        Raises:
            DataError: names the invalid entry; the data may come from anyone.
        """
        questions = _count(data, "questions", MOST)
        labels = data.get("labels")
        if isinstance(labels, dict) and len(labels) > MAX_LABELS:
            raise DataError(f"'labels' must be at most {MAX_LABELS}")
        if not isinstance(labels, dict) or questions != sum(
            _count(labels, label, questions) for label in labels
        ):
            raise DataError("'labels' must count each question once")
        rule = data.get("rule")
        if rule is not None and not isinstance(rule, str):
            raise DataError("'rule' must be a text")
        return cls(
            questions=questions,
            labels=dict(labels),
            confidence=_shares(data, "confidence"),
            label_mass=_shares(data, "label_mass"),
            abstained=_count(data, "abstained", questions),
            rule=rule,
            right=None if data.get("right") is None else _count(data, "right", questions),
        )


@dataclass(frozen=True)
class Signal:
    """One comparison of a window with the reference."""

    name: Name
    reference: float | None
    """A mean or a share, from 0 to 1; None for the label mix, which is not a single figure."""
    window: float | None
    change: float
    """The size: the label mix's PSI, the Kolmogorov-Smirnov distance, or window minus reference."""
    p_value: float
    """p-value of the test, corrected for the number of signals."""
    psi: float | None
    """Population stability index, in nats; by tenths of the reference for confidence and mass."""
    drifted: bool
    """Whether the change is both significant and large enough."""


@dataclass(frozen=True)
class Drift:
    """A window against the reference."""

    questions: int
    reference_questions: int
    level: float
    enough: bool
    """Whether there are enough questions to decide; if not, there are no signals."""
    signals: tuple[Signal, ...]
    labels: tuple[tuple[str, float, float], ...]
    """Label, its share in the reference and in the window; the most changed first."""

    @property
    def drifted(self) -> tuple[Signal, ...]:
        """The signals that drifted; empty without drift."""
        return tuple(signal for signal in self.signals if signal.drifted)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"drifted": bool(self.drifted), **asdict(self)}


@dataclass(frozen=True)
class Accuracy:
    """The numbers of answers to labelled questions and of right ones."""

    right: int
    questions: int


def compare(
    reference: Reference,
    window: Reference,
    *,
    level: float = LEVEL,
    accuracy: Accuracy | None = None,
) -> Drift:
    """Test every signal that both sides have.

    Confidence and mass may be missing with an old server. The share abstained is compared only if
    the same rule applied to both sides, the accuracy only if the reference's is known.

    Args:
        reference: the reference period.
        window: the window to test.
        level: the largest share of windows without drift that may be flagged.
        accuracy: accuracy of the same model now, on labelled questions; only a drop counts.
    """
    shares = _label_shares(reference, window)
    enough = min(reference.questions, window.questions) >= FEWEST
    found = list(_signals(reference, window, accuracy)) if enough else []
    signals = tuple(
        Signal(name, before, now, change, p, psi, p <= level and abs(change) >= least)
        for name, before, now, change, raw, psi, least in found
        for p in [min(1.0, raw * len(found))]
    )
    return Drift(window.questions, reference.questions, level, enough, signals, shares)


def history(
    reference: Reference,
    records: Iterable[Record],
    size: int,
    *,
    last: int | None = None,
    level: float = LEVEL,
) -> list[tuple[datetime, Drift]]:
    """Compare window after window of `size` records, each with the time of its last.

    The last window may be smaller; one with fewer than `FEWEST` records is left out. Each window is
    summarized before the next is read, so that the log may have any length.

    Args:
        reference: the reference period.
        records: records in the order of the log.
        size: size of a window.
        last: compare only this many windows, from the end; None for all.
        level: as in `compare`.
    """
    rest = iter(records)
    windows: deque[tuple[datetime, Reference]] = deque(maxlen=last)
    while window := list(islice(rest, size)):
        if len(window) >= FEWEST:
            windows.append((window[-1].time, Reference.of_log(window)))
    return [(time, compare(reference, window, level=level)) for time, window in windows]


def psi(expected: npt.ArrayLike, found: npt.ArrayLike) -> float:
    """Population stability index of two rows of counts, in nats; 0 if their shares are the same.

    It is the sum of both Kullback-Leibler divergences. Half a count is added to each cell, so that
    an empty cell gives a large but finite value.
    """
    from scipy.special import rel_entr

    a, b = (np.asarray(counts, np.float64) + 0.5 for counts in (expected, found))
    a, b = a / a.sum(), b / b.sum()
    return float((rel_entr(a, b) + rel_entr(b, a)).sum())


_Found = tuple[Name, float | None, float | None, float, float, float | None, float]
"""As in `Signal` up to the PSI, with the raw p-value; then the smallest change that counts."""


def _signals(
    reference: Reference, window: Reference, accuracy: Accuracy | None
) -> Iterator[_Found]:
    from scipy.stats import ks_2samp

    table = _label_table(reference, window)
    stability = psi(*table)
    yield "label mix", None, None, stability, _mix_p_value(table), stability, LEAST_PSI
    pairs: list[tuple[Name, tuple[float, ...], tuple[float, ...]]] = [
        ("confidence", reference.confidence, window.confidence),
        ("label mass", reference.label_mass, window.label_mass),
    ]
    for name, before, now in pairs:
        if min(len(before), len(now)) >= FEWEST:
            test = ks_2samp(before, now, method="asymp")
            distance, p = float(test.statistic), float(test.pvalue)
            stability = _psi_by_tenths(before, now)
            yield name, _mean(before), _mean(now), distance, p, stability, LEAST_SHARE
    if reference.rule is not None and reference.rule == window.rule:
        yield _fisher(
            "share abstained",
            (reference.abstained, reference.questions),
            (window.abstained, window.questions),
            "two-sided",
        )
    if accuracy and accuracy.questions and reference.right is not None:
        yield _fisher(
            "accuracy",
            (reference.right, reference.questions),
            (accuracy.right, accuracy.questions),
            "less",
        )


def _fisher(name: Name, before: tuple[int, int], now: tuple[int, int], side: str) -> _Found:
    """Two shares, each as (hits, questions); `side` says how the second may differ."""
    from scipy.stats import fisher_exact

    table = [[hits, questions - hits] for hits, questions in (now, before)]
    p = float(fisher_exact(table, alternative=side).pvalue)
    a, b = before[0] / before[1], now[0] / now[1]
    return name, a, b, b - a, p, None, LEAST_SHARE


def _label_table(reference: Reference, window: Reference) -> npt.NDArray[np.int_]:
    """Counts in the reference and in the window, shape (2, labels that occur)."""
    names = {**reference.labels, **window.labels}
    table = np.array([[side.labels.get(n, 0) for n in names] for side in (reference, window)])
    return table[:, table.any(0)]


def _label_shares(reference: Reference, window: Reference) -> tuple[tuple[str, float, float], ...]:
    shares = [
        (
            label,
            reference.labels.get(label, 0) / max(reference.questions, 1),
            window.labels.get(label, 0) / max(window.questions, 1),
        )
        for label in {**reference.labels, **window.labels}
    ]
    return tuple(sorted(shares, key=lambda row: -abs(row[2] - row[1])))


def _mix_p_value(table: npt.NDArray[np.int_]) -> float:
    from scipy.stats import MonteCarloMethod, chi2_contingency
    from scipy.stats.contingency import expected_freq

    if expected_freq(table).min() >= _FEWEST_EXPECTED or table.shape[1] > _MOST_DRAWN:
        return float(chi2_contingency(table, correction=False).pvalue)
    draws = MonteCarloMethod(_RESAMPLES, batch=1000, rng=np.random.default_rng(0))
    return float(chi2_contingency(table, correction=False, method=draws).pvalue)


def _psi_by_tenths(before: Sequence[float], now: Sequence[float]) -> float:
    """PSI over bins that each hold a tenth of the reference; equal borders merge bins."""
    borders = np.unique(np.quantile(before, np.linspace(0.1, 0.9, 9)))
    bins = len(borders) + 1
    return psi(
        *(np.bincount(np.searchsorted(borders, side), minlength=bins) for side in (before, now))
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _sample(values: Sequence[float | None]) -> tuple[float, ...]:
    found = np.sort([value for value in values if value is not None])
    if len(found) > SAMPLE:
        found = found[np.linspace(0, len(found) - 1, SAMPLE).round().astype(np.int_)]
    return tuple(np.round(found, _DIGITS).tolist())


def _count(data: Mapping[str, Any], key: str, most: int) -> int:
    value = data.get(key)
    if type(value) is not int or value < 0 or value > most:
        raise DataError(f"{key!r} must be a count of questions, at most {most}")
    return value


def _shares(data: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = data.get(key)
    if not isinstance(values, list | tuple) or not all(map(_is_share, values[: SAMPLE + 1])):
        raise DataError(f"{key!r} must be numbers from 0 to 1")
    if len(values) > SAMPLE:
        raise DataError(f"{key!r} must be at most {SAMPLE} numbers")
    return tuple(float(value) for value in values)


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]
