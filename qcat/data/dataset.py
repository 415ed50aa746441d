"""Reads labelled questions from JSONL, CSV or Parquet, by the file's suffix, for all commands.

A row has `text` and `label`, and may have `group`: the name of a family of paraphrases that must
stay on one side of a split. Rows of Alpaca-style data (`instruction`, `input`, `output`) are
accepted too: the input, or the instruction if there is no input, is the text; the output is the
label.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qcat.data.columns import find_column, missing
from qcat.data.csv_rows import csv_columns, csv_note, csv_rows
from qcat.data.json_faults import shape_fault
from qcat.data.json_rows import json_note, json_rows
from qcat.data.opened import FORMATS, FoundRow
from qcat.data.parquet import class_names, parquet_file
from qcat.encoding.prompt import clean_question
from qcat.errors import DataError, QuestionError
from qcat.task import Task

_COLUMNS = ("text", "label", "group", "instruction", "input", "output", "label_text")
_LABELLED = ("text", "label")


@dataclass(frozen=True)
class Row:
    """A row as read from a file; only its types are checked."""

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
    """Read a `.csv`, `.tsv`, `.parquet` or (any other suffix) JSON file, including bad rows.

    CSV has a header line with the names of the columns. The names may differ in case and outer
    spaces. Empty rows of CSV are skipped.

    Raises:
        DataError: the file as a whole cannot be read or has no rows; names the file.
    """
    rows = [
        BadRow(line, fields) if isinstance(fields, str) else _row(fields, line)
        for line, fields in _found(path, _LABELLED)
    ]
    if not rows:
        raise DataError(f"{path}: no questions in it: write a row for each")
    return rows


def reading_notes(path: Path) -> list[str]:
    """What was guessed to read a file: separators, the form of JSON, names in another case.

    Raises:
        DataError: the file cannot be read.
    """
    kind = FORMATS.get(path.suffix.lower(), ".jsonl")
    if kind == ".parquet":
        with parquet_file(path) as file:
            note, columns = None, file.schema_arrow.names
    elif kind == ".csv":
        note, columns = csv_note(path), csv_columns(path)
    else:
        rows = json_rows(path, "")
        first = next((fields for _, fields in rows if isinstance(fields, dict)), {})
        note, columns = json_note(path), list(first)
    try:
        meant = _meant(tuple(columns))
    except DataError:  # `scan_rows` reports it for the first row
        meant = {}
    renamed = [f"{name!r} read as {wanted!r}" for wanted, name in meant.items() if name != wanted]
    return [*([note] if note else []), *(["column " + ", ".join(renamed)] if renamed else [])]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file like `scan_rows`, but fail at the first bad one.

    Raises:
        DataError: a row is bad; names the file and line.
    """
    rows = []
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            raise DataError(f"{path}:{row.line}: {row.problem}")
        rows.append(row)
    return rows


def read_examples(path: Path, task: Task) -> list[Example]:
    """Read labelled questions for a task, in any of the formats of `read_rows`.

    A label may be spelled differently from the task's, as `Task.spelled` allows.

    Raises:
        DataError: a row has no text, or a label that the task lacks; names the file and line.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    examples = []
    for row in read_rows(path):
        where = f"{path}:{row.line}"
        label = task.spelled(row.label)
        if label is None:
            raise DataError(
                f"{where}: label {row.label!r} is not in the task: add it or mend the row"
            )
        try:
            text = clean_question(row.text)
        except QuestionError as error:
            raise DataError(f"{where}: {error}") from None
        examples.append(Example(text, numbers[label], row.line, row.group))
    return examples


def read_texts(path: Path) -> list[str]:
    """Read questions whose label does not matter, in any of the formats of `read_rows`, cleaned
    by `clean_question`.

    Raises:
        DataError: a row is bad; names the file and line.
    """
    texts = []
    for line, fields in _found(path, ("text",)):
        problem = fields if isinstance(fields, str) else _no_text(fields, "text")
        if problem or isinstance(fields, str):
            raise DataError(f"{path}:{line}: {problem}")
        try:
            texts.append(clean_question(fields["text"]))
        except QuestionError as error:
            raise DataError(f"{path}:{line}: {error}") from None
    if not texts:
        raise DataError(f"{path}: no questions in it: write a row for each")
    return texts


def jsonl_line(text: str, label: str, group: str | None) -> bytes:
    """A labelled question as a line of JSONL for `read_rows`."""
    fields = {"text": text, "label": label} | ({} if group is None else {"group": group})
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a label or group can only be escaped
        return json.dumps(fields).encode() + b"\n"


def _row(fields: Mapping[str, Any], line: int) -> Row | BadRow:
    if "output" in fields and "label" not in fields:  # Alpaca's names
        given = fields.get("input") or fields.get("instruction")
        fields = {**fields, "text": given, "label": fields["output"]}
    label, words = fields.get("label"), fields.get("label_text")
    numbered = type(label) is int or (isinstance(label, str) and label.strip().isdecimal())
    if numbered and isinstance(words, str) and words.strip():
        said = f"the label is the number {label}, its name stands under 'label_text': rename"
        return BadRow(line, f"{said} that to 'label', and leave the numbers out")
    for key in _LABELLED:
        if problem := _no_text(fields, key):
            return BadRow(line, problem)
    group = fields.get("group")
    if isinstance(group, float) and group.is_integer():
        group = int(group)  # pandas stores a column of numbers with gaps in this way
    if group is not None and not isinstance(group, str | int):
        return BadRow(line, "the group must be a text or a whole number")
    name = "" if group is None else _name(str(group))
    return Row(fields["text"], _name(fields["label"]), name or None, line)


def _no_text(fields: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with a value that should be text. A number is not text: `1` could be a label's
    name or its index in a list that is not available."""
    if key not in fields:
        return f"no text under {key!r}"
    value = fields[key]
    kind = type(value).__name__
    if isinstance(value, str):
        return None
    if value is None or value != value:
        return f"no text under {key!r} but {'null' if value is None else 'NaN'}: write words"
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    plain = isinstance(value, bool | int | float | list | dict)
    shown = json.dumps(value, default=str) if plain else json.dumps(str(value))[1:-1]
    shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
    if isinstance(value, list | dict):
        return f"no text under {key!r} but {shown}: write one text"
    return f'no text under {key!r} but {kind} {shown}: write it as text, "{shown}"'


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


