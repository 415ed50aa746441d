"""`qcat eval`: a bundle measured on labelled questions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from qcat.cli.eval_report import evaluation_text
from qcat.cli.output import Bars, given
from qcat.errors import DataError
from qcat.evaluation.baseline import EMBEDDER, NAMES, Kind
from qcat.evaluation.results import Evaluation
from qcat.files import check_writable, write_whole
from qcat.workflows.evaluate import evaluate

_FILE = click.Path(path_type=Path)


def _kinds(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[Kind, ...]:
    """Names with commas between, each once, in the order given."""
    names = dict.fromkeys(part.strip() for part in value.split(",")) if value is not None else {}
    for name in names:
        if name not in NAMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(NAMES)}")
    return tuple(kind for name in names for kind in NAMES if kind == name)


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
    "--baseline",
    "baselines",
    metavar="KIND,…",
    callback=_kinds,
    help="Train simple classifiers and compare: tfidf (with a linear SVM), embeddings (of "
    "sentences, with logistic regression), knn (their nearest neighbours).",
)
@click.option(
    "--train-data",
    metavar="FILE",
    type=_FILE,
    help="Their training questions.  [default: train.jsonl beside QUESTIONS]",
)
@click.option(
    "--embedder",
    metavar="MODEL",
    default=EMBEDDER,
    show_default=True,
    help="Embedding model: a folder or a hub name.",
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
    baselines: tuple[Kind, ...],
    train_data: Path | None,
    embedder: str,
) -> None:
    """Measure MODEL on labelled QUESTIONS: JSONL, CSV or Parquet with text and label.

    MODEL is a GGUF, the folder of a bundle, or ollama:NAME.

    \b
    Examples:
      qcat eval house.gguf test.jsonl
      qcat eval house.gguf test.jsonl --baseline tfidf --train-data train.jsonl --html report.html
      qcat eval new.gguf test.jsonl --compare old.gguf
    """
    if train_data and not baselines:
        raise click.UsageError("--train-data is for --baseline")
    embedded = bool({"embeddings", "knn"} & {*baselines})
    if given("embedder") and not embedded:
        raise click.UsageError("--embedder is for --baseline embeddings and knn")
    pictures = [path for path in (html, plot_reliability, plot_confusion) if path]
    for path in pictures:
        check_writable(path)
    needed = {"sklearn": True, "matplotlib": pictures, "jinja2": html}
    needed["sentence_transformers"] = embedded
    for library in filter(needed.get, needed):
        importlib.import_module(library)  # its absence is reported before the questions are asked
    with Bars() as bars:
        found = evaluate(
            model,
            questions,
            decode=decode,
            off_topic=off_topic,
            compare=compare,
            baselines=baselines,
            train_data=_training(train_data, questions) if baselines else None,
            embedder=embedder,
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
