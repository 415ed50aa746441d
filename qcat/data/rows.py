"""Rows of CSV, JSONL and Parquet files, one at a time; bad ones are reported, not raised.

A row comes as a pair: where it begins in its file (the line, from 1), and its fields by column; or,
of a row that cannot be read, what is wrong with it. pyarrow is loaded for Parquet alone.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qcat.errors import DataError

FoundRow = tuple[int, dict[str, Any] | str]
"""Line and fields; or, of a bad row, what is wrong with it."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of such a byte
_SAY_NOT_UTF8 = "not UTF-8: save the file as UTF-8"
_LONGEST = 1 << 26  # characters of a field of CSV


def jsonl_rows(path: Path, shape: str) -> Iterator[FoundRow]:
    """The objects of a JSONL file; blank lines are passed over.

    Args:
        path: of the file.
        shape: what a line should look like, for messages.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    with _opened_text(path) as file:
        for line, data in enumerate(file, 1):
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError:
                yield line, _SAY_NOT_UTF8
                continue
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield line, f"not a JSON object: {error}"
                continue
            yield line, fields if isinstance(fields, dict) else f"{shape} expected"


def csv_columns(path: Path) -> list[str]:
    """The names in the header line of a CSV file; none if the file is empty.

    Raises:
        DataError: the file cannot be read, or the line is not CSV.
    """
    with _csv_reader(path) as reader:
        return _header(path, reader)


def csv_rows(path: Path) -> Iterator[FoundRow]:
    """The rows of a CSV file under its header line.

    A row with fewer fields than there are columns lacks the last ones. Blank lines are passed over,
    except that under one column such a line is an empty text; those that end the file are none.

    Raises:
        DataError: the file as a whole cannot be read, or its header line is not CSV.
    """
    with _csv_reader(path) as reader:
        columns = _header(path, reader)
        blank: list[int] = []  # lines that are rows if one comes after them
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:  # the reader goes on with the next line
                yield from _empty_rows(columns, blank)
                yield line, f"not CSV: {error}"
                continue
            if cells is None:
                return
            if not cells:
                if len(columns) == 1:
                    blank.append(line)
                continue
            yield from _empty_rows(columns, blank)
            if any(map(_NOT_UTF8.search, cells)):
                yield line, _SAY_NOT_UTF8
            elif len(cells) > len(columns):
                yield line, "more fields than columns: quote a text with commas"
            else:
                yield line, dict(zip(columns, cells, strict=False))


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that reads a little at a time.

    Raises:
        DataError: the file cannot be read, or is no Parquet; also for what is raised within.
    """
    import pyarrow
    import pyarrow.parquet

    with _opened(path) as file:
        try:
            # Without a buffer a whole column of a row group would be read at once.
            yield pyarrow.parquet.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False)
        except (pyarrow.ArrowException, ValueError) as error:
            reason = (str(error).splitlines() or ["it is damaged"])[0]
            raise DataError(f"{path}: not a Parquet file: {reason}") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read, its errors in words of ours."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name") from None
    with file:
        try:
            yield file
        except OSError as error:
            reason = error.strerror or "it is damaged"
            raise DataError(f"{path}: cannot be read: {reason}") from None


@contextmanager
def _opened_text(path: Path) -> Iterator[IO[bytes]]:
    with _opened(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: not UTF-8 but UTF-16: save it as UTF-8")
        file.seek(0)
        yield file


@contextmanager
def _csv_reader(path: Path) -> Iterator[Any]:
    # Python's limit is 131,072, for the whole process; a mail may be longer. There must be one: a
    # quote left open makes all that follows one field.
    csv.field_size_limit(_LONGEST)
    # Bytes that are no UTF-8 are left for `_NOT_UTF8` to find in their row.
    with (
        _opened_text(path) as file,
        io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        yield csv.reader(text, strict=True)


def _header(path: Path, reader: Any) -> list[str]:
    names: list[str] = []
    line = 1
    try:
        for names in reader:
            if names:
                break
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from None
    if any(map(_NOT_UTF8.search, names)):
        raise DataError(f"{path}:{line}: {_SAY_NOT_UTF8}")
    return names


def _empty_rows(columns: list[str], lines: list[int]) -> Iterator[FoundRow]:
    """What blank lines under one column stand for; they are taken off the list."""
    yield from ((line, {columns[0]: ""}) for line in lines)
    lines.clear()
