"""`qcat retrain`: more questions to a new model, which serves if it is not worse."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcat.cli.output import ROWS, Bars, FloatRange, more, shown, table
from qcat.data.dataset import Example, read_examples
from qcat.errors import BundleError, DataError, ExportError, NotPromotedError
from qcat.gguf.bundle import Bundle, find_gguf
from qcat.gguf.sections import REPORT_KEY, SOURCE_KEY, section
from qcat.opening import read_calibration
from qcat.threads import wait_briefly

if TYPE_CHECKING:
    from qcat.evaluation.results import Abstaining, Comparison, Evaluation, Flip
    from qcat.training.retrain import Addition, Run

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
    help="The bundle that serves: what the new one is compared with, made like, and replaces.",
)
@click.option(
    "--max-loss",
    type=FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Promote even if so much accuracy is lost, on the test or on the reviewed questions: few "
    "reviewed ones differ by chance alone.",
)
def command(run: Path, add: Path, output: Path, bundle: Path, max_loss: float) -> None:
    """Train the task of RUN anew with more questions; let the result replace a bundle if it is
    not worse.

    The base, the settings and the validation and test questions are RUN's. Added questions like
    those that measure are left out; of the new families one in five is held back to be asked
    after; the others join the training. The new bundle is made as the old one was, with its
    threshold, or one found anew on the test questions for the same promise. Both are asked the
    test questions and those held back. If the new one is as good it takes the place of DIR
    and the old one becomes DIR.previous; if not, it stays as DIR.candidate and the exit status is
    5. Rerun the command to resume one that was stopped.

    DIR has to be the bundle of RUN, so that no question is lost that it was trained on.

    \b
    Example:
      qcat retrain runs/house --add more.jsonl -o runs/house-2 --bundle dist/house
    """
    wait_briefly()
    if sys.stderr.isatty():
        click.echo("loading torch and transformers …", err=True)
    from qcat_convert.source import fingerprint

    from qcat.base.checkpoint import base_folder
    from qcat.cli.train import print_record, train_bars
    from qcat.training.retrain import Run, add_questions
    from qcat.training.train import train
    from qcat.workflows.promote import previous_of, promote, reserved

    with reserved(bundle) as cut_short:
        if cut_short:
            click.echo(f"{bundle}: a promotion was cut short: the bundle before it is back")
        old = Run.read(run)
        serving = _serving(bundle, old, run, output)
        recipe = _recipe(serving)
        added = read_examples(add, old.task)
        addition = add_questions(old.split, added, seed=old.settings.seed, name=str(add))
        new = replace(old, split=addition.split)
        click.echo("\n".join(_account(add, addition, old, new)))
        if new.is_in(output):
            click.echo(f"{output}: trained already")
        else:
            # From the base, not from the old adapter: one recipe for the first model and the
            # tenth, which anyone can repeat from the questions, and no drift from tuning on tuning.
            with train_bars(output) as progress:
                record = train(new.task, new.split, new.settings, output, progress)
            print_record(record)
        weights = fingerprint(base_folder(new.settings.base), output)
        if _source(serving) == weights:
            click.echo(f"{bundle}: is the bundle of {output} already")
            return
        candidate = _candidate(bundle, output, weights, recipe)
        # Again, since hours may have passed: its threshold is carried as it is now.
        serving = _serving(bundle, old, run, output)
        problems = _carry_threshold(serving, candidate, output)
        problems |= _compare(output, candidate, serving.path, bundle, max_loss)
        if problems:
            raise NotPromotedError(
                f"{bundle}: stays, since the new model gets {' and '.join(problems.values())}; "
                f"that is kept as {candidate.parent}: {_way_out(problems, serving.path)}"
            )
        if Bundle.read(serving.path).header != serving.header:
            raise ExportError(f"{bundle}: was changed while it was compared: rerun the command")
        promote(bundle)
    click.echo(f"\n{bundle}: now the bundle of {output}; the one before is {previous_of(bundle)}")


def _serving(bundle: Path, old: Run, run: Path, output: Path) -> Bundle:
    """The bundle that serves, once it is known that it can be replaced by one of `output`."""
    from qcat_convert.source import fingerprint

    from qcat.base.checkpoint import base_folder

    serving = Bundle.read(find_gguf(bundle))
    if serving.task != old.task:
        raise BundleError(
            f"{bundle}: its task is not that of {run}: name the bundle exported from there"
        )
    base = base_folder(old.settings.base)
    # Of `output` if this very command has promoted it before.
    runs = [run, *([output] if (output / "run.json").is_file() else [])]
    if _source(serving) not in [fingerprint(base, folder) for folder in runs]:
        name = section(serving.header, SOURCE_KEY, serving.path).get("adapter")
        named = f" but of a run named {shown(name)}" if isinstance(name, str) else ""
        raise BundleError(
            f"{bundle}: was not made of {run} as it is now{named}: begin from the run that it was "
            "made of, or that run's questions are lost"
        )
    read_calibration(serving)  # damage is reported before the training
    return serving


def _carry_threshold(serving: Bundle, candidate: Path, run: Path) -> dict[str, str]:
    """Give the new model the old one's threshold, or its promise; what speaks against it if not."""
    from qcat.workflows.calibrate import carry_threshold

    task = serving.task
    questions = read_examples(run / "test.jsonl", task)
    try:
        with Bars() as bars:
            known = carry_threshold(
                candidate,
                read_calibration(serving),
                questions,
                lambda done, total: bars.show("threshold", done, total),
            )
    except DataError as error:
        # Less its advice, which names an option of `qcat calibrate`.
        why = str(error).partition(": ")[0]
        return {"promise": f"no threshold that keeps the old one's promise ({why})"}
    before = read_calibration(serving)
    if before.promise:
        click.echo(
            f"threshold {before.threshold:.4f} before, {known.threshold:.4f} now, for the same "
            f"promise: at most {before.promise.max_error:.1%} of the answers wrong"
        )
    elif known.threshold is not None:
        click.echo(f"threshold {known.threshold:.4f}, as set by hand for the old bundle")
    return {}


