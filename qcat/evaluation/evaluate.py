"""Measure a bundle on labelled questions: quality, mistakes, latency, confidence, comparisons.

The model is asked through `Classifier`, as in normal use; the metrics are scikit-learn's.
Independent of the command line, output files and plots.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcat.calibration.calibration import Calibration
from qcat.calibration.fit import label_matrix
from qcat.calibration.reliability import detection, reliability
from qcat.classifier import Classifier
from qcat.data.dataset import Example, read_examples, read_texts
from qcat.encoding.scoring import log_shares, temper
from qcat.errors import DataError, ServerError
from qcat.evaluation.baseline import EMBEDDER, NAMES, Kind, baseline_predictions
from qcat.evaluation.metrics import INVALID, confusion, label_scores, mcnemar, quality
from qcat.evaluation.results import (
    WARM_UP,
    Abstaining,
    Answer,
    Baseline,
    Bootstrap,
    Comparison,
    Confidence,
    Decode,
    Evaluation,
    Flip,
    Latency,
    Mass,
    OffTopic,
    Quality,
    Signal,
)
from qcat.opening import read_model
from qcat.prediction import Prediction
from qcat.progress import Progress, silent
from qcat.task import Task

LATENCY_QUESTIONS = 100
"""Number of questions timed by default, or all if there are fewer."""
MISTAKES = 10


@dataclass(frozen=True)
class Request:
    """What to measure."""

    model: str
    """A GGUF, the folder of a bundle, or `ollama:NAME`."""
    data: Path
    decode: Decode = "label"
    off_topic: Path | None = None
    """JSONL of texts that belong to no label."""
    compare: str | None = None
    """Another model with the same labels, given in the same way."""
    baselines: tuple[Kind, ...] = ()
    """Which baselines learn from the training questions and answer the same questions."""
    train_data: Path | None = None
    """Their training questions."""
    embedder: str = EMBEDDER
    """Folder or hub name of the embedding model of those that need one."""
    timed: int = LATENCY_QUESTIONS
    """Largest number of questions to time, spread evenly over the file; at least 1."""


def evaluate(request: Request, progress: Progress = silent) -> Evaluation:
    """Ask a model all questions of a file and measure the answers.

    All files are read before the first question is asked. If the file names groups, the bootstrap
    resamples whole groups, because paraphrases are not independent of each other.

    Raises:
        DataError: a file cannot be read, or the model lacks a label.
        BundleError, ModelError: a GGUF cannot be used.
        ServerError: a server does not answer, or returns no probabilities.
    """
    task = read_model(request.model).task
    examples = read_examples(request.data, task)
    texts = [example.text for example in examples]
    strangers = read_texts(request.off_topic) if request.off_topic else []
    if request.compare and set(read_model(request.compare).task.labels) != set(task.labels):
        raise DataError(f"{request.compare}: its labels are not those of {request.model}")
    beside = _baselines(request, task, texts)
    truth = np.array([example.label for example in examples])
    with Classifier.open(request.model) as classifier:
        calibration = classifier.calibration
        predictions = _ask(classifier, texts, "questions", progress)
        said = _say(classifier, texts, progress) if request.decode == "free" else None
        off = _ask(classifier, strangers, "off topic", progress)
        latency = _latency(classifier, texts, request.decode, request.timed, progress)
    chosen = _chosen(task, predictions, said)
    families, unit = _families(examples)

    def measured(answers: npt.NDArray[np.int_]) -> Quality:
        return quality(truth, answers, families)

    comparison = None
    if request.compare:
        other, said_there = _other(request.compare, task, texts, request.decode, progress)
        left = _abstaining(said_there, other == truth)
        comparison = _comparison(request, task, examples, chosen, other, measured(other), left)
    answers = _answers(task, examples, predictions, chosen, said)
    masses = np.array([prediction.label_mass for prediction in predictions], np.float64)
    wrong = [a for a in answers if a.confidence is not None and a.answer != a.truth]
    return Evaluation(
        model=request.model,
        task=task.name,
        data=str(request.data),
        decode=request.decode,
        questions=len(examples),
        truncated=sum(prediction.truncated for prediction in predictions),
        inexact=sum(not prediction.exact for prediction in predictions),
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
        baselines=tuple(
            Baseline(NAMES[kind], str(request.train_data), count, measured(found))
            for kind, count, found in beside
        ),
        answers=answers,
    )


def labels_said(task: Task, said: Sequence[str]) -> npt.NDArray[np.int_]:
    """Index of the label that each free answer exactly matches (name or code), or `INVALID`."""
    numbers = {label: number for number, label in enumerate(task.labels)}
    # The trained form comes last, so that a code takes precedence over an equal label.
    numbers |= {answer: number for number, answer in enumerate(task.answers)}
    return np.array([numbers.get(text, INVALID) for text in said])


def _baselines(
    request: Request, task: Task, texts: Sequence[str]
) -> list[tuple[Kind, int, npt.NDArray[np.int_]]]:
    """Each baseline, the number of its training questions, and its answers as label indices."""
    if not (request.baselines and request.train_data):
        return []
    train = read_examples(request.train_data, task)
    found = baseline_predictions(request.baselines, train, texts, request.embedder)
    return [(kind, len(train), np.array(said)) for kind, said in found.items()]


def _ask(
    classifier: Classifier, texts: Sequence[str], step: str, progress: Progress
) -> list[Prediction]:
    found = []
    for number, prediction in enumerate(classifier.ask_many(texts), 1):
        if prediction.confidence is None:
            raise ServerError(
                f"{classifier.name}: this Ollama gives no probabilities: 0.12.11 or later does"
            )
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
    """Enough tokens for any label (a token holds at least one byte), and to see that it ended."""
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
    )  # with the effect of the temperature undone
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
    name: str, task: Task, texts: Sequence[str], decode: Decode, progress: Progress
) -> tuple[npt.NDArray[np.int_], list[Prediction]]:
    """The other model's answers, as indices of this task's labels, and its predictions."""
    with Classifier.open(name) as classifier:
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
    return Comparison(request.compare or "", measured, flips, fixed, broken, p_value, abstaining)
