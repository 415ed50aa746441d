"""Tables of any length (CSV, JSONL or Parquet by suffix), read by row and written with new columns.

Columns keep their order and type as far as the output format allows. Text stays text. CSV contains
only text: other values are written as JSON (`true`, `1.5`, `["a"]`), missing values as empty cells.
In JSONL a row keeps its keys. A column of JSONL gets a type in Parquet if all its values have that
type; otherwise it is text, in which other values are JSON. Dates, times
and decimals of Parquet become text elsewhere. NaN and the infinities are `nan`, `inf` and `-inf` in
CSV; JSON has no form for them, so there they are null.

Independent of questions. pyarrow is loaded only for Parquet.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from qcat.data.columns import check_names
from qcat.data.csv_rows import csv_columns, csv_rows
from qcat.data.json_rows import json_rows
from qcat.data.opened import FORMATS
from qcat.data.parquet import parquet_file
from qcat.data.values import (
    arrow_type,
    cell,
    common_kind,
    fitting,
    has_form,
    json_kind,
    json_text,
    plain,
)
from qcat.errors import DataError

Kind = Literal["text", "bool", "whole", "real"]
"""What the values of a column of ours are."""
Values = Sequence[str | bool | float | None]
"""A row of such columns."""
SUFFIXES = (".csv", ".jsonl", ".parquet")
_BATCH = 2048  # rows of Parquet that are in memory at once


class Table(ABC):
    """A table in a file that was read once to check it: each row can be read again, and written."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        """Their names, in order."""
        self.count = 0
        """Rows."""
        check_names(str(path), self.columns)

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row's values by column, as JSON values.

        Raises:
            DataError: a row cannot be read; names the file and the line.
        """

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """All rows as `pyarrow.RecordBatch`es of one schema. Raises as `rows` does."""

    def values(self, column: str) -> Iterator[Any]:
        """A column's values; None if missing. Raises as `rows` does."""
        return (row.get(column) for row in self.rows())


def open_table(path: Path, target: str) -> Table:
    """Read a table completely once, so that nothing in it fails later.

    Args:
        path: path of the file.
        target: the one of the `SUFFIXES` for the output.

    Raises:
        DataError: no such suffix; the file cannot be read; a row in it cannot be read (naming its
            line), there is none, or two columns have one name; or a column of Parquet has values
            that the target's format has no form for.
    """
    kind = format_read(path)
    as_parquet = target == ".parquet"
    if as_parquet:
        import pyarrow  # noqa: F401 (its absence is reported before the work)
    table: Table
    if kind == ".csv":
        table = _CsvTable(path)
    elif kind == ".jsonl":
        table = _JsonlTable(path)
    else:
        table = _ParquetTable(path, as_parquet)
    if not table.count:
        raise DataError(f"{path}: no rows in it")
    return table


