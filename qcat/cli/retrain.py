"""`qcat retrain`: more questions to a new model, which serves if it is not worse."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcat.cli.export import print_report
from qcat.cli.output import ROWS, FloatRange, more, shown, table
from qcat.cli.train import record_lines, train_bars
from qcat.data.dataset import Example

if TYPE_CHECKING:
    from qcat.calibration.calibration import Calibration
    from qcat.evaluation.results import Abstaining, Comparison, Evaluation, Flip
    from qcat.training.retrain import Addition, Run
    from qcat.workflows.retrain import Event

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("run", metavar="RUN", type=_FOLDER)
@click.option(
    "--add",
    required=True,
    metavar="FILE",
    type=_FOLDER,
    help="More labelled questions: JSONL, CSV or Parquet.",
)
@click.option(
    "-o", "--output", required=True, metavar="DIR", type=_FOLDER, help="Folder of the new run."
)
@click.option(
    "--bundle",
    required=True,
    metavar="DIR",
    type=_FOLDER,
    help="The bundle in use: the new one is exported like it, compared with it, and replaces it.",
)
@click.option(
    "--max-loss",
    type=FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Promote even if accuracy falls by this much, on the test or on the reviewed questions: a "
    "few reviewed ones differ by chance alone.",
)
def command(run: Path, add: Path, output: Path, bundle: Path, max_loss: float) -> None:
    """Train the task of RUN again with more questions, and replace a bundle if the result is not
    worse.

    Base, settings, validation and test questions are those of RUN. Added questions that are too
    similar to validation or test questions are left out. One in five of the new groups of similar
    questions is held back for the comparison; the others join the training. The new bundle is
    exported like the old one and gets its threshold, or one that keeps the same promise on the
    test questions. Both models are asked the test questions and those held back. If the new one is
    not worse, it takes the place of DIR and the old one becomes DIR.previous; otherwise it stays
    as DIR.candidate and the exit status is 5. Rerun the command to resume one that was stopped.

    DIR has to be the bundle that was exported from RUN.

    \b
    Example:
      qcat retrain runs/house --add more.jsonl -o runs/house-2 --bundle dist/house
    """
    if sys.stderr.isatty():
        click.echo("loading torch and transformers …", err=True)
    from qcat.workflows.retrain import retrain

    with train_bars(output) as bars:

        def report(event: Event) -> None:
            bars.close()
            for line in _lines(event, add, bundle, output):
                click.echo(line)

        retrain(
            run,
            add=add,
            output=output,
            bundle=bundle,
            max_loss=max_loss,
            progress=bars.show,
            report=report,
        )


def _lines(event: Event, add: Path, bundle: Path, run: Path) -> Iterator[str]:
    """What is printed of an event of the workflow."""
    from qcat.workflows import retrain as events

    match event:
        case events.Restored():
            yield f"{bundle}: a promotion was cut short: the bundle before it is back"
        case events.Added(addition, old, new):
            yield from _account(add, addition, old, new)
        case events.Kept(folder, step):
            yield f"{folder}: {step} already"
        case events.Trained(record):
            yield from record_lines(record)
        case events.Exported(request, report):
            print_report(request, report)
        case events.ThresholdCarried(before, now):
            yield from _threshold(before, now)
        case events.NotHeldBack(part):
            yield f"\n{part}: no questions held back yet"
        case events.Compared(part, found, compared):
            yield ""
            yield from _comparison(part, found, compared, bundle, run)
        case events.Done(_, None):
            yield f"{bundle}: is the bundle of {run} already"
        case events.Done(_, previous):
            yield f"\n{bundle}: now the bundle of {run}; the one before is {previous}"


def _threshold(before: Calibration, now: Calibration) -> Iterator[str]:
    if before.promise:
        yield (
            f"threshold {before.threshold:.4f} before, {now.threshold:.4f} now, for the same "
            f"promise: at most {before.promise.max_error:.1%} of the answers wrong"
        )
    elif now.threshold is not None:
        yield f"threshold {now.threshold:.4f}, as set by hand for the old bundle"


def _account(add: Path, addition: Addition, old: Run, new: Run) -> Iterator[str]:
    """What became of the added questions."""
    rows = [
        ("join the training", addition.joined),
        ("held back to be asked", addition.held_back),
        ("left out: like questions that measure", addition.left_out),
        ("known", addition.known),
    ]
    yield f"{add}: {sum(len(examples) for _, examples in rows)} questions"
    yield from table([(f"  {len(examples)}", what) for what, examples in rows if examples])
    labels = list(old.task.labels)
    if addition.replaced:
        yield f"training questions that take the added label: {len(addition.replaced)}; they had"
        yield from _listed(addition.replaced, labels)
    if addition.contradicting:
        yield (
            "left out that contradict a question that measures, which keeps its label: "
            f"{len(addition.contradicting)}"
        )
        yield from _listed(addition.contradicting, labels)
    yield (
        f"training questions: {len(old.split.train)} before, {len(new.split.train)} now; "
        f"reviewed: {len(old.split.reviewed)} before, {len(new.split.reviewed)} now"
    )


def _listed(examples: Sequence[Example], labels: Sequence[str]) -> Iterator[str]:
    yield from table([(f"  {labels[e.label]}", shown(e.text)) for e in examples[:ROWS]])
    yield from more(examples)


def _comparison(
    what: str, found: Evaluation, compared: Comparison, bundle: Path, run: Path
) -> Iterator[str]:
    yield f"{what}: {found.questions} questions kept out of training"
    yield from table(
        [
            ("", "accuracy", "macro-F1", "abstained", "wrong of the answered"),
            *(
                (f"{age}, {name}", str(q.accuracy), str(q.macro_f1), *_shares(abstaining))
                for age, name, q, abstaining in (
                    ("old", bundle, compared.quality, compared.abstaining),
                    ("new", run, found.quality, found.abstaining),
                )
            ),
        ]
    )
    yield str(found.bootstrap)
    yield (
        f"{len(compared.flips)} labels changed: {compared.fixed} for better, {compared.broken} "
        f"for worse; McNemar's exact test: p = {compared.p_value:.3g}, taking the questions as "
        "independent"
    )
    better = [flip for flip in compared.flips if flip.this == flip.truth]
    worse = [flip for flip in compared.flips if flip.other == flip.truth]
    for kind, flips in (("for better", better), ("for worse", worse)):
        yield from _flips(kind, flips)


def _shares(abstaining: Abstaining) -> tuple[str, str]:
    return str(abstaining.left), f"{abstaining.errors} of {abstaining.answered}"


def _flips(kind: str, flips: Sequence[Flip]) -> Iterator[str]:
    if flips:
        rows = [(f.truth, str(f.other), str(f.this), shown(f.text)) for f in flips]
        yield from table([("right", "old", "new", kind), *rows[:ROWS]])
        yield from more(flips)
