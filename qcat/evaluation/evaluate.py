"""Measure a bundle on labelled questions: quality, mistakes, latency, confidence, comparisons.

The model is asked through `Classifier`, in the very path that serves; the figures are
scikit-learn's. Knows nothing of the command line, of files to write, or of pictures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcat.calibration.calibration import Calibration
from qcat.calibration.fit import label_matrix
from qcat.calibration.reliability import Detection, Reliability, detection, reliability
from qcat.classifier import Classifier
from qcat.data.dataset import Example, read_examples, read_texts
from qcat.encoding.scoring import log_shares, temper
from qcat.errors import DataError
from qcat.evaluation.baseline import NAME as BASELINE_NAME
from qcat.evaluation.baseline import tfidf_predictions
from qcat.gguf.bundle import Bundle
from qcat.prediction import Prediction
from qcat.progress import Progress, silent
from qcat.task import Task

Decode = Literal["label", "free"]
"""Called with the step's name, what is done of it, and the total."""

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
LATENCY_QUESTIONS = 100
"""So many are timed by default, or all that there are."""
WARM_UP = 3
"""Questions asked before the clock starts."""
MISTAKES = 10
INVALID = -1
"""Stands for a free answer that is no label, among label indices."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap interval; without bounds where there is only one family."""

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
    """By right label, free answers that are no label; None where that cannot happen."""

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
    """One question of the file and what the model made of it."""

    line: int
    text: str
    truth: str
    answer: str | None
    """None for a free answer that is no label."""
    confidence: float | None
    """Probability of the answer among the labels."""
    label_mass: float
    said: str | None
    """The free answer, stripped; None unless asked for."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds a question, asked one at a time after warm-up."""

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
    """One figure of a prediction, of questions on the list and of others."""

    name: str
    median_on: float
    median_off: float
    detection: Detection


@dataclass(frozen=True)
class OffTopic:
    """How well figures of a prediction tell the list's questions (on) from others (off)."""

    data: str
    questions: int
    signals: tuple[Signal, ...]
    """All are higher for questions of the list."""
    caught: int
    """Questions off the list that the model calls off-topic …"""
    false_alarms: int
    """… and questions of the list that it does."""
    masses: tuple[float, ...]
    """Label mass of the questions off the list, in file order."""


@dataclass(frozen=True)
class Confidence:
    """How well calibrated the model is."""

    temperature: float
    calibrated: bool
    """If so and the temperature is 1, the calibration's questions said too little of it."""
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
    """What the thresholds in the model do."""

    reasons: Mapping[str, int]
    """Questions left to a person, by reason."""
    answered: int
    errors: int
    """Wrong among those answered."""

    @property
    def left(self) -> int:
        """Questions left to a person."""
        return sum(self.reasons.values())


@dataclass(frozen=True)
class Comparison:
    """This model against another on the same questions."""

    model: str
    quality: Quality
    flips: tuple[Flip, ...]
    fixed: int
    """Wrong by the other, right by this one."""
    broken: int
    """Right by the other, wrong by this one."""
    p_value: float
    """McNemar's exact test, two-sided; it takes the questions as independent."""
    abstaining: Abstaining
    """Of the other model."""


