"""`qcat drift`: a log of answers against a reference period."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from qcat.classifier import DEFAULT_MODEL, OLLAMA, Classifier
from qcat.cli.output import Bars, FloatRange, check_writable, given, table
from qcat.data.dataset import read_examples
from qcat.errors import BundleError, DataError
from qcat.files import write_whole
from qcat.gguf.bundle import Bundle, identity
from qcat.gguf.sections import REFERENCE_KEY, section
from qcat.monitor.drift import FEWEST, LEVEL, Accuracy, Drift, Reference, Signal, compare, history
from qcat.monitor.log import LogWindow, read_log, scan_log

DRIFTED = 4

_FILE = click.Path(path_type=Path)
_LABELS = 5  # most changed, shown when the label mix has drifted
_POINTS = 200  # windows in the picture, the last ones
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def _ago(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    """`90m`, `36h` or `7d`, as the time so long ago."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})([mhd])", value)
    if not found:
        raise click.BadParameter(f"{value!r}: minutes, hours or days expected, as in 7d")
    return datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})


@click.command()
@click.argument("log", metavar="LOG", type=_FILE)
@click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    type=_FILE,
    default=DEFAULT_MODEL,
    help="The GGUF that answered; its reference is what LOG is compared with. By default the "
    "household model that comes with qcat.  [env: QCAT_MODEL]",
)
@click.option(
    "--reference",
    metavar="FILE",
    type=_FILE,
    help="Compare with this log of a reference period instead, such as the first thousand lines "
    "of LOG.",
)
@click.option(
    "--window",
    metavar="N",
    type=click.IntRange(FEWEST),
    default=500,
    show_default=True,
    help="Judge the last N answers.",
)
@click.option("--since", metavar="AGE", callback=_ago, help="Judge all since 90m, 36h or 7d ago.")
@click.option(
    "--labelled",
    metavar="FILE",
    type=_FILE,
    help="Ask MODEL these labelled questions too: has its accuracy fallen?",
)
@click.option(
    "--level",
    metavar="SHARE",
    type=FloatRange(0.001, 0.2),
    default=LEVEL,
    show_default=True,
    help="The most runs without drift that may call it drift.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document with all figures.")
@click.option("--png", metavar="FILE", type=_FILE, help=f"Draw the last {_POINTS} windows of LOG.")
def command(
    log: Path,
    model: Path,
    reference: Path | None,
    window: int,
    since: datetime | None,
    labelled: Path | None,
    level: float,
    as_json: bool,
    png: Path | None,
) -> int:
    """Compare the answers in LOG, written by `qcat ask --log`, with those of a reference period.

    Label mix, confidence, label mass and the share abstained (if the same thresholds made both)
    are tested, with a correction for their number. To count, a change must be sure
    and large enough: a PSI of 0.1 for the label mix, else five in a hundred questions.

    \b
    Exit status: 0 no drift, or too few questions to tell, 1 error, 2 usage, 4 drift.

    \b
    Examples:
      qcat ask -m house.gguf --log answers.jsonl < questions.txt
      qcat drift answers.jsonl -m house.gguf --png drift.png
      head -n 1000 answers.jsonl > quiet.jsonl
      qcat drift answers.jsonl --reference quiet.jsonl --since 7d
    """
    if since and given("window"):
        raise click.UsageError("--window or --since, not both")
    if labelled and reference:
        raise click.UsageError("--labelled compares with what MODEL says, not with --reference")
    if reference and given("model"):
        raise click.UsageError("--model or --reference, not both: a quiet log names its model")
    if not reference and str(model).startswith(OLLAMA):
        raise click.UsageError(
            f"{model} is on a server: name its GGUF with -m, or a log of a reference period with "
            "--reference"
        )
    if png:
        check_writable(png)
    for library in ("scipy", *(["matplotlib"] if png else [])):
        importlib.import_module(library)  # its absence is reported before the work
    name, quiet = _quiet_time(reference) if reference else _bundle_reference(model)
    found = read_log(log, model=name, since=since, last=None if since else window)
    if not found.records and not since and found.others + found.skipped:
        raise DataError(
            f"{log}: no answer of {name}, but {found.others} of other models and "
            f"{found.skipped} lines that are no answer: name "
            + ("a quiet log of the same model" if reference else "the model with -m")
        )
    accuracy = _accuracy(model, labelled, quiet) if labelled else None
    drift = compare(quiet, Reference.of_log(found.records), level=level, accuracy=accuracy)
    if as_json:
        more = {"log": str(log), "model": name, "skipped": found.skipped, "others": found.others}
        text = json.dumps({**drift.to_dict(), **more}, ensure_ascii=False)
    else:
        text = "\n".join(_report(drift, found))
    click.echo(text.encode("utf-8", "replace").decode())
    if png:
        size = max(len(found.records), FEWEST) if since else window
        _draw(png, log, name, quiet, size, level)
    return DRIFTED if drift.drifted else 0


