"""Retraining with more questions: the new model replaces the old one if it is not worse.

Progress is reported as a sequence of events, which are plain data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qcat_convert.quantize import QUANTIZATIONS
from qcat_convert.source import fingerprint

from qcat.base.checkpoint import base_folder
from qcat.calibration.calibration import Calibration
from qcat.data.dataset import read_examples
from qcat.errors import BundleError, DataError, ExportError, NotPromotedError
from qcat.evaluation.results import Comparison, Evaluation
from qcat.gguf.bundle import Bundle, find_gguf
from qcat.gguf.sections import REPORT_KEY, SOURCE_KEY, section
from qcat.opening import read_calibration
from qcat.progress import Progress, silent
from qcat.shell import quoted
from qcat.threads import wait_briefly
from qcat.training.retrain import Addition, Run, add_questions, refusal
from qcat.training.train import train
from qcat.workflows.calibrate import carry_threshold
from qcat.workflows.choose import BESIDE
from qcat.workflows.evaluate import evaluate
from qcat.workflows.export import convert_apart, export
from qcat.workflows.export_job import Request, read_request
from qcat.workflows.promote import candidate_of, clear, previous_of, promote, reserved


@dataclass(frozen=True)
class Restored:
    """An interrupted promotion was undone: the previous bundle is back."""

    bundle: Path


@dataclass(frozen=True)
class Added:
    """What became of the added questions."""

    addition: Addition
    old: Run
    new: Run


@dataclass(frozen=True)
class Kept:
    """A step was already done before the workflow was interrupted."""

    folder: Path
    step: str
    """`trained` or `exported`."""


@dataclass(frozen=True)
class Trained:
    """The new model is trained."""

    record: Mapping[str, Any]
    """As in `run.json`."""


@dataclass(frozen=True)
class Exported:
    """The new model's bundle has been made."""

    request: Request
    report: Mapping[str, Any]
    """As in `report.json`."""


@dataclass(frozen=True)
class ThresholdCarried:
    """The new model has the old model's threshold, or one for the same promise."""

    before: Calibration
    now: Calibration


@dataclass(frozen=True)
class Compared:
    """Both models have been tested on one part of the questions."""

    part: str
    """`test` or `reviewed`."""
    evaluation: Evaluation
    """Of the new model."""
    comparison: Comparison
    """With the old one."""


@dataclass(frozen=True)
class NotHeldBack:
    """One part has no questions yet."""

    part: str


@dataclass(frozen=True)
class Done:
    """The new model is now in use."""

    bundle: Path
    previous: Path | None
    """Path of the old bundle; None if the bundle in use already belonged to the new run."""


Event = (
    Restored | Added | Kept | Trained | Exported | ThresholdCarried | Compared | NotHeldBack | Done
)


def retrain(
    run: str | os.PathLike[str],
    *,
    add: str | os.PathLike[str],
    output: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    max_loss: float = 0.0,
    progress: Progress = silent,
    report: Callable[[Event], None] = lambda event: None,
) -> Done:
    """Train a task again with more questions; promote the result if it is not worse.

    The same call resumes an interrupted one.

    Args:
        run: folder of the old run.
        add: file of labelled questions.
        output: folder of the new run.
        bundle: the bundle in use, exported from `run`.
        max_loss: share of the test questions, and of the reviewed questions, by which the new model
            may get more wrong than the old one.
        progress: called as the work goes on.
        report: called with each event.

    Raises:
        NotPromotedError: the new model is worse; it is kept as `BUNDLE.candidate`.
        BundleError, DataError, TrainError, ExportError: something cannot be used or written.
    """
    wait_briefly()
    old_run, new_run, place = Path(run), Path(output), Path(bundle)
    with reserved(place) as cut_short:
        if cut_short:
            report(Restored(place))
        old = Run.read(old_run)
        serving = _serving(place, old, old_run, new_run)
        recipe = _recipe(serving)
        added = read_examples(Path(add), old.task)
        addition = add_questions(old.split, added, seed=old.settings.seed, name=str(add))
        new = replace(old, split=addition.split)
        report(Added(addition, old, new))
        if new.is_in(new_run):
            report(Kept(new_run, "trained"))
        else:
            # From the base, not from the old adapter: every model is made by the same recipe, can
            # be reproduced from the questions, and does not drift by repeated fine-tuning.
            report(Trained(train(new.task, new.split, new.settings, new_run, progress)))
        weights = fingerprint(base_folder(new.settings.base), new_run)
        if _source(serving) == weights:
            return _done(Done(place, None), report)
        candidate = _candidate(place, new_run, weights, recipe, progress, report)
        # Read again, since hours may have passed and its threshold may have changed.
        serving = _serving(place, old, old_run, new_run)
        problems = _carry_threshold(serving, candidate, new_run, progress, report)
        problems |= _compare(new_run, candidate, serving.path, max_loss, progress, report)
        if problems:
            raise NotPromotedError(
                f"{place}: stays, since the new model gets {' and '.join(problems.values())}; "
                f"that is kept as {candidate.parent}: {_way_out(problems, serving.path)}"
            )
        if Bundle.read(serving.path).header != serving.header:
            raise ExportError(f"{place}: was changed while it was compared: rerun the command")
        promote(place)
    return _done(Done(place, previous_of(place)), report)


