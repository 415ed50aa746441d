"""Rows of CSV files, one at a time; bad ones are reported, not raised.

Columns are separated by commas, or by tabs in a `.tsv` or `.tab` file. If the header line has none
of these, its semicolons or tabs are the separators; Excel's first line `sep=;` is respected. Spaces
after separators are skipped if each name in the header line has one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from qcat.data.columns import check_names
from qcat.data.first_lines import LOOKED_AT, header_fault
from qcat.data.opened import FoundRow, badly_encoded, opened_text
from qcat.errors import DataError

_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SEP_LINE = re.compile(r'"?sep *= *([;,|:\t])"?[;,\t]*\s*', re.IGNORECASE)
_LONGEST = 1 << 26  # characters of a field


class _Layout(NamedTuple):
    separator: str
    skipped: int
    """Lines before the header line."""
    guessed: bool
    """Whether the separator follows from the header line alone."""
    spaced: bool
    """Whether spaces after separators are passed over."""


class _Kept:
    """The lines of a text as read, because the CSV reader does not keep quotes."""

    def __init__(self, text: Iterable[str]) -> None:
        self._lines = iter(text)
        self.row: list[str] = []
        """Those since it was last emptied."""

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.row.append(line)
            yield line


def csv_columns(path: Path) -> list[str]:
    """The names in the header line of a CSV file; empty if the file is empty.

    Unnamed columns at the end, as spreadsheets write them, are ignored.

    Raises:
        DataError: the file cannot be read, or the line is not CSV or has a name twice.
    """
    with _csv_reader(path) as (reader, layout, kept):
        return _header(path, reader, layout, kept)


def csv_separator(path: Path) -> str:
    """The column separator. Raises the errors of `csv_columns`."""
    return _layout(path).separator


def csv_note(path: Path) -> str | None:
    """What was guessed to read the file. Raises the errors of `csv_columns`."""
    layout = _layout(path)
    said = [f"columns separated by {_named(layout.separator)}"]
    if layout.spaced:
        said.append("spaces after the separators passed over")
    if layout.guessed or layout.skipped or layout.spaced:
        return f"read as {', '.join(said)}"
    return None


def csv_rows(path: Path) -> Iterator[FoundRow]:
    """The rows of a CSV file under its header line.

    A row with fewer fields than columns lacks the last ones. Blank lines are skipped, except that
    in a one-column file a blank line is an empty text, unless it is at the end of the file.

    Raises:
        DataError: the file as a whole cannot be read, or its header line as for `csv_columns`.
    """
    with _csv_reader(path) as (reader, layout, kept):
        columns = _header(path, reader, layout, kept)
        blank: list[int] = []  # lines that count as rows if a row follows
        while True:
            line = layout.skipped + reader.line_num + 1
            kept.row.clear()
            try:
                cells = next(reader, None)
            except csv.Error as error:  # the reader goes on with the next line
                yield from _empty_rows(columns, blank)
                yield line, _fault(error, layout, kept)
                continue
            if cells is None:
                return
            if not cells:
                if len(columns) == 1:
                    blank.append(line)
                continue
            yield from _empty_rows(columns, blank)
            problem = _row_problem(cells, columns, layout, kept)
            yield line, problem or dict(zip(columns, cells, strict=False))


def _row_problem(
    cells: Sequence[str], columns: Sequence[str], layout: _Layout, kept: _Kept
) -> str | None:
    if problem := next(filter(None, map(badly_encoded, cells)), None):
        return problem
    again = len(columns) > 1 and cells[1 : len(columns)] == columns[1:]
    if again and cells[0].strip('\ufeff"') == columns[0]:
        return "the header line again, as joined files have it: remove it"
    separator = layout.separator
    for cell in cells[1:]:
        spaces = len(cell) - len(cell.lstrip(" "))
        # As written in the file, and not within quotes
        if spaces and cell[spaces : spaces + 1] == '"':
            opening = separator + cell[: spaces + 1]
            if any(opening in line for line in kept.row):
                return "a space between a separator and a quote: remove it"
    if any(cells[len(columns) :]):
        return f"more fields than columns: quote a text with {_named(separator)}"
    return None


@contextmanager
def _csv_reader(path: Path) -> Iterator[tuple[Any, _Layout, _Kept]]:
    # Python's limit is 131,072, for the whole process; a mail may be longer. There must be one: a
    # quote left open makes all that follows one field.
    csv.field_size_limit(_LONGEST)
    layout = _layout(path)
    with opened_text(path, newline="") as text:
        for _ in range(layout.skipped):
            next(text)
        kept = _Kept(text)
        reader = csv.reader(
            kept, delimiter=layout.separator, strict=True, skipinitialspace=layout.spaced
        )
        yield reader, layout, kept


def _layout(path: Path) -> _Layout:
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    said, skipped, first = None, 0, ""
    with opened_text(path, newline="") as text:
        for number, line in enumerate(text, 1):
            if not line.strip("\r\n"):
                continue
            if not said and (said := _SEP_LINE.fullmatch(line)):
                skipped = number
                continue
            first = line
            break
    separator, guessed = said[1] if said else usual, False
    if not said and len(_names(first, usual)) == 1:
        others = [other for other in _NAMES if len(_names(first, other)) > 1]
        if len(others) == 1:
            separator, guessed = others[0], True
    return _Layout(separator, skipped, guessed, _is_spaced(first, separator))


def _is_spaced(line: str, separator: str) -> bool:
    names = _names(line, separator)[1:]
    if not names or not all(name.startswith(" ") for name in names):
        return False
    try:
        next(csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True))
    except csv.Error:
        return False
    return True


def _names(line: str, separator: str) -> list[str]:
    """The cells of a header line, unchanged."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # a name longer than `_LONGEST`
        return [line]