@dataclass(frozen=True)
class Baseline:
    """The baseline's quality on the same questions."""

    name: str
    train_data: str
    train_questions: int
    quality: Quality


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    model: str
    task: str
    data: str
    decode: Decode
    questions: int
    truncated: int
    """Questions that were too long and cut."""
    bootstrap: Bootstrap
    quality: Quality
    per_label: tuple[LabelScore, ...]
    confusion: Confusion
    mistakes: tuple[Answer, ...]
    """The most confident ones."""
    invalid: int | None
    """How many free answers are no label; None where that cannot happen."""
    latency: Latency
    label_mass: Mass
    confidence: Confidence
    abstaining: Abstaining
    off_topic: OffTopic | None
    comparison: Comparison | None
    baseline: Baseline | None
    answers: tuple[Answer, ...]

    def systems(self) -> list[tuple[str, Quality]]:
        """The model and what it is measured against, by name."""
        others = [(c.model, c.quality) for c in (self.comparison,) if c]
        others += [(b.name, b.quality) for b in (self.baseline,) if b]
        return [(self.model, self.quality), *others]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What to measure."""

    model: Path
    data: Path
    decode: Decode = "label"
    off_topic: Path | None = None
    """JSONL of texts that belong to no label."""
    compare: Path | None = None
    """Another GGUF with the same labels."""
    train_data: Path | None = None
    """Training questions for the baseline; without them there is none."""
    timed: int = LATENCY_QUESTIONS
    """At most so many questions are timed, spread evenly over the file; at least 1."""


def evaluate(request: Request, progress: Progress = silent) -> Evaluation:
    """Ask a model all questions of a file and measure the answers.

    All files are read before the first question is asked. Where the file names groups, the
    bootstrap draws whole groups: paraphrases are not independent of each other.

    Raises:
        DataError: a file that cannot be read, or a label that the model lacks.
        BundleError, ModelError: a GGUF that cannot be used.
    """
    task = Bundle.read(request.model).task
    examples = read_examples(request.data, task)
    strangers = read_texts(request.off_topic) if request.off_topic else []
    if request.compare and set(Bundle.read(request.compare).task.labels) != set(task.labels):
        raise DataError(f"{request.compare}: its labels are not those of {request.model}")
    train = read_examples(request.train_data, task) if request.train_data else []

    texts = [example.text for example in examples]
    truth = np.array([example.label for example in examples])
    with Classifier.open(request.model, review=False) as classifier:
        calibration = classifier.calibration
        predictions = _ask(classifier, texts, "questions", progress)
        said = _say(classifier, texts, progress) if request.decode == "free" else None
        off = _ask(classifier, strangers, "off topic", progress)
        latency = _latency(classifier, texts, request.decode, request.timed, progress)
    chosen = _chosen(task, predictions, said)
    families, unit = _families(examples)

    def measured(answers: npt.NDArray[np.int_]) -> Quality:
        return quality(truth, answers, families)

    comparison = baseline = None
    if request.compare:
        other, said_there = _other(request.compare, task, texts, request.decode, progress)
        left = _abstaining(said_there, other == truth)
        comparison = _comparison(request, task, examples, chosen, other, measured(other), left)
    if request.train_data:
        found = np.array(tfidf_predictions(train, texts))
        baseline = Baseline(BASELINE_NAME, str(request.train_data), len(train), measured(found))
    answers = _answers(task, examples, predictions, chosen, said)
    masses = np.array([prediction.label_mass for prediction in predictions], np.float64)
    wrong = [a for a in answers if a.confidence is not None and a.answer != a.truth]
    return Evaluation(
        model=str(request.model),
        task=task.name,
        data=str(request.data),
        decode=request.decode,
        questions=len(examples),
        truncated=sum(prediction.truncated for prediction in predictions),
        bootstrap=Bootstrap(unit, len(families)),
        quality=measured(chosen),
        per_label=label_scores(task, truth, chosen),
        confusion=confusion(task, truth, chosen, free=said is not None),
        mistakes=tuple(sorted(wrong, key=lambda a: -(a.confidence or 0))[:MISTAKES]),
        invalid=None if said is None else int((chosen == INVALID).sum()),
        latency=latency,
        label_mass=Mass(*(float(q) for q in np.quantile(masses, [0.5, 0.05, 0]))),
        confidence=_confidence(calibration, predictions, truth, task),
        abstaining=_abstaining(predictions, chosen == truth),
        off_topic=_off_topic(str(request.off_topic), predictions, off) if strangers else None,
        comparison=comparison,
        baseline=baseline,
        answers=answers,
    )


def off_topic_rows(off: OffTopic) -> list[tuple[str, ...]]:
    """The signals as a table, heading first."""
    rows: list[tuple[str, ...]] = [("median", "on the list", "off the list", "AUROC", "FPR95")]
    for signal in off.signals:
        medians = (f"{signal.median_on:.4f}", f"{signal.median_off:.4f}")
        found = signal.detection
        rows.append((signal.name, *medians, f"{found.auroc:.3f}", f"{found.fpr:.3f}"))
    return rows


def quality(
    truth: npt.NDArray[np.int_],
    answers: npt.NDArray[np.int_],
    families: Sequence[npt.NDArray[np.int_]],
    resamples: int = RESAMPLES,
) -> Quality:
    """Accuracy and F1 with percentile bootstrap intervals over families of questions.

    Args:
        truth: index of the right label, shape (questions,).
        answers: index of the label given, or `INVALID`; same shape.
        families: rows that belong together; each row is in one family.
        resamples: how often as many families are drawn, with replacement.
    """
    from scipy.stats import bootstrap

    values = _figures(truth, answers)
    low = high = [None, None, None]
    if len(families) > 1:

        def figures(drawn: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
            rows = np.concatenate([families[number] for number in drawn])
            return _figures(truth[rows], answers[rows])

        interval = bootstrap(
            (np.arange(len(families)),),
            figures,
            n_resamples=resamples,
            confidence_level=LEVEL,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        low, high = interval.low.tolist(), interval.high.tolist()
    return Quality(*(Estimate(float(v), a, b) for v, a, b in zip(values, low, high, strict=True)))


def _figures(truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
    """Accuracy, macro-F1 and weighted F1, as `accuracy_score` and `f1_score` give them."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    occur = np.setdiff1d(np.union1d(truth, answers), [INVALID])
    _, _, f1, support = precision_recall_fscore_support(
        truth, answers, labels=occur, zero_division=0.0
    )
    return np.array([accuracy_score(truth, answers), f1.mean(), np.average(f1, weights=support)])