def _done(done: Done, report: Callable[[Event], None]) -> Done:
    report(done)
    return done


def _serving(bundle: Path, old: Run, run: Path, output: Path) -> Bundle:
    """The bundle in use, after checking that a bundle of `output` may replace it."""
    serving = Bundle.read(find_gguf(bundle))
    if serving.task != old.task:
        raise BundleError(
            f"{bundle}: its task is not that of {run}: name the bundle exported from there"
        )
    base = base_folder(old.settings.base)
    # It belongs to `output` if this same command has promoted it before.
    runs = [run, *([output] if (output / "run.json").is_file() else [])]
    if _source(serving) not in [fingerprint(base, folder) for folder in runs]:
        name = section(serving.header, SOURCE_KEY, serving.path).get("adapter")
        plain = "".join(filter(str.isprintable, name))[:70] if isinstance(name, str) else ""
        named = f" but of a run named {plain}" if plain else ""
        raise BundleError(
            f"{bundle}: was not made of {run} as it is now{named}: begin from the run that it was "
            "made of, or that run's questions are lost"
        )
    read_calibration(serving)  # damage is reported before training starts
    return serving


def _candidate(
    bundle: Path,
    run: Path,
    weights: str,
    recipe: dict[str, Any],
    progress: Progress,
    report: Callable[[Event], None],
) -> Path:
    """The GGUF of the new run's bundle; exported if it does not exist yet."""
    folder = candidate_of(bundle)
    if folder.exists():
        there = Bundle.read(find_gguf(folder))
        if _source(there) == weights and _recipe(there) == recipe:
            report(Kept(folder, "exported"))
            return there.path
    clear(folder)
    request = read_request(run, folder, **recipe)
    report(Exported(request, export(request, progress, convert_apart)))
    return find_gguf(folder)


def _carry_threshold(
    serving: Bundle,
    candidate: Path,
    run: Path,
    progress: Progress,
    report: Callable[[Event], None],
) -> dict[str, str]:
    """Give the new model the old one's threshold or promise; returns the reason if impossible."""
    before = read_calibration(serving)
    questions = read_examples(run / "test.jsonl", serving.task)
    try:
        now = carry_threshold(candidate, before, questions, partial(progress, "threshold"))
    except DataError as error:
        # Without its advice, which names an option of `qcat calibrate`.
        why = str(error).partition(": ")[0]
        return {"promise": f"no threshold that keeps the old one's promise ({why})"}
    report(ThresholdCarried(before, now))
    return {}


def _compare(
    run: Path,
    new: Path,
    old: Path,
    max_loss: float,
    progress: Progress,
    report: Callable[[Event], None],
) -> dict[str, str]:
    """Test both models, and return the reasons against the new one, by part."""
    problems = {}
    for part in ("test", "reviewed"):
        data = run / f"{part}.jsonl"
        if not data.exists():
            report(NotHeldBack(part))
            continue
        found = evaluate(new, data, compare=old, timed=1, progress=progress)
        compared = found.comparison
        assert compared  # as requested
        report(Compared(part, found, compared))
        problem = refusal(part, compared, found.questions, max_loss)
        if problem:
            problems[part] = problem
    return problems


def _way_out(problems: Iterable[str], serving: Path) -> str:
    """Advice on what to do about the reasons against a new model."""
    promise = (
        f"set another promise with `qcat calibrate {quoted(serving)} QUESTIONS --max-error SHARE` "
        "and "
    )
    again = "" if {*problems} == {"promise"} else " with a higher --max-loss"
    return (
        "add questions like those it got wrong, or "
        f"{promise if 'promise' in problems else ''}rerun the command{again}"
    )


def _recipe(serving: Bundle) -> dict[str, Any]:
    """How a bundle was exported; missing entries mean the default."""
    report = section(serving.header, REPORT_KEY, serving.path)
    defaults = {"quantization": "q4_k_m", "precision": "f16", "max_flips": 0.02}
    recipe = {key: report.get(key, default) for key, default in defaults.items()}
    if recipe["quantization"] == BESIDE:
        raise BundleError(
            f"{serving.path}: is an adapter beside its base, which is not replaced in place: train "
            "with all questions, and export that with --beside"
        )
    vocabulary = report.get("vocabulary")  # absent if the vocabulary is complete
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
    """The fingerprint of the weights from which a bundle was made."""
    return section(bundle.header, SOURCE_KEY, bundle.path).get("fingerprint")
