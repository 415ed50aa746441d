"""Tables of any length, CSV, JSONL or Parquet by suffix: read a row at a time, written with more.

A column comes out as it went in, in order and type, as far as the format written allows. Text
stays text. CSV has nothing but text: what was none is written as JSON (`true`, `1.5`, `["a"]`),
what is missing as nothing. In JSONL a row keeps the keys it has. In Parquet a column of JSONL has a
type if all its values have that one; else it is text, in which what was none is JSON. Dates, times
and decimals of Parquet become text elsewhere. NaN and the infinities are `nan`, `inf` and `-inf` in
CSV; JSON has no form for them, so there they are null.

Knows nothing of questions. pyarrow is loaded for Parquet alone.
"""

from __future__ import annotations

import csv
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from qcat.data.rows import csv_columns, csv_rows, jsonl_rows, parquet_file
from qcat.errors import DataError

Kind = Literal["text", "bool", "whole", "real"]
"""What the values of a column of ours are."""
Values = Sequence[str | bool | float | None]
"""A row of such columns."""
SUFFIXES = (".csv", ".jsonl", ".parquet")
_BATCH = 2048  # rows of Parquet that are in memory at once
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_EXACT = 2**53  # up to here a double has every whole number


class Table(ABC):
    """A table in a file, read through once: each row can be read again, and written."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        """Their names, in order."""
        self.count = 0
        """Rows."""
        check_names(path, self.columns)

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row's values by column, as JSON has them.

        Raises:
            DataError: naming the file and the line, for a row that cannot be read.
        """

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """All rows as `pyarrow.RecordBatch`es of one schema. Raises as `rows` does."""

    def values(self, column: str) -> Iterator[Any]:
        """A column's values, None where there is none. Raises as `rows` does."""
        return (row.get(column) for row in self.rows())


def open_table(path: Path, target: str) -> Table:
    """Read a table through, so that nothing in it fails later.

    Args:
        path: of the file.
        target: as which of the `SUFFIXES` it is to be written.

    Raises:
        DataError: no such suffix; the file cannot be read; a row in it cannot be read (naming its
            line), there is none, or two columns have one name; or a column of Parquet has values
            that the target's format has no form for.
    """
    kind = suffix(path)
    as_parquet = target == ".parquet"
    if as_parquet:
        import pyarrow  # noqa: F401 (its absence is told before the work)
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
        file: where to write.
        kind: one of `SUFFIXES`.
        names: of the further columns, with what their values are. None of them is the table's.
        more: their values, a row of the table each.

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


