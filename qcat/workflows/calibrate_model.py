"""Calibrating a model in place, or setting the threshold below which it abstains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcat.calibration.calibration import Calibration
from qcat.calibration.fit import Fitted
from qcat.calibration.thresholds import LEVEL
from qcat.data.dataset import read_examples
from qcat.errors import ArgumentError, BundleError
from qcat.files import write_whole
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import CALIBRATION_KEY, REFERENCE_KEY, section, write_sections
from qcat.opening import read_calibration
from qcat.progress import Progress, silent
from qcat.shell import quoted
from qcat.workflows.calibrate import Asked, Judged, ask_all, sections


@dataclass(frozen=True)
class Measured:
    """Labelled questions, and the calibrated model's results on them."""

    asked: Asked
    judged: Judged
    fitted: Fitted | None
    """None where only a threshold was set."""


@dataclass(frozen=True)
class Calibrated:
    """What the model now contains, and what it was computed from."""

    calibration: Calibration
    measured: Measured | None
    """None where a threshold was set without questions."""
    dropped_threshold: bool = False
    """Whether a threshold was in the model that belonged to its old confidence."""


def calibrate(
    model: Path,
    questions: Path | None = None,
    *,
    max_error: float | None = None,
    confidence: float = LEVEL,
    by_label: bool = False,
    threshold: float | None = None,
    plot: Path | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Calibrate a model on questions that it was not trained on, or set its threshold, in place.

    Args:
        model: the GGUF, or the folder of a bundle.
        questions: labelled, in a file; not needed to set a threshold by hand.
        max_error: set the threshold above which at most this share of the answers is wrong.
        confidence: the confidence with which that holds.
        by_label: separate thresholds for labels with enough questions.
        threshold: set this threshold by hand.
        plot: PNG to write: the error of the answered questions against their share.
        progress: called as the questions are asked.

    Raises:
        ArgumentError: options contradict each other.
        BundleError, DataError: the model or the questions cannot be used, or the promise cannot be
            kept; the model is then unchanged.
    """
    if max_error is not None and threshold is not None:
        raise ArgumentError("a largest error or a threshold, not both")
    if questions is None and threshold is None:
        raise ArgumentError("questions are needed for all but a threshold")
    if plot:
        import matplotlib  # noqa: F401 (its absence is reported before the questions are asked)
    bundle = Bundle.read(model)
    anew = max_error is None and threshold is None
    before = _calibration_before(bundle, anew)
    if max_error is not None and not before.questions:
        raise BundleError(
            f"{model}: is not calibrated: first give `qcat calibrate {quoted(model)}` other "
            "questions, without --max-error"
        )
    if questions is None:
        calibration = before.with_threshold(threshold or 0.0)
        write_sections(bundle.path, _unmeasured(bundle, calibration))
        return Calibrated(calibration, None)
    asked = ask_all(
        bundle.path,
        read_examples(questions, bundle.task),
        lambda done, total: progress("questions", done, total),
    )
    fitted = asked.fit() if anew else None
    if fitted:
        calibration = fitted.calibration
    elif threshold is not None:
        calibration = before.with_threshold(threshold)
    else:
        assert max_error is not None
        calibration = replace(before, threshold=None, label_thresholds={}, promise=None, gate=True)
        calibration = asked.promise(
            calibration, max_error=max_error, level=confidence, by_label=by_label
        )
    judged = asked.judged(calibration)
    picture = _picture(judged, calibration) if plot else None
    # A few questions that only measure a threshold are no better than the existing reference.
    found = sections(calibration, asked)
    few = found[REFERENCE_KEY]["questions"] < _reference(bundle).get("questions", 0)
    write_sections(bundle.path, _unmeasured(bundle, calibration) if few and not anew else found)
    if plot and picture:
        write_whole(plot, picture)
    dropped = anew and (before.threshold is not None or before.promise is not None)
    return Calibrated(calibration, Measured(asked, judged, fitted), dropped)


def _picture(judged: Judged, calibration: Calibration) -> bytes:
    from qcat.report.confidence_figures import risk_coverage_png

    common = None if calibration.label_thresholds else calibration.threshold
    return risk_coverage_png(judged.curve(), common)


def _calibration_before(bundle: Bundle, anew: bool) -> Calibration:
    """The model's calibration; an unreadable one does not prevent a new one."""
    try:
        return read_calibration(bundle)
    except BundleError:
        if not anew:
            raise
        return Calibration()


def _reference(bundle: Bundle) -> dict[str, Any]:
    return section(bundle.header, REFERENCE_KEY, bundle.path)


def _unmeasured(bundle: Bundle, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Like `sections`, but with the existing reference, without what the model abstains on."""
    kept = {CALIBRATION_KEY: calibration.to_dict()}
    if reference := _reference(bundle):
        kept[REFERENCE_KEY] = {**reference, "rule": None}
    return kept
