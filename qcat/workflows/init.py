"""Makes a task from labelled questions: their labels, the most frequent first."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qcat.data.dataset import read_rows
from qcat.errors import DataError, TaskError
from qcat.shell import quoted
from qcat.spelling import fold
from qcat.task import DEFAULT_INSTRUCTION, Task


@dataclass(frozen=True)
class Initialized:
    """A task made from a file of questions."""

    task: Task
    counts: dict[str, int]
    """Questions of each label, in the order of the task."""
    respelled: dict[str, str]
    """Spellings in the file that differ from the task's in case or spaces only, and the task's."""


def init_task(
    questions: Path, *, name: str | None = None, instruction: str = DEFAULT_INSTRUCTION
) -> Initialized:
    """Make a task from the labels in a file.

    Args:
        questions: labelled questions, JSONL, CSV or Parquet.
        name: name of the task; None for the file's name.
        instruction: the first lines of the prompt.

    Raises:
        DataError: the file cannot be read.
        TaskError: its labels do not form a valid task.
    """
    spellings: dict[str, Counter[str]] = {}
    for row in read_rows(questions):
        spellings.setdefault(fold(row.label), Counter())[row.label] += 1
    by_size = sorted(spellings.values(), key=lambda found: -found.total())
    chosen = {found.most_common(1)[0][0]: found for found in by_size}
    try:
        task = Task(name or task_name(questions), dict.fromkeys(chosen, ""), instruction)
    except TaskError as error:
        raise TaskError(f"{questions}: {error}") from None
    return Initialized(
        task,
        {label: found.total() for label, found in chosen.items()},
        {other: label for label, found in chosen.items() for other in found if other != label},
    )


def write_task(task: Task, path: Path) -> None:
    """Write a new task.toml. Raises DataError if the file exists or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(task.to_toml())
    except FileExistsError:
        raise DataError(f"{path}: exists already: remove it or name another with -o") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}: choose another") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name: choose another") from None


def task_name(questions: Path) -> str:
    """A name that is valid for files and models, derived from that of a file of questions."""
    plain = unicodedata.normalize("NFKD", questions.stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-._")
    return name[:64] or "task"


def find_task(questions: Path, named: Path | None) -> Path:
    """The task for a file of questions: the given one, or task.toml beside the file.

    Raises:
        TaskError: none is given and there is none beside the file.
    """
    if not questions.name:
        raise TaskError(f"{questions}: is no file of questions: name one")
    path = named or questions.with_name("task.toml")
    if named is None and not path.is_file():
        raise TaskError(
            f"{path}: no such file: make one with `qcat init {quoted(questions)}`, or name a "
            "task with -t"
        )
    return path
