"""Tables in and out of CSV, JSONL and Parquet: what goes in comes out, with columns added."""

from __future__ import annotations

import csv
import datetime
import json
import math
import tracemalloc
from decimal import Decimal
from itertools import product

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.tables import SUFFIXES, open_table, write_table
from qcat.errors import DataError

ADDED = {"label": "text", "confidence": "real", "abstained": "bool"}
VALUES = [("pool", 0.5, False), (None, None, True), ("a,\r\nb", 1e-9, True)]


def copied(source, target):
    """A table written with `ADDED`, its values in turn."""
    table = open_table(source, target.suffix)
    more = [VALUES[number % 3] for number in range(table.count)]
    with target.open("wb") as file:
        write_table(table, file, target.suffix, ADDED, iter(more))
    return more


def write(path, rows):
    """Rows by other means than the code under test."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(path):
    """Columns and rows by other means than the code under test."""
    if path.suffix == ".jsonl":
        lines = [line for line in path.read_text("utf-8").split("\n") if line]
        rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        return list(rows[0]), rows
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            return reader.fieldnames, list(reader)
    table = pyarrow.parquet.read_table(path)
    return table.column_names, table.to_pylist()


def in_csv(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('",;\r\n\t\0é '), max_size=8
)
TEXT_ROWS = st.lists(
    st.text("abc\"'\r\n, é", min_size=1, max_size=4), max_size=3, unique=True
).flatmap(
    lambda names: st.lists(
        st.fixed_dictionaries(dict.fromkeys([*names, "text"], TEXT)), min_size=1, max_size=5
    )
)
WHOLE = st.integers(-(2**63), 2**63 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | REAL | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
COLUMN = st.sampled_from([TEXT, st.booleans(), WHOLE, REAL, WHOLE | REAL, ANY])


@st.composite
def json_rows(draw):
    """Rows of which some lack some columns."""
    names = draw(st.lists(TEXT, max_size=3, unique=True))
    columns = {name: draw(COLUMN) | st.none() for name in names if name not in ADDED}
    row = st.fixed_dictionaries({"text": TEXT | st.none()}, optional=columns)
    return draw(st.lists(row, min_size=1, max_size=5))


@given(TEXT_ROWS)
def test_text_comes_out_of_every_pair_as_it_went_in(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("pairs")
    for number, (first, second) in enumerate(product(SUFFIXES, SUFFIXES)):
        source, target = folder / f"in{number}{first}", folder / f"out{number}{second}"
        write(source, rows)
        more = copied(source, target)
        names, found = read(target)
        assert names == [*rows[0], *ADDED]
        for row, values, got in zip(rows, more, found, strict=True):
            wanted = row | dict(zip(ADDED, values, strict=True))
            if second == ".csv":
                wanted = {name: in_csv(value) for name, value in wanted.items()}
            assert got == wanted


@given(json_rows())
def test_values_of_json(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("json")
    source = folder / "in.jsonl"
    write(source, rows)
    names = list(dict.fromkeys(name for row in rows for name in row))

    more = copied(source, folder / "out.jsonl")
    _, found = read(folder / "out.jsonl")
    wanted = [
        row | dict(zip(ADDED, values, strict=True)) for row, values in zip(rows, more, strict=True)
    ]
    # In order and type: 1, 1.0 and true are equal in Python.
    assert [json.dumps(row) for row in found] == [json.dumps(row) for row in wanted]

    copied(source, folder / "out.csv")
    columns, found = read(folder / "out.csv")
    assert columns == [*names, *ADDED]
    for row, got in zip(rows, found, strict=True):
        assert {name: got[name] for name in names} == {
            name: in_csv(row.get(name)) for name in names
        }

    copied(source, folder / "out.parquet")
    columns, found = read(folder / "out.parquet")
    assert columns == [*names, *ADDED]
    for name in names:
        values = [row.get(name) for row in rows]
        got = [row[name] for row in found]
        if all(isinstance(value, str | None) for value in values):
            assert got == values
        elif any(isinstance(value, str) for value in got):  # there was no one type
            for value, text in zip(values, got, strict=True):
                if isinstance(value, str | None):
                    assert text == value
                else:  # JSON
                    assert json.dumps(json.loads(text)) == json.dumps(value)
        else:
            assert got == values
            assert len({type(value) for value in got if value is not None}) <= 1


COLUMNS = {
    "text": (["a", None], pyarrow.string()),
    "flag": ([True, None], pyarrow.bool_()),
    "whole": ([1, 2], pyarrow.int64()),
    "long": ([2**60, 1], pyarrow.int64()),
    "ends": ([-(2**63), 2**63 - 1], pyarrow.int64()),
    "real": ([1, 2.5], pyarrow.float64()),
    "nothing": ([None, None], pyarrow.string()),
    "too long": ([2**63, 1], pyarrow.string()),
    "long and real": ([2**60, 2.5], pyarrow.string()),
    "flag and whole": ([True, 1], pyarrow.string()),
    "mixed": ([1, "a"], pyarrow.string()),
    "list": ([[1], None], pyarrow.string()),
    "object": ([{"a": 1}, {}], pyarrow.string()),
}


def test_types_that_columns_of_jsonl_have_in_parquet(tmp_path):
    source = tmp_path / "q.jsonl"
    write(source, [{name: values[row] for name, (values, _) in COLUMNS.items()} for row in (0, 1)])
    copied(source, tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    for name, (values, type_) in COLUMNS.items():
        assert found.schema.field(name).type == type_, name
        is_json = type_ == pyarrow.string() and name != "text"
        wanted = [
            json.dumps(value) if is_json and not isinstance(value, str | None) else value
            for value in values
        ]
        assert found[name].to_pylist() == wanted, name


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks(number, tmp_path):
    rows = [
        {"real": number, "list": [{"a": number}, {"a": 1.5}], "mixed": number},
        {"real": 1.5, "list": [], "mixed": "null"},
    ]
    for kind in (".jsonl", ".parquet"):
        source = tmp_path / f"q{kind}"
        write(source, rows if kind == ".jsonl" else [{**row, "mixed": None} for row in rows])
        copied(source, tmp_path / "out.jsonl")
        row = read(tmp_path / "out.jsonl")[1][0]
        assert (row["real"], row["list"], row["mixed"]) == (None, [{"a": None}, {"a": 1.5}], None)
        copied(source, tmp_path / "out.csv")
        row = read(tmp_path / "out.csv")[1][0]
        mixed = str(number) if kind == ".jsonl" else ""
        assert (row["real"], row["mixed"]) == (str(number), mixed)
        assert row["list"] == '[{"a": null}, {"a": 1.5}]'
    copied(tmp_path / "q.jsonl", tmp_path / "out.parquet")
    first, second = read(tmp_path / "out.parquet")[1]
    assert repr(first["real"]) == repr(number)
    assert (first["list"], first["mixed"]) == ('[{"a": null}, {"a": 1.5}]', None)
    assert second["mixed"] == "null"


@pytest.mark.parametrize("kind", SUFFIXES)
def test_as_many_values_as_rows(kind, tmp_path):
    source = tmp_path / "q.csv"
    write(source, [{"text": "a"}, {"text": "b"}])
    for count in (0, 1, 3):
        table = open_table(source, kind)
        with (tmp_path / "out").open("wb") as file, pytest.raises(ValueError):  # noqa: PT011
            write_table(table, file, kind, ADDED, iter([VALUES[0]] * count))


def test_long_fields_of_csv(tmp_path):
    source, text = tmp_path / "q.csv", "pump " * 100_000
    write(source, [{"text": "a", "mail": text}])
    copied(source, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[1][0]["mail"] == text


def test_blank_lines_of_csv(tmp_path):
    def rows(data):
        source.write_bytes(data)
        return list(open_table(source, ".csv").rows())

    source = tmp_path / "q.csv"
    assert rows(b"\r\n\ntext,n\n\na,1\n\n") == [{"text": "a", "n": "1"}]
    one = [{"text": text} for text in ("", "a", "", "", "b")]
    assert rows(b"\ntext\n\na\n\n\nb\n") == one
    assert rows(b"text\r\n\r\na\r\n\r\n\r\nb\r\n\r\n\r\n") == one
    assert rows(b'text\n""\na\n""\n""\nb') == one
    with pytest.raises(DataError, match=r"q\.csv:5: not UTF-8"):
        rows(b"text\n\na\n\n\xef\n")


def test_types_of_parquet(tmp_path):
    day = datetime.date(2026, 5, 1)
    table = pyarrow.table(
        {
            "when": pyarrow.array([day, None], pyarrow.date32()),
            "text": pyarrow.array(["a", None]).dictionary_encode(),
            "at": pyarrow.array([1_500_000_000_123_456_789, 0], pyarrow.timestamp("ns")),
            "price": pyarrow.array([Decimal("1.50"), None]),
            "small": pyarrow.array([1, 2], pyarrow.int8()),
            "vector": pyarrow.array([[0.5, 1.0], []], pyarrow.list_(pyarrow.float32())),
            "more": pyarrow.array([{"a": 1}, None]),
        }
    ).replace_schema_metadata({"made": "by hand"})
    source = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(table, source)

    copied(source, tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    before = pyarrow.parquet.read_table(source)
    assert found.select(table.column_names).equals(before)
    assert [found.schema.field(name) for name in before.column_names] == list(before.schema)
    assert found.schema.metadata[b"made"] == b"by hand"
    assert found.schema.field("abstained").type == pyarrow.bool_()

    copied(source, tmp_path / "out.jsonl")
    first, second = read(tmp_path / "out.jsonl")[1]
    assert list(first.items())[:7] == [
        ("when", "2026-05-01"),
        ("text", "a"),
        ("at", "2017-07-14 02:40:00.123456789"),
        ("price", "1.50"),
        ("small", 1),
        ("vector", [0.5, 1.0]),
        ("more", {"a": 1}),
    ]
    assert second["text"] is second["when"] is second["more"] is None
    copied(source, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[1][0]["vector"] == "[0.5, 1.0]"


@pytest.mark.parametrize(("first", "second"), [(".csv", ".jsonl"), (".jsonl", ".csv")])
def test_memory_does_not_grow_with_the_rows(first, second, tmp_path):
    peaks = []
    for count in (2000, 20_000):
        source = tmp_path / f"in{first}"
        write(source, [{"text": f"question {number}"} for number in range(count)])
        tracemalloc.start()
        table = open_table(source, second)
        with (tmp_path / f"out{second}").open("wb") as file:
            more = (VALUES[0] for _ in range(count))
            write_table(table, file, second, ADDED, more)
        for _ in table.values("text"):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_half_a_character_is_written_as_the_format_allows(tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"text": "a\\ud800", "more": ["\\udfff"]}\n')
    for kind in SUFFIXES:
        copied(source, tmp_path / f"out{kind}")
    assert read(tmp_path / "out.jsonl")[1][0]["text"] == "a\ud800"
    for kind in (".csv", ".parquet"):
        row = read(tmp_path / f"out{kind}")[1][0]
        assert (row["text"], row["more"]) == ("a\ufffd", '["\\udfff"]')


BAD_FILES = {
    "q.txt": (b"text\na\n", "q.txt: CSV, JSONL or Parquet expected"),
    "none.csv": (None, "none.csv: cannot be read: No such file"),
    "empty.csv": (b"", "empty.csv: no rows in it"),
    "empty.jsonl": (b"\n\n", "empty.jsonl: no rows in it"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": }\n', "json.jsonl:3: not a JSON object: Expecting"),
    "list.jsonl": (b'["a"]\n', "list.jsonl:1: an object"),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xef"}\n', "utf8.jsonl:2: not UTF-8"),
    "utf8.csv": (b'text\n"a\nb"\n\xef\n', "utf8.csv:4: not UTF-8"),
    "header.csv": (b"text,\xef\na,b\n", "header.csv:1: not UTF-8"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "utf16.csv: not UTF-8 but UTF-16"),
    "wide.csv": (b"text,n\na,1\nb,2,3\n", "wide.csv:3: more fields than columns"),
    "narrow.csv": (b'text,n\n"a\n",1\nb\n', "narrow.csv:4: fewer fields than columns: 1, not 2"),
    "blank.csv": (b"text\n\n\n", "blank.csv: no rows in it"),
    "late.csv": (b'\n\n"text"x\na\n', "late.csv:3: not CSV"),
    "open.csv": (b'text\na\n"b\n', "open.csv:3: not CSV"),
    "twice.csv": (b"text,n,n\na,1,2\n", "twice.csv:1: two columns are called 'n'"),
    "name.jsonl": (b'{"\\ud800": "a"}\n', "a column's name, '\\ud800', is not UTF-8"),
    "json.parquet": (b'{"text": "a"}', "json.parquet: not a Parquet file"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_files(name, tmp_path):
    data, message = BAD_FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_table(tmp_path / name, ".csv")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parquet(tmp_path):
    source = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "raw": [b"b"]}), source)
    open_table(source, ".parquet")
    with pytest.raises(DataError, match="column 'raw' is of type binary, which CSV and JSONL have"):
        open_table(source, ".csv")

    bad = pyarrow.array([b"a", b"\xef"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), source)
    with pytest.raises(DataError, match=r"q\.parquet: rows 1 to 2: .*UTF8"):
        open_table(source, ".parquet")

    rows = pyarrow.table({"text": [f"question {number}" for number in range(9999)]})
    pyarrow.parquet.write_table(rows, source, compression="none", use_dictionary=False)
    data = bytearray(source.read_bytes())
    data[20:60] = b"\xff" * 40  # in the page's header
    source.write_bytes(data)
    with pytest.raises(DataError, match=r"q\.parquet"):
        open_table(source, ".parquet")