# Rows under qcat's own column names


def _found(path: Path, wanted: tuple[str, ...]) -> Iterator[FoundRow]:
    """Rows by `_COLUMNS`, whatever the case of the names in the file.

    Raises:
        DataError: as `scan_rows`; or a CSV or Parquet file lacks the columns wanted.
    """
    kind = FORMATS.get(path.suffix.lower(), ".jsonl")
    if kind == ".csv":
        return _csv(path, wanted)
    return _parquet(path, wanted) if kind == ".parquet" else _json(path, wanted)


def _json(path: Path, wanted: tuple[str, ...]) -> Iterator[FoundRow]:
    shape = "{" + ", ".join(f'"{name}": …' for name in wanted) + "}"
    for line, fields in json_rows(path, shape):
        if isinstance(fields, str):
            yield line, fields
            continue
        try:
            meant = _meant(tuple(fields))
        except DataError as error:
            yield line, str(error)
            continue
        absent = _absent(meant, wanted)
        named = [key for name, key in meant.items() if name in wanted]
        if fault := shape_fault(fields, named, absent, shape):
            yield line, fault
        elif absent:
            yield line, missing(absent, tuple(fields), "key")
        else:
            yield line, {name: fields[key] for name, key in meant.items()}


def _csv(path: Path, wanted: tuple[str, ...]) -> Iterator[FoundRow]:
    columns = csv_columns(path)
    if not columns:
        raise DataError(f"{path}:1: is empty: write a header line with {' and '.join(wanted)}")
    meant = _columns(f"{path}:1", columns, wanted, "the header line has ")
    for line, fields in csv_rows(path):
        if isinstance(fields, str):
            yield line, fields
        elif any(fields.values()) or len(fields) == 1:
            yield line, {name: fields[key] for name, key in meant.items() if key in fields}


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[FoundRow]:
    with parquet_file(path) as file:
        schema = file.schema_arrow
        meant = _columns(str(path), schema.names, wanted)
        rows = file.read(columns=list(meant.values())).to_pylist()
    classes = class_names(schema).get(meant.get("label", ""), [])
    for line, row in enumerate(rows, 1):
        fields = {name: row[key] for name, key in meant.items()}
        number = fields.get("label")
        if classes and "label" in wanted and type(number) is int:
            if not 0 <= number < len(classes):
                yield line, f"a row without a label ({number} in a ClassLabel column): leave it out"
                continue
            fields["label"] = classes[number]
        yield line, fields


def _columns(
    place: str, columns: list[str], wanted: tuple[str, ...], holder: str = ""
) -> Mapping[str, str]:
    try:
        meant = _meant(tuple(columns))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if absent := _absent(meant, wanted):
        raise DataError(f"{place}: {holder}{missing(absent, columns)}")
    return meant


@lru_cache(256)
def _meant(columns: tuple[str, ...]) -> Mapping[str, str]:
    """Our own names of columns to those in the file. Raises DataError: two are meant by one."""
    found = {name: find_column(columns, name) for name in _COLUMNS}
    return {name: column for name, column in found.items() if column is not None}


def _absent(meant: Mapping[str, str], wanted: tuple[str, ...]) -> list[str]:
    if wanted == _LABELLED and "output" in meant and "label" not in meant:
        return []
    return [name for name in wanted if name not in meant]
