"""`qcat calibrate`: what a bundle's confidence is worth, and when it is to ask a person."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from qcat.calibration.calibration import Calibration
from qcat.calibration.fit import Fitted
from qcat.calibration.reliability import reliability_rows
from qcat.calibration.thresholds import LEVEL
from qcat.cli.output import Bars, FloatRange, check_writable, given, json_line, table
from qcat.data.dataset import read_examples
from qcat.errors import BundleError
from qcat.files import write_whole
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import CALIBRATION_KEY, REFERENCE_KEY, section, write_sections
from qcat.opening import read_calibration
from qcat.workflows.calibrate import Asked, Judged, Question, ask_all, sections, summary

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="MODEL", type=_FILE)
@click.argument("questions", metavar="[QUESTIONS]", type=_FILE, required=False)
@click.option(
    "--max-error",
    type=FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Set the threshold above which at most this share of the answers is wrong.",
)
@click.option(
    "--level",
    type=FloatRange(0.5, 1, max_open=True),
    default=LEVEL,
    show_default=True,
    metavar="P",
    help="The confidence with which --max-error holds.",
)
@click.option(
    "--by-label",
    is_flag=True,
    help="With --max-error: thresholds of their own for labels with enough questions; it then "
    "holds for each of these labels.",
)
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    metavar="P",
    help="Set the threshold by hand; 0 answers every question, off-topic ones too. QUESTIONS only "
    "measure it.",
)
@click.option(
    "--curve",
    metavar="FILE",
    type=_FILE,
    help="Write the error of the answered questions by their share as a PNG.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    model: Path,
    questions: Path | None,
    max_error: float | None,
    level: float,
    by_label: bool,
    threshold: float | None,
    curve: Path | None,
    as_json: bool,
) -> None:
    """Calibrate MODEL, a GGUF, on labelled QUESTIONS that it was not trained on, in place.

    Without a threshold option it finds the temperature, the score under which a question is
    off-topic, what prediction sets need and the reference for `qcat drift`, as `qcat export` does
    with the validation questions. With one it sets the threshold under which a question is left
    to a person. A model on an Ollama server is as it was until it is deployed again.

    \b
    Examples:
      qcat calibrate house.gguf test.jsonl --max-error 0.02 --curve risk.png
      qcat calibrate house.gguf --threshold 0.75
      qcat calibrate house.gguf validation.jsonl
    """
    if max_error is not None and threshold is not None:
        raise click.UsageError("--max-error or --threshold, not both")
    if max_error is None and (by_label or given("level")):
        raise click.UsageError("--level and --by-label are for --max-error")
    if questions is None and (threshold is None or curve):
        raise click.UsageError("QUESTIONS are needed for all but --threshold")
    if curve:
        check_writable(curve)
        import matplotlib  # noqa: F401 (its absence is told before the questions are asked)
    bundle = Bundle.read(model)
    anew = max_error is None and threshold is None
    before = _known(bundle, anew)
    if max_error is not None and not before.questions:
        raise BundleError(
            f"{model}: is not calibrated: first give `qcat calibrate {model}` other questions, "
            "without --max-error"
        )
    if questions is None:
        assert threshold is not None
        write_sections(model, _unmeasured(bundle, before.with_threshold(threshold)))
        click.echo(f"{model}: threshold {threshold:g}, for all labels")
        return
    examples = read_examples(questions, bundle.task)
    with Bars() as bars:
        asked = ask_all(
            model,
            [Question(example.text, example.label, example.group) for example in examples],
            lambda done, total: bars.show("questions", done, total),
        )
    fitted = asked.fit() if anew else None
    if fitted:
        calibration = fitted.calibration
    elif threshold is not None:
        calibration = before.with_threshold(threshold)
    else:
        assert max_error is not None
        calibration = replace(before, threshold=0.0, label_thresholds={}, promise=None, gate=True)
        calibration = asked.promise(
            calibration, max_error=max_error, level=level, by_label=by_label
        )
    judged = asked.judged(calibration)
    picture = None
    if curve:
        from qcat.report.trust_figures import risk_coverage_png

        common = None if calibration.label_thresholds else calibration.threshold or None
        picture = risk_coverage_png(judged.curve(), common)
    # A few questions that only measure a threshold are no better reference than the one there is.
    told = sections(calibration, asked)
    small = told[REFERENCE_KEY]["questions"] < _reference(bundle).get("questions", 0)
    write_sections(model, _unmeasured(bundle, calibration) if small and not anew else told)
    if curve and picture:
        write_whole(curve, picture)
    if anew and (before.threshold or before.promise):
        click.echo(
            "qcat: warning: the model's threshold was of its old confidence and is gone: "
            "set it again with --max-error or --threshold",
            err=True,
        )
    found = _Found(asked, judged, calibration, fitted)
    click.echo(json_line(found.to_dict()) if as_json else "\n".join(found.lines()))


def _known(bundle: Bundle, anew: bool) -> Calibration:
    """The model's calibration; one that cannot be read is no hindrance to a new one."""
    try:
        return read_calibration(bundle)
    except BundleError:
        if not anew:
            raise
        return Calibration()