def _bundle_reference(model: Path) -> tuple[str, Reference]:
    """The identity of a GGUF and the reference that it carries."""
    bundle = Bundle.read(model)
    data = section(bundle.header, REFERENCE_KEY, model)
    if not data:
        raise BundleError(
            f"{model}: carries no reference: run `qcat calibrate {model} validation.jsonl`, or "
            "name a log of a reference period with --reference"
        )
    try:
        return identity(bundle.header.metadata), Reference.from_dict(data)
    except DataError as error:
        raise BundleError(
            f"{model}: metadata {REFERENCE_KEY}: {error}: run `qcat calibrate {model} "
            "validation.jsonl`"
        ) from None


def _quiet_time(path: Path) -> tuple[str, Reference]:
    """The model that a log ends with, and its answers there."""
    records = read_log(path).records
    if not records:
        raise DataError(f"{path}: no answers in it: name a log written by `qcat ask --log`")
    name = records[-1].model
    return name, Reference.of_log([record for record in records if record.model == name])


def _accuracy(model: Path, path: Path, reference: Reference) -> Accuracy:
    """Ask a model labelled questions."""
    if reference.right is None:
        raise BundleError(
            f"{model}: its reference has no accuracy to compare with: run `qcat calibrate {model} "
            "validation.jsonl`"
        )
    examples = read_examples(path, Bundle.read(model).task)
    right = 0
    with Classifier.open(model) as classifier, Bars() as bars:
        labels = list(classifier.task.labels)
        predictions = classifier.ask_many(example.text for example in examples)
        for number, (said, example) in enumerate(zip(predictions, examples, strict=True), 1):
            right += said.label == labels[example.label]
            bars.show("questions", number, len(examples))
    return Accuracy(right, len(examples))


def _draw(png: Path, log: Path, model: str, quiet: Reference, size: int, level: float) -> None:
    from qcat.report.figures import drift_png

    records = (record for record in scan_log(log) if record and record.model == model)
    points = history(quiet, records, size, last=_POINTS, level=level)
    if points:
        write_whole(png, drift_png(points))
    else:
        click.echo(f"qcat: warning: no picture: fewer than {FEWEST} answers", err=True)


def _report(drift: Drift, found: LogWindow) -> Iterable[str]:
    """What the terminal shows."""
    yield _verdict(drift)
    if drift.signals:
        yield ""
        head = ("", "reference", "window", "change", "PSI", "p", "")
        yield from table([head, *_rows(drift.signals)])
    if any(signal.name == "label mix" for signal in drift.drifted):
        changed = drift.labels[:_LABELS]
        yield ""
        yield from table(
            [
                ("most changed", "reference", "window"),
                *((label, f"{before:.3f}", f"{now:.3f}") for label, before, now in changed),
            ]
        )
    if found.others or found.skipped:
        yield ""
        yield f"left out: {found.others} answers of other models, {found.skipped} damaged lines"


def _verdict(drift: Drift) -> str:
    if not drift.enough:
        few, where = min(
            (drift.questions, "to judge"), (drift.reference_questions, "in the reference")
        )
        return f"too few to tell: {few} questions {where}, {FEWEST} needed"
    if not drift.drifted:
        return f"no drift in {drift.questions} questions"
    return f"drift in {drift.questions} questions: {', '.join(map(_named, drift.drifted))}"


def _named(signal: Signal) -> str:
    p = f"p {signal.p_value:.1g}"
    if signal.reference is None or signal.window is None:
        return f"{signal.name} (PSI {signal.change:.2f}, {p})"
    return f"{signal.name} {signal.reference:.2f} -> {signal.window:.2f} ({p})"


def _rows(signals: Sequence[Signal]) -> Iterable[tuple[str, ...]]:
    for signal in signals:
        yield (
            signal.name,
            "" if signal.reference is None else f"{signal.reference:.3f}",
            "" if signal.window is None else f"{signal.window:.3f}",
            "" if signal.reference is None else f"{signal.change:.3f}",
            "" if signal.psi is None else f"{signal.psi:.3f}",
            f"{signal.p_value:.2g}",
            "drift" if signal.drifted else "",
        )
