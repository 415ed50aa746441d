"""Drift: compares a log of answers with the reference of the model that gave them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from qcat.base.ollama_store import PREFIX
from qcat.classifier import Classifier
from qcat.data.dataset import read_examples
from qcat.errors import ArgumentError, BundleError, DataError
from qcat.files import check_writable, write_whole
from qcat.gguf.bundle import Bundle, identity
from qcat.gguf.sections import REFERENCE_KEY, section
from qcat.monitor.drift import FEWEST, LEVEL, Accuracy, Drift, Reference, compare, history
from qcat.monitor.log import LogWindow, read_log, scan_log
from qcat.progress import Progress, silent
from qcat.shell import quoted

WINDOW = 500
"""Number of answers tested by default, from the end of the log."""
PLOTTED = 200
"""Number of windows in a plot, from the end of the log."""


@dataclass(frozen=True)
class LogDrift:
    """The findings of `drift` in a log."""

    model: str
    """Identity of the model whose answers were tested, as stored in the log."""
    drift: Drift
    window: LogWindow
    plotted: bool
    """Whether the plot was written: a log with fewer than `FEWEST` answers cannot be plotted."""


def drift(
    log: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    reference: str | os.PathLike[str] | None = None,
    window: int | None = None,
    since: datetime | None = None,
    data: str | os.PathLike[str] | None = None,
    level: float = LEVEL,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> LogDrift:
    """Compare the answers in a log with those of a reference period.

    Args:
        log: file that `qcat ask --log` or a `Recorder` wrote.
        model: the GGUF that answered; its stored reference is used.
        reference: a log of a reference period, used instead of `model`.
        window: test this many of the last answers, `WINDOW` by default.
        since: test all answers from this time on, instead of `window`.
        data: file of labelled questions to ask the model now; the accuracy is compared too.
        level: the most windows without drift that may be called drifted, as a share.
        plot: path of a PNG to write, which shows the last `PLOTTED` windows.
        progress: called as the work goes on.

    Raises:
        ArgumentError: arguments contradict each other.
        DataError: a file cannot be read, or no answer in the log is from the model.
        BundleError, ModelError: the GGUF cannot be used, or contains no reference.
    """
    log = Path(log)
    if (model is None) == (reference is None):
        raise ArgumentError("either a model or the log of a reference period is needed")
    if reference is not None and data is not None:
        raise ArgumentError("data are asked of a model, not of a reference log")
    if since and window:
        raise ArgumentError("either a window or a time since, not both")
    if plot:
        check_writable(Path(plot))
    for library in ("scipy", *(["matplotlib"] if plot else [])):
        importlib.import_module(library)  # its absence is reported before the work
    if reference is not None:
        name, expected = _reference_log(Path(reference))
    else:
        assert model is not None  # one of the two is given
        name, expected = _model_reference(os.fspath(model))
    size = window or WINDOW
    found = read_log(log, model=name, since=since, last=None if since else size)
    if not found.records and not since and found.others + found.skipped:
        raise DataError(
            f"{log}: no answer of {name}, but {found.others} of other models and "
            f"{found.skipped} lines that are no answer: name "
            + ("a quiet log of the same model" if reference else "the model with -m")
        )
    accuracy = None
    if model is not None and data is not None:
        accuracy = _accuracy(os.fspath(model), Path(data), expected, progress)
    judged = compare(expected, Reference.of_log(found.records), level=level, accuracy=accuracy)
    plotted = False
    if plot:
        size = max(len(found.records), FEWEST) if since else size
        plotted = _plot(Path(plot), log, name, expected, size, level)
    return LogDrift(name, judged, found, plotted)


def _model_reference(model: str) -> tuple[str, Reference]:
    """The identity of a GGUF and the reference stored in it."""
    if model.startswith(PREFIX):
        raise ArgumentError(
            f"{model} is on a server, whose probabilities may be bounds: name its GGUF with -m, or "
            "a log of a reference period with --reference"
        )
    bundle = Bundle.read(model)
    data = section(bundle.header, REFERENCE_KEY, bundle.path)
    if not data:
        raise BundleError(
            f"{model}: carries no reference: run `qcat calibrate {quoted(model)} "
            "validation.jsonl`, or name a log of a reference period with --reference"
        )
    try:
        return identity(bundle.header.metadata), Reference.from_dict(data)
    except DataError as error:
        raise BundleError(
            f"{model}: metadata {REFERENCE_KEY}: {error}: run `qcat calibrate {quoted(model)} "
            "validation.jsonl`"
        ) from None


def _reference_log(path: Path) -> tuple[str, Reference]:
    """The model of the last record in a log, and that model's answers."""
    records = read_log(path).records
    if not records:
        raise DataError(f"{path}: no answers in it: name a log written by `qcat ask --log`")
    name = records[-1].model
    return name, Reference.of_log([record for record in records if record.model == name])


def _accuracy(model: str, path: Path, reference: Reference, progress: Progress) -> Accuracy:
    """Measure a model's accuracy on labelled questions."""
    if reference.right is None:
        raise BundleError(
            f"{model}: its reference has no accuracy to compare with: run `qcat calibrate "
            f"{quoted(model)} validation.jsonl`"
        )
    examples = read_examples(path, Bundle.read(model).task)
    right = 0
    with Classifier.open(model) as classifier:
        predictions = classifier.ask_many(example.text for example in examples)
        for number, (predicted, example) in enumerate(zip(predictions, examples, strict=True), 1):
            right += predicted.label == classifier.labels[example.label]
            progress("questions", number, len(examples))
    return Accuracy(right, len(examples))


def _plot(path: Path, log: Path, model: str, reference: Reference, size: int, level: float) -> bool:
    from qcat.report.figures import drift_png

    records = (record for record in scan_log(log) if record and record.model == model)
    points = history(reference, records, size, last=PLOTTED, level=level)
    if points:
        write_whole(path, drift_png(points))
    return bool(points)