def suffix(path: Path) -> str:
    """Which of the `SUFFIXES` a file has. Raises DataError for any other."""
    found = path.suffix.lower()
    if found not in SUFFIXES:
        raise DataError(f"{path}: CSV, JSONL or Parquet expected: name a file that ends in so")
    return found


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse names of columns that not every format can have. Raises DataError."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{path}: two columns are called {name!r}: rename one")
        if _SURROGATE.search(name):
            raise DataError(f"{path}: a column's name, {name!r}, is not UTF-8: rename it")
        seen.add(name)


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
                seen.setdefault(name, set()).add(_json_kind(value))
        check_names(path, tuple(seen))
        self.columns = tuple(seen)
        self._kinds = {name: _common(kinds) for name, kinds in seen.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        for line, fields in jsonl_rows(self.path, "an object, {…},"):
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
                if not _has_form(field.type):
                    raise DataError(
                        f"{path}: column {field.name!r} is of type {field.type}, which CSV and "
                        "JSONL have no form for: write Parquet, or leave it out"
                    )
        for batch in self.batches():
            try:
                batch.validate(full=True)
                if not as_parquet:
                    _plain(batch)
            except pyarrow.ArrowException as error:
                reason = str(error).splitlines()[0]
                rows = f"rows {self.count + 1} to {self.count + batch.num_rows}"
                raise DataError(f"{path}: {rows}: {reason}") from None
            self.count += batch.num_rows

    def rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches():
            yield from _plain(batch).to_pylist()

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
    plain = csv.writer(lines, lineterminator="\n")
    # Python before 3.13 leaves a carriage return unquoted, where readers end the row.
    quoted = csv.writer(lines, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(cells: list[str]) -> None:
        (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)

    write([*table.columns, *names])
    for row, values in zip(table.rows(), more, strict=True):
        write([*(_cell(row.get(name)) for name in table.columns), *map(_cell, values)])


class _Lines:
    """What csv writes, as UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


def _write_jsonl(
    table: Table, file: IO[bytes], names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    for row, values in zip(table.rows(), more, strict=True):
        row.update(zip(names, values, strict=True))
        file.write(_json(row).encode() + b"\n")


def _write_parquet(
    table: Table, file: IO[bytes], names: Mapping[str, Kind], more: Iterable[Values]
) -> None:
    import pyarrow.parquet

    further = iter(more)
    types = [_arrow_type(kind) for kind in names.values()]
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


def _cell(value: Any) -> str:
    """A value as CSV has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _utf8(value) if isinstance(value, str) else _json_if_any(value) or ""


def _json_if_any(value: Any) -> str | None:
    """A value's JSON, or None for what is null there."""
    text = _json(value)
    return None if text == "null" else text


def _json(value: Any) -> str:
    try:
        text = _ENCODE(value)
    except ValueError:
        value = _finite(value)
        text = _ENCODE(value)
    # A lone surrogate can only be escaped.
    return json.dumps(value, allow_nan=False) if _SURROGATE.search(text) else text


def _finite(value: Any) -> Any:
    """A value with None for each number in it that JSON has no form for."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_finite(item) for item in value]
        case dict():
            return {name: _finite(item) for name, item in value.items()}
    return value


def _utf8(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _json_kind(value: Any) -> str:
    """The kind of a value of JSON: a `Kind`, `long` (a whole number that only a whole column has
    room for), `json` or `none`."""
    match value:
        case None:
            return "none"
        case bool():
            return "bool"
        case int():
            if -_EXACT <= value <= _EXACT:
                return "whole"
            return "long" if -(2**63) <= value < 2**63 else "json"
        case float():
            return "real"
        case str():
            return "text"
    return "json"


def _common(seen: set[str]) -> str:
    """The kind that a column with values of these kinds has: a `Kind`, or `json`."""
    kinds = seen - {"none"}
    for kind, may_hold in (
        ("text", {"text"}),
        ("bool", {"bool"}),
        ("whole", {"whole", "long"}),
        ("real", {"whole", "real"}),
    ):
        if kinds <= may_hold:
            return kind
    return "json"


def _record_batches(rows: Iterator[dict[str, Any]], kinds: Mapping[str, str]) -> Iterator[Any]:
    """Rows of JSON's values as record batches."""
    import pyarrow

    schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in kinds.items()])
    while some := list(islice(rows, _BATCH)):
        columns = [
            pyarrow.array([_fitting(row.get(name), kind) for row in some], field.type)
            for (name, kind), field in zip(kinds.items(), schema, strict=True)
        ]
        yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _fitting(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return _utf8(value)
    return _json_if_any(value) if kind == "json" else value


def _arrow_type(kind: str) -> Any:
    import pyarrow

    types = {"bool": pyarrow.bool_(), "whole": pyarrow.int64(), "real": pyarrow.float64()}
    return types.get(kind, pyarrow.string())


def _is_text_elsewhere(type_: Any) -> bool:
    """Whether values of an Arrow type become text where there is no Parquet."""
    from pyarrow import types

    return bool(types.is_temporal(type_) or types.is_decimal(type_))


def _is_plain(type_: Any) -> bool:
    """Whether JSON has a form for values of an Arrow type."""
    from pyarrow import types

    if types.is_struct(type_):
        return all(_is_plain(field.type) for field in type_)
    if types.is_map(type_):
        return _is_plain(type_.key_type) and _is_plain(type_.item_type)
    if any(
        is_so(type_)
        for is_so in (
            types.is_dictionary,
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
        )
    ):
        return _is_plain(type_.value_type)
    return any(
        is_so(type_)
        for is_so in (
            types.is_null,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
        )
    )


def _has_form(type_: Any) -> bool:
    return _is_plain(type_) or _is_text_elsewhere(type_)


def _plain(batch: Any) -> Any:
    """A batch in which what JSON has no form for is text."""
    import pyarrow
    from pyarrow import compute

    columns = [
        compute.cast(column, pyarrow.string()) if _is_text_elsewhere(column.type) else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
