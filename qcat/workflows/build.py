"""The whole way from labelled questions to a proven model, each finished step kept.

Beside the bundle DIR stands `DIR.build` with what leads to it: `build.json` (what each step was
asked for), `task.toml`, the run, and `evaluation.json`, which comes last. The same call resumes; a
step that has not begun may be asked for something else.
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
from qcat.workflows.choose import kinds_to_make
from qcat.workflows.init import init_task, task_name
from qcat.workflows.train import DEFAULT_BASE, train

if TYPE_CHECKING:
    from qcat.evaluation.results import Evaluation
    from qcat.training.adapters import Method


EVALUATION = "evaluation.json"


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
    work = _work_folder(bundle)
    trained_with = {
        "base": base,
        "method": method,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "layers": layers,
        "seed": seed,
    }
    exported_with = {"quantization": quantization, "merges": merges, "max_flips": max_flips}
    kinds_to_make(quantization, scales=method == "scales", proved=True)  # now, not after training
    decided = _task(source, task, work, announce)
    _lint(decided, source, announce)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{work}: {error.strerror}: choose another folder") from None
    with locked(work / ".lock", target=bundle, busy="another build is at it", error=ExportError):
        run, plan = work / "run", _Plan(work / "build.json")
        if bundle.exists() and not run.is_dir():
            raise ArgumentError(f"{bundle} exists already: remove it or name another folder")
        plan.check("training", {**trained_with, **_identity(source, decided)}, begun=run.is_dir())
        write_whole(work / "task.toml", decided.to_toml().encode())
        record = _train(run, source, decided, trained_with, announce, progress)
        plan.check("export", exported_with, begun=bundle.exists())
        report = _export(run, bundle, work, exported_with, announce, progress)
        evaluated = (work / EVALUATION).is_file()
        plan.check("evaluation", {"max_error": max_error}, begun=evaluated)
        evaluation = _evaluate(bundle, run, work, max_error, announce, progress)
    return Built(bundle, Bundle.read(bundle).task, record, report, evaluation)


def _work_folder(bundle: Path) -> Path:
    """Where the steps are kept. Raises ArgumentError: the bundle has no name of its own."""
    if bundle.name in ("", ".."):
        raise ArgumentError(f"{bundle}: name the folder to make, such as house")
    return bundle.with_name(f"{bundle.name}.build")


@dataclass(frozen=True)
class _Plan:
    """What each step that has begun was asked for."""

    path: Path

    def check(self, step: str, wanted: Mapping[str, Any], *, begun: bool) -> None:
        """Write down what a step is asked for; if it has begun, see that that was the very same.

        Raises:
            ArgumentError: it was not.
        """
        plan = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}
        if begun and plan.get(step) != wanted:
            raise ArgumentError(
                f"{self.path.parent} holds the {step} of other questions, another task or other "
                "options: remove what it made, or name another folder with -o"
            )
        write_whole(self.path, json.dumps({**plan, step: wanted}, indent=1).encode())


def _identity(questions: Path, task: Task) -> dict[str, Any]:
    """What tells a training from others, besides its options."""
    with questions.open("rb") as file:  # lint has read it
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"task": task.to_dict(), "questions": digest}


def _task(
    questions: Path,
    named: str | os.PathLike[str] | None,
    work: Path,
    announce: Callable[[str], None],
) -> Task:
    """The task that is named, lies beside the questions, or follows from their labels."""
    if not questions.name:
        raise DataError(f"{questions}: is no file of questions: name one")
    path = Path(named) if named is not None else questions.with_name("task.toml")
    if named is not None or path.is_file():
        announce(f"task: {path}")
        return Task.read(path)
    task = init_task(questions, name=task_name(work.with_suffix(""))).task
    announce(f"task: {len(task.labels)} labels in order of frequency, as {work / 'task.toml'}")
    return task


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


def _train(
    run: Path,
    questions: Path,
    task: Task,
    options: Mapping[str, Any],
    announce: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    if (run / "run.json").is_file():
        announce(f"training: kept, {run}")
        record: dict[str, Any] = json.loads((run / "run.json").read_text("utf-8"))
        return record
    announce(f"training: {options['base']}, {options['method']}")
    return train(questions, task=task, output=run, progress=progress, **options)


def _export(
    run: Path,
    bundle: Path,
    work: Path,
    options: Mapping[str, Any],
    announce: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    if bundle.exists():
        announce(f"export: kept, {bundle}")
        there = Bundle.read(bundle)
        return section(there.header, REPORT_KEY, there.path)
    from qcat.workflows.export import export_run

    (work / EVALUATION).unlink(missing_ok=True)  # it was of another bundle
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
    file = work / EVALUATION
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
