"""`qcat eval`: a bundle measured on labelled questions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from qcat.calibration.reliability import UNSCALED, reliability_rows
from qcat.cli.output import ROWS, Bars, check_writable, more, shown, table
from qcat.errors import DataError
from qcat.evaluation.evaluate import Request, evaluate
from qcat.evaluation.results import Comparison, Confusion, Evaluation, OffTopic, off_topic_rows
from qcat.files import write_whole

_FILE = click.Path(path_type=Path)
_MATRIX_LABELS = 10  # up to which the terminal shows the whole confusion matrix


@click.command()
@click.argument("model", metavar="MODEL", type=_FILE)
@click.argument("questions", metavar="QUESTIONS", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON document with all figures.")
@click.option("--html", metavar="FILE", type=_FILE, help="Write a self-contained web page.")
@click.option(
    "--reliability", metavar="FILE", type=_FILE, help="Write the reliability diagram as a PNG."
)
@click.option("--confusion", metavar="FILE", type=_FILE, help="Write the matrix as a PNG.")
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
    help="Questions that belong to no label, JSONL with `text`: can the model tell?",
)
@click.option(
    "--compare", metavar="MODEL", type=_FILE, help="Another GGUF: which questions change label?"
)
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
    model: Path,
    questions: Path,
    as_json: bool,
    html: Path | None,
    reliability: Path | None,
    confusion: Path | None,
    decode: Any,
    off_topic: Path | None,
    compare: Path | None,
    baseline: str | None,
    train_data: Path | None,
) -> None:
    """Measure MODEL, a GGUF, on labelled QUESTIONS: JSONL, CSV or Parquet with text and label.

    \b
    Examples:
      qcat eval house.gguf test.jsonl
      qcat eval house.gguf test.jsonl --baseline tfidf --train-data train.jsonl --html report.html
      qcat eval new.gguf test.jsonl --compare old.gguf
    """
    if train_data and not baseline:
        raise click.UsageError("--train-data is for --baseline")
    pictures = [path for path in (html, reliability, confusion) if path]
    for path in pictures:
        check_writable(path)
    for library in ["sklearn", *["matplotlib"] * bool(pictures), *["jinja2"] * bool(html)]:
        importlib.import_module(library)  # its absence is reported before the questions are asked
    request = Request(
        model=model,
        data=questions,
        decode=decode,
        off_topic=off_topic,
        compare=compare,
        train_data=_training(train_data, questions) if baseline else None,
    )
    with Bars() as bars:
        found = evaluate(request, bars.show)
    pages = []
    if confusion:
        from qcat.report.figures import confusion_png

        pages.append((confusion, confusion_png(found.confusion)))
    if reliability:
        from qcat.report.confidence_figures import reliability_png

        pages.append(
            (reliability, reliability_png(found.confidence.after, found.confidence.before))
        )
    if html:
        from qcat.report.html_report import html_report

        pages.append((html, html_report(found).encode()))
    for path, data in pages:
        write_whole(path, data)
    text = json.dumps(found.to_dict(), ensure_ascii=False) if as_json else _report(found)
    click.echo(text.encode("utf-8", "replace").decode())


def _training(given: Path | None, questions: Path) -> Path:
    path = given or questions.with_name("train.jsonl")
    if given or path.is_file():
        return path
    raise DataError(
        f"{path}: no such file: name the baseline's training questions with --train-data"
    )


def _report(found: Evaluation) -> str:
    """What the terminal shows."""
    return "\n\n".join("\n".join(block) for block in _blocks(found))


def _blocks(found: Evaluation) -> Iterable[Iterable[str]]:
    groups = f" in {found.bootstrap.units} groups" if found.bootstrap.unit == "group" else ""
    head = [f"{found.questions} questions{groups}, {len(found.per_label)} labels"]
    if found.truncated:
        head.append(f"{found.truncated} questions were too long and were cut")
    yield head
    rows: list[tuple[str, ...]] = [("", "accuracy", "macro-F1", "weighted F1")]
    for name, quality in found.systems():
        figures = (quality.accuracy, quality.macro_f1, quality.weighted_f1)
        rows.append((name, *map(str, figures)))
    yield [*table(rows), str(found.bootstrap)]
    if found.invalid is not None:
        yield _invalid(found)
    yield table(
        [
            ("label", "precision", "recall", "F1", "support"),
            *(
                (r.label, f"{r.precision:.3f}", f"{r.recall:.3f}", f"{r.f1:.3f}", str(r.support))
                for r in found.per_label
            ),
        ]
    )
    yield _confusion(found.confusion)
    if found.mistakes:
        yield [
            "most confident mistakes",
            *table(
                [
                    ("", "right", "answer", "question"),
                    *(
                        (f"{m.confidence:.3f}", m.truth, str(m.answer), shown(m.text))
                        for m in found.mistakes
                    ),
                ]
            ),
        ]
    if found.comparison:
        yield _comparison(found.comparison)
    if found.off_topic:
        yield _off_topic(found.off_topic)
    yield _confidence(found)
    mass, latency = found.label_mass, found.latency
    yield [
        f"label mass: median {mass.median:.4f}, 5th percentile {mass.p5:.4f}, "
        f"least {mass.least:.4f}",
        f"latency: median {latency.median_ms:.1f} ms, 95th percentile {latency.p95_ms:.1f} ms "
        f"({latency.questions} questions, one at a time, after {latency.warm_up} to warm up)",
    ]


def _invalid(found: Evaluation) -> Iterable[str]:
    yield f"{found.invalid} of {found.questions} free answers are no label: counted as wrong"
    rows = [(a.truth, repr(a.said), shown(a.text)) for a in found.answers if a.answer is None]
    if rows:
        yield from table([("right", "said", "question"), *rows[:ROWS]])
        yield from more(rows)


def _confusion(confusion: Confusion) -> Iterable[str]:
    used = confusion.used()
    if len(used.labels) <= _MATRIX_LABELS:
        yield "confusion matrix: right labels by row, answers by column"
        columns = [str(number) for number in range(1, len(used.labels) + 1)]
        rows = [("", *columns)]
        for number, label, counts in zip(columns, used.labels, used.matrix, strict=True):
            rows.append((f"{number} {label}", *(str(count) if count else "." for count in counts)))
        yield from table(rows)
    elif pairs := confusion.pairs():
        yield "most confused"
        yield from table([(str(n), f"{truth} → {answer}") for truth, answer, n in pairs[:ROWS]])
        yield from more(pairs, "pairs")


def _comparison(compared: Comparison) -> Iterable[str]:
    yield (
        f"against {compared.model}: {len(compared.flips)} labels changed, {compared.fixed} fixed "
        f"(wrong there, right here), {compared.broken} broken"
    )
    yield f"McNemar's exact test: p = {compared.p_value:.3g}, taking the questions as independent"
    if compared.flips:
        rows = [
            (flip.truth, flip.other or "(no label)", flip.this or "(no label)", shown(flip.text))
            for flip in compared.flips
        ]
        yield from table([("right", "there", "here", "question"), *rows[:ROWS]])
        yield from more(rows)


def _off_topic(off: OffTopic) -> Iterable[str]:
    yield f"{off.questions} questions off the list, {off.data}"
    yield from table(off_topic_rows(off))
    yield (f"called off-topic: {off.caught} of these, and {off.false_alarms} questions of the list")


def _confidence(found: Evaluation) -> Iterable[str]:
    known, left = found.confidence, found.abstaining
    if known.temperature == 1:
        yield f"confidence: {UNSCALED if known.calibrated else 'not calibrated'}"
        yield from table(reliability_rows(known.after, None))
    else:
        yield f"confidence: calibrated, temperature {known.temperature:.2f}"
        yield from table(reliability_rows(known.after, known.before))
    if left.reasons:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.reasons.items())
        yield f"abstained: {reasons}; {left.errors} of {left.answered} answered are wrong"
