"""Options of commands that can answer another task than the one in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qcat.classifier import Classifier
from qcat.task import Task


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--task and --label, which `asked_task` makes a task of."""
    task = click.option(
        "-t",
        "--task",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A task.toml to answer, instead of the task in the model. MODEL may then be any GGUF "
        "of a generative model. If the model was trained on these labels and others, it answers "
        "among these; else it answers untrained, which is far less accurate.",
    )
    label = click.option(
        "-l",
        "--label",
        "labels",
        multiple=True,
        metavar="LABEL",
        help="As --task, with these labels alone; name it once for each.",
    )
    return task(label(command))


def asked_task(file: Path | None, labels: tuple[str, ...], served: bool) -> Task | None:
    """The task that the options name; None for the model's own.

    Raises:
        TaskError: it cannot be used.
    """
    if file and labels:
        raise click.UsageError("--task and --label both name labels: give one of them")
    if served and (file or labels):
        raise click.UsageError("--task and --label are for a file: a served model has its task")
    if file:
        return Task.read(file)
    return Task.of_labels(labels) if labels else None


def note_untrained(classifier: Classifier) -> None:
    """Say it if the model answers without training."""
    if not classifier.trained:
        click.echo(
            "qcat: note: the model was not trained on these labels, and its confidence is not "
            "calibrated",
            err=True,
        )
