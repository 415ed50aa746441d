"""Labelled questions from a file, one JSON object a line: `{"text": …, "label": …}`."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qcat.errors import DataError, QuestionError
from qcat.prompt import clean_question
from qcat.task import Task


@dataclass(frozen=True)
class Example:
    """A question and its right label."""

    text: str
    """As `clean_question` gives it."""
    label: int
    """Index among the task's labels."""
    line: int
    """Where it stands in its file, from 1."""


def read_examples(path: Path, task: Task) -> list[Example]:
    """Read a JSONL file of labelled questions for a task; other keys are ignored.

    Raises:
        DataError: naming the file and line, for anything that is not such a row.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    numbers = {label: number for number, label in enumerate(task.labels)}
    examples = [
        _example(line, f"{path}:{number}", number, numbers)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f'{path}: no questions: write {{"text": …, "label": …}}, one a line')
    return examples


def _example(line: str, where: str, number: int, labels: dict[str, int]) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: {{"text": …, "label": …}} expected')
    for key in ("text", "label"):
        if not isinstance(row.get(key), str):
            raise DataError(f"{where}: no text under {key!r}")
    label = unicodedata.normalize("NFC", row["label"]).strip()
    if label not in labels:
        raise DataError(f"{where}: label {label!r} is not in the task: add it or mend the row")
    try:
        return Example(clean_question(row["text"]), labels[label], number)
    except QuestionError as error:
        raise DataError(f"{where}: {error}") from None
