"""All steps from labelled questions to a verified model; each finished step is kept.

Beside the bundle DIR, the folder `DIR.build` holds the intermediate results: `build.json` (the
options of each step), `task.toml`, the run, and `evaluation.json`, which is written last. The same
call resumes. Options may change for steps that have not started.
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
from qcat.training.settings import EPOCHS
from qcat.workflows.choose import kinds_to_make
from qcat.workflows.init import init_task, task_name
from qcat.workflows.train import DEFAULT_BASE, train

if TYPE_CHECKING:
    from qcat.evaluation.results import Evaluation
    from qcat.training.adapters import Method


EVALUATION = "evaluation.json"


class LintError(DataError):
    """Lint found errors in the questions; `report` holds them."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Built:
    """The result of a build."""

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
    epochs: int = EPOCHS,
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
    """Make a model from labelled questions: task, lint, training, verified export, evaluation.

    Args:
        questions: labelled, JSONL, CSV or Parquet.
        output: folder of the bundle.
        task: path of a task.toml; None uses the one beside the questions, or makes one from their
            labels.
        base: as for `train`, like the next four.
        method: see there.
        epochs: see there.
        learning_rate: see there.
        layers: see there.
        quantization: as for `export`, like the next two.
        merges: see there.
        max_flips: see there.
        max_error: also set the threshold above which at most this share of the answers is wrong;
            the test questions are used for this.
        seed: for training and for the split.
        progress: called as the work goes on.
        announce: called with each step before it starts, or with its stored result.

    Raises:
        LintError: the questions have errors.
        ArgumentError: the folder holds a build with other questions, task or options.
        DataError, TaskError, ModelError, TrainError, ExportError: as raised by the steps.
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
    """The folder for the steps. Raises ArgumentError if the bundle's path has no name."""
    if bundle.name in ("", ".."):
        raise ArgumentError(f"{bundle}: name the folder to make, such as house")
    return bundle.with_name(f"{bundle.name}.build")


@dataclass(frozen=True)
class _Plan:
    """The options of each step that has started."""

    path: Path

    def check(self, step: str, wanted: Mapping[str, Any], *, begun: bool) -> None:
        """Store the options of a step; if it has already started, check that they are the same.

        Raises:
            ArgumentError: they differ.
        """
        plan = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}
        if begun and plan.get(step) != wanted:
            raise ArgumentError(
                f"{self.path.parent} holds the {step} of other questions, another task or other "
                "options: remove what it made, or name another folder with -o"
            )
        write_whole(self.path, json.dumps({**plan, step: wanted}, indent=1).encode())


def _identity(questions: Path, task: Task) -> dict[str, Any]:
    """What identifies a training, besides its options."""
    with questions.open("rb") as file:  # lint has read it
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"task": task.to_dict(), "questions": digest}


def _task(
    questions: Path,
    named: str | os.PathLike[str] | None,
    work: Path,
    announce: Callable[[str], None],
) -> Task:
    """The given task, the one beside the questions, or one made from their labels."""
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

    (work / EVALUATION).unlink(missing_ok=True)  # it belonged to another bundle
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
    """Set the threshold, if requested, and evaluate; the evaluation is stored."""
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