def _named(separator: str) -> str:
    return _NAMES.get(separator, repr(separator))


def _fault(error: csv.Error, layout: _Layout, kept: _Kept) -> str:
    said = str(error)
    spaced = re.compile(f'" +{re.escape(layout.separator)}')
    if "expected after" in said and any(map(spaced.search, kept.row)):
        said = "a space between a quote and a separator: remove it"
    elif "expected after" in said and any('\\"' in line for line in kept.row):
        said = 'a backslash before a quote: write the quote twice, "" (R: qmethod="double")'
    elif "expected after" in said:
        said = 'a quote within a quoted text: write it twice, ""'
    elif "end of data" in said:
        said = (
            "the quote that is opened here is never closed: close it, or write it twice in quotes"
        )
    return f"not CSV: {said}"


def _header(path: Path, reader: Any, layout: _Layout, kept: _Kept) -> list[str]:
    names: list[str] = []
    line = layout.skipped + 1
    fault = None
    try:
        for names in reader:
            if names:
                break
            line = layout.skipped + reader.line_num + 1
    except csv.Error as error:
        names, fault = [], _fault(error, layout, kept)
    fault = next(filter(None, map(badly_encoded, names)), None) or fault
    fault = header_fault(names, _first_lines(path, layout.skipped)) or fault
    if fault:
        raise DataError(f"{path}:{line}: {fault}")
    width = len(names)
    while len(names) > 1 and not names[-1]:
        names.pop()
    check_names(f"{path}:{line}", names)
    if problem := _unnamed_first(path, width):
        raise DataError(f"{path}:{line}: {problem}")
    return names


def _first_lines(path: Path, skipped: int) -> list[tuple[int, str]]:
    with opened_text(path, newline="") as text:
        lines = ((number, line) for number, line in enumerate(text, 1) if line.strip("\r\n"))
        return list(islice((found for found in lines if found[0] > skipped), LOOKED_AT))


def _unnamed_first(path: Path, width: int) -> str | None:
    """The message if each row has one field more than the header line, as R writes tables."""
    count, numbered, ends = 0, True, ""
    with _csv_reader(path) as (reader, layout, kept):
        header = True
        with suppress(csv.Error):  # a row that is not CSV is reported separately
            for cells in reader:
                kept.row.clear()
                if header:
                    header = not cells
                elif any(cells):
                    if len(cells) != width + 1:
                        return None
                    count += 1
                    numbered = numbered and cells[0].strip().isdecimal()
                    ends = ends or cells[-1]
    said = "each row has one field more than the header line"
    if count and numbered:
        return f"{said}: row names: leave them out, in R write.table(…, row.names=FALSE)"
    if count < 2:
        return None
    other = f"quote each text with {_named(layout.separator)}" if ends else "the empty last field"
    return f"{said}: leave out row names (R: row.names=FALSE), or {other}"


def _empty_rows(columns: Sequence[str], lines: list[int]) -> Iterator[FoundRow]:
    """The rows for blank lines in a one-column file; they are removed from the list."""
    yield from ((line, {columns[0]: ""}) for line in lines)
    lines.clear()
