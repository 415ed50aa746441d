"""Rows of CSV files, one at a time; bad ones are reported, not raised.

Columns are separated by commas, in a `.tsv` file by tabs. Where the header line has none of these,
by the semicolons or tabs that it has; and by what Excel's first line `sep=;` says.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qcat.data.columns import check_names
from qcat.data.opened import FoundRow, badly_encoded, opened_text
from qcat.errors import DataError

_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SEP_LINE = re.compile(r'"?sep=([;,|:\t])"?[;,\t]*\s*', re.IGNORECASE)
_LONGEST = 1 << 26  # characters of a field


class _Layout(NamedTuple):
    separator: str
    skipped: int
    """Lines before the header line."""
    guessed: bool
    """Whether the separator follows from the header line alone."""


def csv_columns(path: Path) -> list[str]:
    """The names in the header line of a CSV file; none if the file is empty.

    Unnamed columns at the end are none: spreadsheets write such.

    Raises:
        DataError: the file cannot be read, or the line is not CSV or has a name twice.
    """
    with _csv_reader(path) as (reader, layout):
        return _header(path, reader, layout)


def csv_note(path: Path) -> str | None:
    """What was guessed to read the file. Raises as `csv_columns`."""
    layout = _layout(path)
    if layout.guessed or layout.skipped:
        return f"read as columns separated by {_named(layout.separator)}"
    return None


def csv_rows(path: Path) -> Iterator[FoundRow]:
    """The rows of a CSV file under its header line.

    A row with fewer fields than there are columns lacks the last ones. Blank lines are passed over,
    except that under one column such a line is an empty text; those that end the file are none.

    Raises:
        DataError: the file as a whole cannot be read, or its header line as for `csv_columns`.
    """
    with _csv_reader(path) as (reader, layout):
        columns = _header(path, reader, layout)
        blank: list[int] = []  # lines that are rows if one comes after them
        while True:
            line = layout.skipped + reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:  # the reader goes on with the next line
                yield from _empty_rows(columns, blank)
                yield line, _fault(error)
                continue
            if cells is None:
                return
            if not cells:
                if len(columns) == 1:
                    blank.append(line)
                continue
            yield from _empty_rows(columns, blank)
            if problem := next(filter(None, map(badly_encoded, cells)), None):
                yield line, problem
            elif any(cells[len(columns) :]):
                yield (
                    line,
                    f"more fields than columns: quote a text with {_named(layout.separator)}",
                )
            else:
                yield line, dict(zip(columns, cells, strict=False))


@contextmanager
def _csv_reader(path: Path) -> Iterator[tuple[Any, _Layout]]:
    # Python's limit is 131,072, for the whole process; a mail may be longer. There must be one: a
    # quote left open makes all that follows one field.
    csv.field_size_limit(_LONGEST)
    layout = _layout(path)
    with opened_text(path, newline="") as text:
        for _ in range(layout.skipped):
            next(text)
        yield csv.reader(text, delimiter=layout.separator, strict=True), layout


def _layout(path: Path) -> _Layout:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with opened_text(path, newline="") as text:
        first = ""
        for number, line in enumerate(text, 1):
            if not line.strip("\r\n"):
                continue
            if not first and (said := _SEP_LINE.fullmatch(line)):
                return _Layout(said[1], number, False)
            first = line
            break
    if _width(first, usual) == 1:
        others = [other for other in _NAMES if _width(first, other) > 1]
        if len(others) == 1:
            return _Layout(others[0], 0, True)
    return _Layout(usual, 0, False)


def _width(line: str, separator: str) -> int:
    """How many columns a header line has."""
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:  # a name longer than `_LONGEST`
        return 1


def _named(separator: str) -> str:
    return _NAMES.get(separator, repr(separator))


def _fault(error: csv.Error) -> str:
    said = str(error)
    if "expected after" in said:
        said = 'a quote within a quoted text: write it twice, ""'
    elif "end of data" in said:
        said = (
            "the quote that is opened here is never closed: close it, or write it twice in quotes"
        )
    return f"not CSV: {said}"


def _header(path: Path, reader: Any, layout: _Layout) -> list[str]:
    names: list[str] = []
    line = layout.skipped + 1
    try:
        for names in reader:
            if names:
                break
            line = layout.skipped + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: {_fault(error)}") from None
    if problem := next(filter(None, map(badly_encoded, names)), None):
        raise DataError(f"{path}:{line}: {problem}")
    while len(names) > 1 and not names[-1]:
        names.pop()
    check_names(f"{path}:{line}", names)
    return names


def _empty_rows(columns: Sequence[str], lines: list[int]) -> Iterator[FoundRow]:
    """What blank lines under one column stand for; they are taken off the list."""
    yield from ((line, {columns[0]: ""}) for line in lines)
    lines.clear()
