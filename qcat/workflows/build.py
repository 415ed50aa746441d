"""The whole way from labelled questions to a proven model, each finished step kept.

Beside the bundle DIR stands `DIR.build` with what leads to it: `build.json` (what was asked for),
`task.toml`, the run, and `evaluation.json`, which comes last. The same call resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qcat.data.findings import Report
from qcat.data.lint import lint
from qcat.errors import ArgumentError, DataError, ExportError
from qcat.files import locked, write_whole
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import REPORT_KEY, section
from qcat.progress import Progress, silent
from qcat.task import Task
from qcat.workflows.init import init_task, task_name, write_task
from qcat.workflows.train import DEFAULT_BASE, train

if TYPE_CHECKING:
    from qcat.evaluation.results import Evaluation
    from qcat.training.adapters import Method


class LintError(DataError):
    """Questions that lint finds errors in; `report` has them."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Built:
    """What a build left."""

    bundle: Path
    """Folder with the GGUF, Modelfile, grammar, model card and report."""
    task: Task
    run: Mapping[str, Any]
    """The training's record, as in `run.json`."""
    report: Mapping[str, Any]
    """The export's, as in `report.json`."""
    evaluation: Mapping[str, Any]
    """As `Evaluation.to_dict` gives it: the test questions, with the TF-IDF baseline."""


def build(
    questions: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | os.PathLike[str] | None = None,
    base: str = DEFAULT_BASE,
    method: Method = "scales",
    epochs: int = 5,
    learning_rate: float | None = None,
    layers: int | Literal["auto"] | None = None,
    quantization: str | None = None,
    merges: int | None = None,
    max_flips: float = 0.05,
    max_error: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda step: None,
) -> Built:
    """Make a model of labelled questions: task, lint, training, export with proof, evaluation.

    Args:
        questions: labelled, JSONL, CSV or Parquet.
        output: folder of the bundle.
        task: its task.toml; None takes the one beside the questions, or makes one of their labels.
        base: as for `train`, as are the next four.
        method: see there.
        epochs: see there.
        learning_rate: see there.
        layers: see there.
        quantization: as for `export`, as are the next two.
        merges: see there.
        max_flips: see there.
        max_error: also set the threshold above which at most this share of the answers is wrong,
            on the test questions.
        seed: for training and for the split.
        progress: called as the work goes on.
        announce: called with each step before it begins, or with what is kept of it.

    Raises:
        LintError: the questions have errors.
        ArgumentError: the folder holds a build of something else.
        DataError, TaskError, ModelError, TrainError, ExportError: as the steps do.
    """
    source, bundle = Path(questions), Path(output)
    work = bundle.with_name(f"{bundle.name}.build")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{work}: {error.strerror}: choose another folder") from None
    with locked(work / ".lock", target=bundle, busy="another build is at it", error=ExportError):
        options = {
            "base": base,
            "method": method,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "layers": layers,
            "seed": seed,
        }
        export_options = {"quantization": quantization, "merges": merges, "max_flips": max_flips}
        asked = {**options, **export_options, "max_error": max_error}
        decided = _task(source, task, work, announce)
        _check_same(work, bundle, asked, source, decided)
        _lint(decided, source, announce)
        run = work / "run"
        if (run / "run.json").is_file():
            announce(f"training: kept, {run}")
            record = json.loads((run / "run.json").read_text("utf-8"))
        else:
            announce(f"training: {base}, {method}")
            record = train(source, task=decided, output=run, progress=progress, **options)  # type: ignore[arg-type]
        report = _export(run, bundle, export_options, announce, progress)
        evaluation = _evaluate(bundle, run, work, max_error, announce, progress)
    return Built(bundle, Bundle.read(bundle).task, record, report, evaluation)


def _task(
    questions: Path,
    named: str | os.PathLike[str] | None,
    work: Path,
    announce: Callable[[str], None],
) -> Task:
    """The task that is named, lies beside the questions, or follows from their labels."""
    beside, made = questions.with_name("task.toml"), work / "task.toml"
    if named is not None or beside.is_file():
        path = Path(named) if named is not None else beside
        announce(f"task: {path}")
        return Task.read(path)
    if not made.is_file():
        write_task(init_task(questions, name=task_name(work.with_suffix(""))).task, made)
    task = Task.read(made)
    announce(f"task: {made}, {len(task.labels)} labels in order of frequency")
    return task


def _check_same(
    work: Path, bundle: Path, asked: Mapping[str, Any], questions: Path, task: Task
) -> None:
    """See that what is there was made of the very same; write down what is made where nothing is.

    Raises:
        ArgumentError: it was not.
    """
    try:
        with questions.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{questions}: cannot be read: {error.strerror}") from None
    wanted = json.dumps({**asked, "task": task.to_dict(), "questions": digest}, indent=1)
    plan = work / "build.json"
    if plan.is_file():
        if plan.read_text("utf-8") != wanted:
            raise ArgumentError(
                f"{work} holds a build of other questions, another task or other options: remove "
                "it, or name another folder with -o"
            )
    elif bundle.exists():
        raise ArgumentError(f"{bundle} exists already: remove it or name another folder with -o")
    else:
        write_whole(plan, wanted.encode())


def _lint(task: Task, questions: Path, announce: Callable[[str], None]) -> None:
    report = lint(task, questions)
    errors, warnings = report.count("error"), report.count("warning")
    announce(f"lint: {report.questions} questions, {errors} errors, {warnings} warnings")
    if errors:
        raise LintError(
            f"{questions}: {errors} errors: mend them, or take the copy that `qcat lint --fix` "
            "writes",
            report,
        )


def _export(
    run: Path,
    bundle: Path,
    options: Mapping[str, Any],
    announce: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    if bundle.exists():
        announce(f"export: kept, {bundle}")
        there = Bundle.read(bundle)
        return section(there.header, REPORT_KEY, there.path)
    from qcat.workflows.export import export_run

    announce("export: merge, convert, quantize, prove, calibrate")
    return export_run(run, bundle, progress=progress, **options)


def _evaluate(
    bundle: Path,
    run: Path,
    work: Path,
    max_error: float | None,
    announce: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Set the threshold, if one is asked for, and measure; what was measured is kept."""
    file = work / "evaluation.json"
    if file.is_file():
        announce(f"evaluation: kept, {file}")
        kept: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return kept
    from qcat.workflows.calibrate_model import calibrate
    from qcat.workflows.evaluate import evaluate

    test = run / "test.jsonl"
    if max_error is not None:
        announce(f"calibrate: at most {max_error:.1%} of the answers wrong")
        calibrate(bundle, test, max_error=max_error, progress=progress)
    announce("evaluate: the test questions, beside a TF-IDF baseline")
    found: Evaluation = evaluate(
        Bundle.read(bundle).path, test, train_data=run / "train.jsonl", progress=progress
    )
    data = found.to_dict()
    write_whole(file, json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    return data