def label_scores(
    task: Task, truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_]
) -> tuple[LabelScore, ...]:
    """Precision, recall, F1 and support of every label, in the task's order; 0 for 0/0."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        truth, answers, labels=range(len(task.labels)), zero_division=0.0
    )
    rows = zip(task.labels, *(column.tolist() for column in columns), strict=True)
    return tuple(LabelScore(*row) for row in rows)


def confusion(
    task: Task, truth: npt.NDArray[np.int_], answers: npt.NDArray[np.int_], *, free: bool
) -> Confusion:
    """The confusion matrix, in the task's order; `free` adds the answers that are no label."""
    from sklearn.metrics import confusion_matrix

    count = len(task.labels)
    matrix = confusion_matrix(truth, answers, labels=[*range(count), INVALID])[:count].tolist()
    return Confusion(
        tuple(task.labels),
        tuple(tuple(row[:-1]) for row in matrix),
        tuple(row[-1] for row in matrix) if free else None,
    )


def labels_said(task: Task, said: Sequence[str]) -> npt.NDArray[np.int_]:
    """The index of the label that each free answer is, exactly, by name or code; else `INVALID`."""
    numbers = {label: number for number, label in enumerate(task.labels)}
    # What the model was taught to write comes last, so that a code wins over a label like it.
    numbers |= {answer: number for number, answer in enumerate(task.answers)}
    return np.array([numbers.get(text, INVALID) for text in said])


def _ask(
    classifier: Classifier, texts: Sequence[str], step: str, progress: Progress
) -> list[Prediction]:
    found = []
    for number, prediction in enumerate(classifier.ask_many(texts), 1):
        found.append(prediction)
        progress(step, number, len(texts))
    return found


def _say(classifier: Classifier, texts: Sequence[str], progress: Progress) -> list[str]:
    limit = _free_limit(classifier.task)
    said = []
    for number, text in enumerate(texts, 1):
        said.append(classifier.say(text, limit).strip())
        progress("free answers", number, len(texts))
    return said


def _free_limit(task: Task) -> int:
    """Tokens enough for any label, a token holding at least a byte, and to see that it ended."""
    return max(16, *(len(f" {answer}".encode()) + 1 for answer in task.answers))