def _way_out(problems: Iterable[str], serving: Path) -> str:
    """What to do about what speaks against a new model."""
    promise = (
        f"set another promise with `qcat calibrate {serving} QUESTIONS --max-error SHARE` and "
    )
    again = "" if {*problems} == {"promise"} else " with a higher --max-loss"
    return (
        "add questions like those it got wrong, or "
        f"{promise if 'promise' in problems else ''}rerun the command{again}"
    )


def _recipe(serving: Bundle) -> dict[str, Any]:
    """How a bundle was exported; what it does not say was the default."""
    from qcat_convert.quantize import QUANTIZATIONS

    from qcat.workflows.choose import BESIDE

    report = section(serving.header, REPORT_KEY, serving.path)
    defaults = {"quantization": "q4_k_m", "precision": "f16", "max_flips": 0.02}
    recipe = {key: report.get(key, default) for key, default in defaults.items()}
    if recipe["quantization"] == BESIDE:
        raise BundleError(
            f"{serving.path}: is an adapter beside its base, which is not replaced in place: train "
            "with all questions, and export that with --beside"
        )
    vocabulary = report.get("vocabulary")  # absent if it is whole
    recipe["merges"] = vocabulary.get("merges") if isinstance(vocabulary, dict) else None
    if (
        recipe["quantization"] not in QUANTIZATIONS
        or recipe["precision"] not in ("f16", "bf16")
        or not isinstance(recipe["max_flips"], int | float)
        or not (vocabulary is None or isinstance(recipe["merges"], int))
    ):
        raise BundleError(
            f"{serving.path}: its report is not what `qcat export` writes: export it again"
        )
    return recipe


def _source(bundle: Bundle) -> Any:
    """The fingerprint of the weights that a bundle was made of."""
    return section(bundle.header, SOURCE_KEY, bundle.path).get("fingerprint")


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


def _candidate(bundle: Path, run: Path, weights: str, recipe: dict[str, Any]) -> Path:
    """The GGUF of the new run's bundle, exported unless it is there already."""
    from qcat.cli.export import export_and_tell
    from qcat.workflows.export_job import read_request
    from qcat.workflows.promote import candidate_of, clear

    folder = candidate_of(bundle)
    if folder.exists():
        there = Bundle.read(find_gguf(folder))
        if _source(there) == weights and _recipe(there) == recipe:
            click.echo(f"{folder}: exported already")
            return there.path
    clear(folder)
    export_and_tell(read_request(run, folder, **recipe))
    return find_gguf(folder)


def _compare(run: Path, new: Path, old: Path, bundle: Path, max_loss: float) -> dict[str, str]:
    """Ask both models, print how they did, and return what speaks against the new one, by part."""
    from qcat.evaluation.evaluate import Request, evaluate
    from qcat.training.retrain import refusal

    problems = {}
    for what in ("test", "reviewed"):
        data = run / f"{what}.jsonl"
        if not data.exists():
            click.echo(f"\n{what}: no questions held back yet")
            continue
        with Bars() as bars:
            found = evaluate(Request(new, data, compare=old, timed=1), bars.show)
        compared = found.comparison
        assert compared  # as requested
        click.echo("\n".join(["", *_comparison(what, found, compared, bundle, run)]))
        problem = refusal(what, compared, found.questions, max_loss)
        if problem:
            problems[what] = problem
    return problems


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