def write_table(
    table: Table, file: IO[bytes], kind: str, names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    """Write a table with further columns after its own.

    Args:
        table: the table.
        file: file to write to.
        kind: one of `SUFFIXES`.
        names: names of the new columns, with their types. The table must not have these columns.
        more: their values, one item per row of the table.

    Raises:
        DataError: as for `Table.rows`.
        OSError: the file cannot be written.
        ValueError, TypeError: not as many values as rows, or the table's file was changed since it
            was opened. Pyarrow's errors are such.
    """
    if kind == ".csv":
        _write_csv(table, file, names, more)
    elif kind == ".jsonl":
        _write_jsonl(table, file, names, more)
    else:
        _write_parquet(table, file, names, more)


def format_read(path: Path) -> str:
    """Which of the `SUFFIXES` a file to read is like. Raises DataError for none."""
    return _format(path, FORMATS)


def format_written(path: Path) -> str:
    """Which of the `SUFFIXES` a file to write has. Raises DataError for any other."""
    return _format(path, SUFFIXES)


def _format(path: Path, known: Collection[str]) -> str:
    found = path.suffix.lower()
    if found not in known:
        raise DataError(
            f"{path}: CSV, JSONL or Parquet expected: name a file that ends in one of "
            f"{', '.join(known)}"
        )
    return FORMATS[found]


class _CsvTable(Table):
    def __init__(self, path: Path) -> None:
        super().__init__(path, csv_columns(path))
        self.count = sum(1 for _ in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        for line, fields in csv_rows(self.path):
            if isinstance(fields, str):
                raise DataError(f"{self.path}:{line}: {fields}")
            if len(fields) < len(self.columns):
                raise DataError(
                    f"{self.path}:{line}: fewer fields than columns: {len(fields)}, not "
                    f"{len(self.columns)}"
                )
            yield fields

    def batches(self) -> Iterator[Any]:
        return _record_batches(self.rows(), dict.fromkeys(self.columns, "text"))


class _JsonlTable(Table):
    def __init__(self, path: Path) -> None:
        super().__init__(path, ())
        seen: dict[str, set[str]] = {}
        for row in self.rows():
            self.count += 1
            for name, value in row.items():
                seen.setdefault(name, set()).add(json_kind(value))
        check_names(str(path), tuple(seen))
        self.columns = tuple(seen)
        self._kinds = {name: common_kind(kinds) for name, kinds in seen.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        for line, fields in json_rows(self.path, "an object, {…},"):
            if isinstance(fields, str):
                raise DataError(f"{self.path}:{line}: {fields}")
            yield fields

    def batches(self) -> Iterator[Any]:
        return _record_batches(self.rows(), self._kinds)


class _ParquetTable(Table):
    def __init__(self, path: Path, as_parquet: bool) -> None:
        import pyarrow

        with parquet_file(path) as file:
            schema = file.schema_arrow
        super().__init__(path, schema.names)
        if not as_parquet:
            for field in schema:
                if not has_form(field.type):
                    raise DataError(
                        f"{path}: column {field.name!r} is of type {field.type}, which CSV and "
                        "JSONL have no form for: write Parquet, or leave it out"
                    )
        for batch in self.batches():
            try:
                batch.validate(full=True)
                if not as_parquet:
                    plain(batch)
            except pyarrow.ArrowException as error:
                reason = str(error).splitlines()[0]
                rows = f"rows {self.count + 1} to {self.count + batch.num_rows}"
                raise DataError(f"{path}: {rows}: {reason}") from None
            self.count += batch.num_rows

    def rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches():
            yield from plain(batch).to_pylist()

    def batches(self) -> Iterator[Any]:
        yield from self._read(None)

    def values(self, column: str) -> Iterator[Any]:
        for batch in self._read([column]):
            yield from batch.column(column).to_pylist()

    def _read(self, columns: list[str] | None) -> Iterator[Any]:
        with parquet_file(self.path) as file:
            yield from file.iter_batches(_BATCH, columns=columns, use_threads=False)


def _write_csv(
    table: Table, file: IO[bytes], names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    lines = _Lines(file)
    unquoted = csv.writer(lines, lineterminator="\n")
    # Python before 3.13 leaves a carriage return unquoted, where readers end the row.
    quoted = csv.writer(lines, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(cells: list[str]) -> None:
        (quoted if any("\r" in text for text in cells) else unquoted).writerow(cells)

    write([*table.columns, *names])
    for row, values in zip(table.rows(), more, strict=True):
        write([*(cell(row.get(name)) for name in table.columns), *map(cell, values)])


class _Lines:
    """A target for the csv module that encodes as UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


def _write_jsonl(
    table: Table, file: IO[bytes], names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    for row, values in zip(table.rows(), more, strict=True):
        row.update(zip(names, values, strict=True))
        file.write(json_text(row).encode() + b"\n")


def _write_parquet(
    table: Table, file: IO[bytes], names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    import pyarrow.parquet

    further = iter(more)
    types = [arrow_type(kind) for kind in names.values()]
    writer = None
    try:
        for batch in table.batches():
            columns = zip(*islice(further, batch.num_rows), strict=True)
            for name, type_, values in zip(names, types, columns, strict=True):
                batch = batch.append_column(name, pyarrow.array(values, type_))
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(file, batch.schema)
            writer.write_batch(batch)
        if next(further, None) is not None:
            raise ValueError("more values than rows")
    finally:
        if writer is not None:
            writer.close()


def _record_batches(rows: Iterator[dict[str, Any]], kinds: Mapping[str, str]) -> Iterator[Any]:
    """Rows of JSON's values as record batches."""
    import pyarrow

    schema = pyarrow.schema([(name, arrow_type(kind)) for name, kind in kinds.items()])
    while some := list(islice(rows, _BATCH)):
        columns = [
            pyarrow.array([fitting(row.get(name), kind) for row in some], field.type)
            for (name, kind), field in zip(kinds.items(), schema, strict=True)
        ]
        yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)
