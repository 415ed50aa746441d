"""`qcat calibrate`: what a model's confidence is worth, and when it abstains."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from qcat.calibration.calibration import Calibration
from qcat.calibration.reliability import reliability_rows
from qcat.calibration.thresholds import LEVEL
from qcat.cli.output import Bars, FloatRange, given, json_line, table
from qcat.files import check_writable
from qcat.workflows.calibrate import summary
from qcat.workflows.calibrate_model import Measured, calibrate

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
    "--confidence",
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
    "--plot",
    metavar="FILE",
    type=_FILE,
    help="Plot the error of the answered questions by their share as PNG.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    model: Path,
    questions: Path | None,
    max_error: float | None,
    confidence: float,
    by_label: bool,
    threshold: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Calibrate MODEL, a GGUF, on labelled QUESTIONS that it was not trained on, in place.

    Without a threshold option it finds the temperature, the score below which a question is
    off-topic, what prediction sets need and the reference for `qcat drift`, as `qcat export` does
    with the validation questions. With one it sets the threshold below which the model abstains. A
    model on an Ollama server is as it was until it is deployed again.

    \b
    Examples:
      qcat calibrate house.gguf test.jsonl --max-error 0.02 --plot risk.png
      qcat calibrate house.gguf --threshold 0.75
      qcat calibrate house.gguf validation.jsonl
    """
    if max_error is not None and threshold is not None:
        raise click.UsageError("--max-error or --threshold, not both")
    if max_error is None and (by_label or given("confidence")):
        raise click.UsageError("--confidence and --by-label are for --max-error")
    if questions is None and (threshold is None or plot):
        raise click.UsageError("QUESTIONS are needed for all but --threshold")
    if plot:
        check_writable(plot)
    with Bars() as bars:
        done = calibrate(
            model,
            questions,
            max_error=max_error,
            confidence=confidence,
            by_label=by_label,
            threshold=threshold,
            plot=plot,
            progress=bars.show,
        )
    if done.dropped_threshold:
        click.echo(
            "qcat: warning: the model's threshold was of its old confidence and is gone: "
            "set it again with --max-error or --threshold",
            err=True,
        )
    if done.measured is None:
        click.echo(f"{model}: threshold {threshold:g}, for all labels")
    elif as_json:
        click.echo(json_line(_to_dict(done.calibration, done.measured)))
    else:
        click.echo("\n".join(_lines(done.calibration, done.measured)))


def _to_dict(calibration: Calibration, measured: Measured) -> dict[str, Any]:
    answered = measured.judged.answered
    known = calibration.to_dict()
    known.pop("conformal", None)  # a thousand figures that tell a reader nothing
    found = {
        "calibration": known,
        "questions": len(answered),
        "answered": int(answered.sum()),
        "errors": int((~measured.judged.right[answered]).sum()),
        "off_topic": int((~measured.judged.answerable).sum()),
    }
    if measured.fitted:
        found["reliability"] = summary(measured.fitted, measured.asked, None)
    return found


def _lines(known: Calibration, measured: Measured) -> Iterable[str]:
    if measured.fitted:
        low, high = known.temperature_interval
        if measured.fitted.refused:
            yield f"not scaled: {measured.fitted.refused}"
        else:
            yield (
                f"temperature {known.temperature:.2f} (95 %: {low:.2f}–{high:.2f}) from "
                f"{known.questions} questions"
            )
        before = measured.asked.reliability()
        yield from table(reliability_rows(measured.asked.reliability(known.temperature), before))
    answered = measured.judged.answered
    errors = int((~measured.judged.right[answered]).sum())
    if known.label_thresholds:
        yield from table(
            [
                ("answer", "threshold"),
                *((n, f"{value:.4f}") for n, value in known.label_thresholds.items()),
                ("(the others)", f"{known.threshold or 0:.4f}"),
            ]
        )
    elif known.threshold is not None:
        yield f"threshold {known.threshold:.4f}"
    count = len(answered)
    yield (
        f"answered: {answered.sum()} of {count} questions ({answered.mean():.0%}), "
        f"{errors} of them wrong ({errors / max(1, answered.sum()):.1%})"
    )
    off = int((~measured.judged.answerable).sum())
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
