"""`qcat drift`: a log of answers against a reference period."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from qcat.classifier import DEFAULT_MODEL
from qcat.cli.output import Bars, FloatRange, given, table
from qcat.monitor.drift import FEWEST, LEVEL, Drift, Signal
from qcat.monitor.log import LogWindow
from qcat.workflows.drift import PLOTTED, WINDOW, drift

DRIFTED = 4

_FILE = click.Path(path_type=Path)
_LABELS = 5  # most changed, shown when the label mix has drifted
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
    default=WINDOW,
    show_default=True,
    help="Judge the last N answers.",
)
@click.option("--since", metavar="AGE", callback=_ago, help="Judge all since 90m, 36h or 7d ago.")
@click.option(
    "--data",
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
@click.option("--plot", metavar="FILE", type=_FILE, help=f"Plot the last {PLOTTED} windows as PNG.")
def command(
    log: Path,
    model: Path,
    reference: Path | None,
    window: int,
    since: datetime | None,
    data: Path | None,
    level: float,
    as_json: bool,
    plot: Path | None,
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
      qcat drift answers.jsonl -m house.gguf --plot drift.png
      head -n 1000 answers.jsonl > reference.jsonl
      qcat drift answers.jsonl --reference reference.jsonl --since 7d
    """
    if since and given("window"):
        raise click.UsageError("--window or --since, not both")
    if data and reference:
        raise click.UsageError("--data are asked of MODEL, which --reference replaces")
    if reference and given("model"):
        raise click.UsageError("--model or --reference, not both: a reference log names its model")
    with Bars() as bars:
        found = drift(
            log,
            None if reference else model,
            reference=reference,
            window=None if since else window,
            since=since,
            data=data,
            level=level,
            plot=plot,
            progress=bars.show,
        )
    if as_json:
        more = {
            "log": str(log),
            "model": found.model,
            "skipped": found.window.skipped,
            "others": found.window.others,
        }
        text = json.dumps({**found.drift.to_dict(), **more}, ensure_ascii=False)
    else:
        text = "\n".join(_report(found.drift, found.window))
    click.echo(text.encode("utf-8", "replace").decode())
    if plot and not found.plotted:
        click.echo(f"qcat: warning: nothing to plot: fewer than {FEWEST} answers", err=True)
    return DRIFTED if found.drift.drifted else 0


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
