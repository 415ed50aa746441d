"""`qcat eval`: a bundle measured on labelled questions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from qcat.cli.eval_report import evaluation_text
from qcat.cli.output import Bars
from qcat.errors import DataError
from qcat.evaluation.results import Evaluation
from qcat.files import check_writable, write_whole
from qcat.workflows.evaluate import evaluate

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON document with all figures.")
@click.option("--html", metavar="FILE", type=_FILE, help="Write a self-contained web page.")
@click.option(
    "--plot-reliability",
    metavar="FILE",
    type=_FILE,
    help="Plot the reliability diagram as PNG.",
)
@click.option(
    "--plot-confusion", metavar="FILE", type=_FILE, help="Plot the confusion matrix as PNG."
)
@click.option(
    "--decode",
    type=click.Choice(["label", "free"]),
    default="label",
    help="`free`: no constraint; what is no label counts as wrong.",
)
@click.option(
    "--off-topic",
    metavar="FILE",
    type=_FILE,
    help="Questions that belong to no label, a file with `text`: can the model tell?",
)
@click.option("--compare", metavar="MODEL", help="Another model: which questions change label?")
@click.option(
    "--baseline", type=click.Choice(["tfidf"]), help="Train TF-IDF with a linear SVM and compare."
)
@click.option(
    "--train-data",
    metavar="FILE",
    type=_FILE,
    help="Its training questions.  [default: train.jsonl beside QUESTIONS]",
)
def command(
    model: str,
    questions: Path,
    as_json: bool,
    html: Path | None,
    plot_reliability: Path | None,
    plot_confusion: Path | None,
    decode: Any,
    off_topic: Path | None,
    compare: str | None,
    baseline: str | None,
    train_data: Path | None,
) -> None:
    """Measure MODEL on labelled QUESTIONS: JSONL, CSV or Parquet with text and label.

    MODEL is a GGUF, the folder of a bundle, or ollama:NAME.

    \b
    Examples:
      qcat eval house.gguf test.jsonl
      qcat eval house.gguf test.jsonl --baseline tfidf --train-data train.jsonl --html report.html
      qcat eval new.gguf test.jsonl --compare old.gguf
    """
    if train_data and not baseline:
        raise click.UsageError("--train-data is for --baseline")
    pictures = [path for path in (html, plot_reliability, plot_confusion) if path]
    for path in pictures:
        check_writable(path)
    for library in ["sklearn", *["matplotlib"] * bool(pictures), *["jinja2"] * bool(html)]:
        importlib.import_module(library)  # its absence is reported before the questions are asked
    with Bars() as bars:
        found = evaluate(
            model,
            questions,
            decode=decode,
            off_topic=off_topic,
            compare=compare,
            train_data=_training(train_data, questions) if baseline else None,
            progress=bars.show,
        )
    _write_reports(found, html, plot_reliability, plot_confusion)
    text = json.dumps(found.to_dict(), ensure_ascii=False) if as_json else evaluation_text(found)
    click.echo(text.encode("utf-8", "replace").decode())


def _write_reports(
    found: Evaluation, html: Path | None, reliability: Path | None, confusion: Path | None
) -> None:
    """Make all of them before the first is written."""
    reports = []
    if confusion:
        from qcat.report.figures import confusion_png

        reports.append((confusion, confusion_png(found.confusion)))
    if reliability:
        from qcat.report.confidence_figures import reliability_png

        confidence = found.confidence
        reports.append((reliability, reliability_png(confidence.after, confidence.before)))
    if html:
        from qcat.report.html_report import html_report

        reports.append((html, html_report(found).encode()))
    for path, data in reports:
        write_whole(path, data)


def _training(given: Path | None, questions: Path) -> Path:
    path = given or questions.with_name("train.jsonl")
    if given or path.is_file():
        return path
    raise DataError(
        f"{path}: no such file: name the baseline's training questions with --train-data"
    )