def _latency(
    classifier: Classifier, texts: Sequence[str], decode: Decode, most: int, progress: Progress
) -> Latency:
    limit = _free_limit(classifier.task)
    count = min(len(texts), most)
    timed = [texts[number * len(texts) // count] for number in range(count)]
    taken = []
    for number in range(-WARM_UP, len(timed)):
        text = timed[number % len(timed)]
        began = time.perf_counter()
        if decode == "free":
            classifier.say(text, limit)
        else:
            classifier.ask(text)
        if number >= 0:
            taken.append(1e3 * (time.perf_counter() - began))
            progress("latency", number + 1, len(timed))
    return Latency(float(np.median(taken)), float(np.quantile(taken, 0.95)), len(timed))


def _chosen(
    task: Task, predictions: Sequence[Prediction], said: Sequence[str] | None
) -> npt.NDArray[np.int_]:
    """The index of the label given to each question."""
    if said is not None:
        return labels_said(task, said)
    numbers = {label: number for number, label in enumerate(task.labels)}
    return np.array([numbers[prediction.label] for prediction in predictions])


def _answers(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    chosen: npt.NDArray[np.int_],
    said: Sequence[str] | None,
) -> tuple[Answer, ...]:
    labels = tuple(task.labels)
    rows = []
    for at, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        answer = None if chosen[at] == INVALID else labels[chosen[at]]
        rows.append(
            Answer(
                line=example.line,
                text=example.text,
                truth=labels[example.label],
                answer=answer,
                confidence=None if answer is None else prediction.probabilities[answer],
                label_mass=prediction.label_mass or 0.0,  # None only from an old server
                said=None if said is None else said[at],
            )
        )
    return tuple(rows)


def _families(
    examples: Sequence[Example],
) -> tuple[list[npt.NDArray[np.int_]], Literal["group", "question"]]:
    """Rows by group; a row without a group stands alone."""
    rows: dict[str | int, list[int]] = {}
    for number, example in enumerate(examples):
        rows.setdefault(number if example.group is None else example.group, []).append(number)
    grouped = any(example.group is not None for example in examples)
    return [np.array(family) for family in rows.values()], "group" if grouped else "question"


def _confidence(
    calibration: Calibration,
    predictions: Sequence[Prediction],
    truth: npt.NDArray[np.int_],
    task: Task,
) -> Confidence:
    after = label_matrix(predictions, tuple(task.labels))
    before = temper(
        log_shares(after), 1 / calibration.temperature
    )  # what the temperature made of it, undone
    return Confidence(
        calibration.temperature,
        calibration.questions > 0,
        reliability(before, truth),
        reliability(after, truth),
    )


def _abstaining(predictions: Sequence[Prediction], right: npt.NDArray[np.bool_]) -> Abstaining:
    reasons = Counter(p.reason for p in predictions if p.reason)
    answered = [ok for p, ok in zip(predictions, right, strict=True) if not p.abstained]
    return Abstaining(dict(reasons.most_common()), len(answered), answered.count(False))


def _off_topic(data: str, on: Sequence[Prediction], off: Sequence[Prediction]) -> OffTopic:
    figures: dict[str, Callable[[Prediction], float | None]] = {
        "label mass": lambda p: p.label_mass,
        "top probability": lambda p: p.confidence,
        "negative entropy": lambda p: -(p.entropy or 0.0),
        "energy": lambda p: p.energy,
        "on-topic score": lambda p: p.on_topic,
    }
    signals = []
    for name, figure in figures.items():
        here, there = ([x for p in part if (x := figure(p)) is not None] for part in (on, off))
        if here:  # an uncalibrated model has no on-topic score
            median_on, median_off = float(np.median(here)), float(np.median(there))
            signals.append(Signal(name, median_on, median_off, detection(here, there)))
    return OffTopic(
        data=data,
        questions=len(off),
        signals=tuple(signals),
        caught=sum(p.reason == "off_topic" for p in off),
        false_alarms=sum(p.reason == "off_topic" for p in on),
        masses=tuple(p.label_mass or 0.0 for p in off),
    )


def _other(
    path: Path, task: Task, texts: Sequence[str], decode: Decode, progress: Progress
) -> tuple[npt.NDArray[np.int_], list[Prediction]]:
    """The other model's answers, as indices among this task's labels, and its predictions."""
    with Classifier.open(path, review=False) as classifier:
        predictions = _ask(classifier, texts, "other model", progress)
        said = _say(classifier, texts, progress) if decode == "free" else None
    chosen = _chosen(classifier.task, predictions, said)
    order = list(task.labels)
    here = np.array([*(order.index(label) for label in classifier.task.labels), INVALID])
    return here[chosen], predictions  # INVALID is -1, the last


def _comparison(
    request: Request,
    task: Task,
    examples: Sequence[Example],
    this: npt.NDArray[np.int_],
    other: npt.NDArray[np.int_],
    measured: Quality,
    abstaining: Abstaining,
) -> Comparison:
    names = [*task.labels, None]
    flips = tuple(
        Flip(example.line, example.text, str(names[example.label]), names[there], names[here])
        for example, here, there in zip(examples, this, other, strict=True)
        if here != there
    )
    fixed = sum(flip.this == flip.truth for flip in flips)
    broken = sum(flip.other == flip.truth for flip in flips)
    p_value = mcnemar(fixed, broken)
    return Comparison(str(request.compare), measured, flips, fixed, broken, p_value, abstaining)


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p that two models err alike (McNemar 1947).

    Args:
        fixed: questions that one of them alone gets right.
        broken: questions that the other alone gets right.
    """
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
