"""Labelled questions from a file: JSONL, CSV or Parquet, by the file's suffix.

A row has `text` and `label`, and may have `group`: the name of a family of paraphrases that must
stay on one side of a split. Rows as Alpaca-style sets have them (`instruction`, `input`, `output`)
are taken too: the input, or the instruction where there is none, is the text; the output the label.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qcat.data.rows import csv_columns, csv_rows, jsonl_rows, parquet_file
from qcat.encoding.prompt import clean_question
from qcat.errors import DataError, QuestionError
from qcat.task import Task

_COLUMNS = ["text", "label", "group", "instruction", "input", "output"]


@dataclass(frozen=True)
class Row:
    """A row as it stands in a file, nothing checked but its types."""

    text: str
    label: str
    """NFC, stripped."""
    group: str | None
    line: int
    """Where it begins in its file, from 1; in Parquet the row, from 1."""


class BadRow(NamedTuple):
    """A row that cannot be read."""

    line: int
    """As in `Row`."""
    problem: str
    """What is wrong with it, without the place."""


@dataclass(frozen=True)
class Example:
    """A question and its right label."""

    text: str
    """As `clean_question` gives it."""
    label: int
    """Index among the task's labels."""
    line: int = 0
    """Where it stands in its file, from 1; 0 if it is out of none."""
    group: str | None = None
    """The family of paraphrases it belongs to, if the file names one."""


def scan_rows(path: Path) -> list[Row | BadRow]:
    """Read a JSONL (any suffix but the following), `.csv` or `.parquet` file, bad rows and all.

    CSV has a header line with the names of the columns.

    Raises:
        DataError: naming the file, if it cannot be read as a whole or holds no rows.
    """
    found = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _jsonl)
    rows = [
        BadRow(line, fields) if isinstance(fields, str) else _row(fields, line)
        for line, fields in found(path)
    ]
    if not rows:
        raise DataError(f'{path}: no questions: write {{"text": …, "label": …}}, one a line')
    return rows


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file as `scan_rows` does, and stop at the first bad one.

    Raises:
        DataError: naming the file and line, for anything that is not such a row.
    """
    rows = []
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            raise DataError(f"{path}:{row.line}: {row.problem}")
        rows.append(row)
    return rows


def read_examples(path: Path, task: Task) -> list[Example]:
    """Read labelled questions for a task, in any of the formats of `read_rows`.

    Raises:
        DataError: naming the file and line, for a row that cannot be used: no text, a label that
            the task lacks.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    examples = []
    for row in read_rows(path):
        where = f"{path}:{row.line}"
        if row.label not in numbers:
            raise DataError(
                f"{where}: label {row.label!r} is not in the task: add it or mend the row"
            )
        try:
            text = clean_question(row.text)
        except QuestionError as error:
            raise DataError(f"{where}: {error}") from None
        examples.append(Example(text, numbers[row.label], row.line, row.group))
    return examples


def read_texts(path: Path) -> list[str]:
    """Read questions without a label: JSONL with `text`, as `clean_question` gives them.

    Raises:
        DataError: naming the file and line, for anything that is not such a row.
    """
    shape = '{"text": …}'
    texts = []
    for line, fields in jsonl_rows(path, shape):
        if isinstance(fields, str):
            raise DataError(f"{path}:{line}: {fields}")
        if not isinstance(fields.get("text"), str):
            raise DataError(f"{path}:{line}: {shape} expected")
        try:
            texts.append(clean_question(fields["text"]))
        except QuestionError as error:
            raise DataError(f"{path}:{line}: {error}") from None
    if not texts:
        raise DataError(f"{path}: no questions: write {shape}, one a line")
    return texts


def jsonl_line(text: str, label: str, group: str | None) -> bytes:
    """A labelled question as a line of JSONL, such as `read_rows` takes."""
    fields = {"text": text, "label": label} | ({} if group is None else {"group": group})
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a label or group can only be escaped
        return json.dumps(fields).encode() + b"\n"


def _row(fields: Mapping[str, Any], line: int) -> Row | BadRow:
    if "output" in fields and "label" not in fields:  # Alpaca's names
        given = fields.get("input") or fields.get("instruction")
        fields = {**fields, "text": given, "label": fields["output"]}
    for key in ("text", "label"):
        value = fields.get(key)
        if value is None:
            return BadRow(line, f"no text under {key!r}")
        if not isinstance(value, str):
            return BadRow(line, f"no text under {key!r} but {type(value).__name__}: write words")
    group = fields.get("group")
    if isinstance(group, float) and group.is_integer():
        group = int(group)  # pandas stores a column of numbers with gaps so
    if group is not None and not isinstance(group, str | int):
        return BadRow(line, "the group must be a text or a whole number")
    name = "" if group is None else _name(str(group))
    return Row(fields["text"], _name(fields["label"]), name or None, line)


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


_Found = Iterator[tuple[int, Mapping[str, Any] | str]]
"""Line and fields; or, of a bad row, what is wrong with it."""


def _jsonl(path: Path) -> _Found:
    return jsonl_rows(path, '{"text": …, "label": …}')


def _csv(path: Path) -> _Found:
    _check_columns(f"{path}:1: no header line", csv_columns(path))
    return csv_rows(path)


def _parquet(path: Path) -> _Found:
    with parquet_file(path) as file:
        _check_columns(f"{path}: no table", file.schema_arrow.names)
        rows = file.read(columns=_COLUMNS).to_pylist()
    yield from enumerate(rows, 1)


def _check_columns(what: str, columns: Collection[str]) -> None:
    if not {"text", "label"} <= set(columns) and "output" not in columns:
        raise DataError(f"{what} with the columns text and label")