def _reference(bundle: Bundle) -> dict[str, Any]:
    return section(bundle.header, REFERENCE_KEY, bundle.path)


def _unmeasured(bundle: Bundle, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """As `sections`, with the reference that there is: what it leaves to a person is not known."""
    told = {CALIBRATION_KEY: calibration.to_dict()}
    if reference := _reference(bundle):
        told[REFERENCE_KEY] = {**reference, "rule": None}
    return told


@dataclass(frozen=True)
class _Found:
    """What is told at the end."""

    asked: Asked
    judged: Judged
    calibration: Calibration
    fitted: Fitted | None

    def to_dict(self) -> dict[str, Any]:
        answered = self.judged.answered
        known = self.calibration.to_dict()
        known.pop("conformal", None)  # a thousand figures that tell a reader nothing
        found = {
            "calibration": known,
            "questions": len(answered),
            "answered": int(answered.sum()),
            "errors": int((~self.judged.right[answered]).sum()),
            "off_topic": int((~self.judged.answerable).sum()),
        }
        if self.fitted:
            found["reliability"] = summary(self.fitted, self.asked, None)
        return found

    def lines(self) -> Iterable[str]:
        known = self.calibration
        if self.fitted:
            low, high = known.temperature_interval
            if self.fitted.refused:
                yield f"not scaled: {self.fitted.refused}"
            else:
                yield (
                    f"temperature {known.temperature:.2f} (95 %: {low:.2f}–{high:.2f}) from "
                    f"{known.questions} questions"
                )
            before = self.asked.reliability()
            yield from table(reliability_rows(self.asked.reliability(known.temperature), before))
        answered = self.judged.answered
        errors = int((~self.judged.right[answered]).sum())
        if known.label_thresholds:
            yield from table(
                [
                    ("answer", "threshold"),
                    *((n, f"{value:.4f}") for n, value in known.label_thresholds.items()),
                    ("(the others)", f"{known.threshold:.4f}"),
                ]
            )
        elif known.threshold:
            yield f"threshold {known.threshold:.4f}"
        count = len(answered)
        yield (
            f"answered: {answered.sum()} of {count} questions ({answered.mean():.0%}), "
            f"{errors} of them wrong ({errors / max(1, answered.sum()):.1%})"
        )
        off = int((~self.judged.answerable).sum())
        yield f"called off-topic: {off} ({off / count:.0%})"
        if known.promise:
            basis = f"{known.promise.questions} questions"
            if known.promise.questions < count:
                basis += ", one of each group,"
            yield (
                f"promise: at most {known.promise.max_error:.1%} of the answers are wrong, with "
                f"{known.promise.level:.0%} confidence, for questions like these (an exact "
                f"binomial bound from {basis} taken as independent)"
            )
