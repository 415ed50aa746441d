"""Labelled questions from JSONL, CSV and Parquet: what is read, and what is said of bad rows."""

from __future__ import annotations

import csv
import json
import unicodedata
from contextlib import nullcontext, suppress
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.dataset import (
    BadRow,
    Example,
    Row,
    read_examples,
    read_rows,
    read_texts,
    scan_rows,
)
from qcat.data.lint import lint
from qcat.data.tables import open_table
from qcat.errors import DataError
from qcat.task import Task
from qcat.workflows.init import init_task

TASK = Task("house", {"pool": "", "water heater": "", "café": ""})
ROWS = [
    Row("When was the pump replaced?", "pool", "pump", 1),
    Row("hot, hotter\n“hottest”?", "water heater", None, 2),
    Row("  where is it ", "café", "3", 3),
]


def fields(row):
    given = {"text": row.text, "label": row.label, "group": row.group}
    return {key: value for key, value in given.items() if value is not None}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["group", "label", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    rows = [fields(row) for row in ROWS]
    assert read_rows(write_jsonl(tmp_path / "q.jsonl", rows)) == ROWS
    assert read_rows(write_jsonl(tmp_path / "q.txt", rows)) == ROWS
    assert read_rows(write_parquet(tmp_path / "q.PARQUET", rows)) == ROWS


def test_csv_names_the_line_where_a_row_begins(tmp_path):
    path = write_csv(tmp_path / "q.csv", [fields(row) for row in ROWS])
    read = read_rows(path)
    assert [(row.text, row.label, row.group) for row in read] == [
        (row.text, row.label, row.group) for row in ROWS
    ]
    assert [row.line for row in read] == [2, 3, 5]
    path.write_text('text,label\n\n\na,pool\n\n"b\nc",pool\nd,pool\n')
    assert [row.line for row in read_rows(path)] == [4, 6, 8]
    path.write_text("\n\ntext,label\n\na,pool\n")
    assert read_rows(path) == [Row("a", "pool", None, 5)]
    path.write_text(f"text,label\n{'a' * 200_000},pool\n")
    assert len(read_rows(path)[0].text) == 200_000


def test_alpaca_names(tmp_path):
    rows = [
        {"instruction": "Classify.", "input": "pump?", "output": "pool"},
        {"instruction": "pump?", "input": "", "output": "pool"},
        {"instruction": "pump?", "output": " pool\n", "text": "the whole prompt"},
    ]
    read = read_rows(write_jsonl(tmp_path / "q.jsonl", rows))
    assert {(row.text, row.label) for row in read} == {("pump?", "pool")}
    (tmp_path / "q.csv").write_text("instruction,input,output\nClassify.,pump?,pool\n")
    assert read_rows(tmp_path / "q.csv") == [Row("pump?", "pool", None, 2)]


@pytest.mark.parametrize(
    ("group", "read"),
    [(None, None), ("", None), ("  ", None), (" a ", "a"), (7, "7"), (7.0, "7"), ("7", "7")],
)
def test_groups(group, read, tmp_path):
    row = {"text": "a", "label": "pool", "group": group}
    assert read_rows(write_jsonl(tmp_path / "q.jsonl", [row]))[0].group == read


def test_labels_and_byte_order_marks(tmp_path):
    path = tmp_path / "q.jsonl"
    text = json.dumps({"text": "a", "label": " cafe\u0301 "})
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert read_rows(path) == [Row("a", "café", None, 1)]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r"q\.jsonl: not UTF-8 but UTF-16: save it as UTF-8"):
        read_rows(path)


def test_examples_are_cleaned_and_numbered(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [fields(row) for row in ROWS])
    assert read_examples(path, TASK) == [
        Example("When was the pump replaced?", 0, 1, "pump"),
        Example("hot, hotter “hottest”?", 1, 2, None),
        Example("where is it", 2, 3, "3"),
    ]


BAD_LINES = {
    "not json": "not a JSON object: found 'not json'",
    "[1]": "expected",
    '"text"': "expected",
    "{}": "no keys 'text' and 'label': there is none",
    '{"text": "a"}': "no key 'label': there are 'text'",
    '{"text": "a", "label": 3}': "no text under 'label' but int 3: write it as text, \"3\"",
    '{"text": ["a"], "label": "pool"}': "no text under 'text' but [\"a\"]: write one text",
    '{"text": "a", "label": "pool", "group": 1.5}': "the group must be",
    '{"text": "a", "label": "pool", "group": ["b"]}': "the group must be",
    '{"text": "na\xef"': "not UTF-8",
    "[" * 100_000: "not a JSON object",
    '{"text": ' + "1" * 5000 + "}": "not a JSON object",
}


def test_scan_gives_every_bad_row_and_read_the_first(tmp_path):
    path = tmp_path / "q.jsonl"
    good = '{"text": "a", "label": "pool"}'
    lines = [line for bad in BAD_LINES for line in (good, bad)]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    found = scan_rows(path)
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [row.line for row in bad] == list(range(2, len(lines) + 1, 2))
    assert len(found) == len(lines)
    for row, problem in zip(bad, BAD_LINES.values(), strict=True):
        assert problem in row.problem
        assert "\n" not in row.problem
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}:2: {bad[0].problem}"


def test_scan_of_csv_goes_on_after_a_bad_row(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(
        b'text,label\na,pool\nb,pool,c\nd\n"e"f,pool\n\xef,pool\ng,pool\n"open,pool\nh,pool\n'
    )
    found = scan_rows(path)
    assert [(row.line, row.text) for row in found if isinstance(row, Row)] == [(2, "a"), (7, "g")]
    assert [(row.line, row.problem[:12]) for row in found if isinstance(row, BadRow)] == [
        (3, "more fields "),
        (4, "no text unde"),
        (5, "not CSV: a q"),
        (6, "not UTF-8 (b"),
        (8, "not CSV: the"),
    ]


BAD_FILES = {
    "none.jsonl": (None, "none.jsonl: cannot be read: No such file"),
    "none.parquet": (None, "none.parquet: cannot be read: No such file"),
    "empty.jsonl": (b"\n \n", "empty.jsonl: no questions"),
    "empty.csv": (b"", "empty.csv:1: is empty: write a header line with text and label"),
    "header.csv": (b"text,label\n", "header.csv: no questions"),
    "other.csv": (b"question,answer\na,b\n", "other.csv:1: the header line has no columns"),
    "quote.csv": (b'"text"x,label\na,b\n', "quote.csv:1: not CSV"),
    "json.parquet": (b'{"text": "a"}', "json.parquet: not a Parquet file"),
    "empty.parquet": (b"", "empty.parquet: not a Parquet file"),
    "magic.parquet": (b"PAR1" * 20, "magic.parquet: "),
    "nul\0.jsonl": (None, "no file can have this name"),
    "nul\0.parquet": (None, "no file can have this name"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_files_that_cannot_be_read_at_all(name, tmp_path):
    data, message = BAD_FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    for read in (scan_rows, read_rows, lambda path: read_examples(path, TASK)):
        with pytest.raises(DataError) as caught:
            read(tmp_path / name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_parquet_without_the_columns_and_with_wide_others(tmp_path):
    path = write_parquet(tmp_path / "q.parquet", [{"question": "a", "label": "pool"}])
    with pytest.raises(DataError, match="no column 'text': there are 'question' and 'label'"):
        read_rows(path)
    rows = [{"text": "a", "label": "pool", "vector": [0.5] * 9}, {"text": None, "label": "pool"}]
    write_parquet(path, rows)
    assert scan_rows(path) == [
        Row("a", "pool", None, 1),
        BadRow(2, "no text under 'text' but null: write words"),
    ]
    write_parquet(path, [{"text": "a", "label": 1}])  # as sets on the hub have it
    with pytest.raises(DataError, match=r"q\.parquet:1: no text under 'label' but int 1: write"):
        read_rows(path)
    for value, said in (
        (date(2026, 1, 2), 'date 2026-01-02: write it as text, "2026-01-02"'),
        (b"pool", 'bytes pool: write it as text, "pool"'),
    ):
        write_parquet(path, [{"text": "a", "label": value}])
        with pytest.raises(DataError, match=f"no text under 'label' but {said}"):
            read_rows(path)


def test_parquet_with_two_columns_of_one_name(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "q.parquet"
    table = pyarrow.Table.from_arrays(
        [["why"], ["pool"], ["water heater"]], names=["text", "label", "label"]
    )
    pyarrow.parquet.write_table(table, path)
    for door in (
        read_rows,
        read_texts,
        init_task,
        lambda path: lint(TASK, path),
        lambda path: open_table(path, ".csv"),
        lambda path: open_table(path, ".parquet"),
    ):
        with pytest.raises(DataError) as caught:
            door(path)
        assert str(caught.value) == f"{path}: two columns are called 'label': rename one"


def classes(rows, feature):
    """A table as `datasets` writes it, with what its metadata say of the labels."""
    import pyarrow

    said = {"info": {"features": {"text": {"_type": "Value"}, "label": feature}}}
    metadata = {"huggingface": json.dumps(said)}
    return pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)


def test_parquet_with_class_labels(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "q.parquet"
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    names = {"names": ["pool", "Water Heater"], "_type": "ClassLabel"}
    pyarrow.parquet.write_table(classes(rows, names), path)
    assert [row.label for row in read_rows(path)] == ["Water Heater", "pool"]
    assert [example.label for example in read_examples(path, TASK)] == [1, 0]
    for number in (-1, 2):
        pyarrow.parquet.write_table(classes([{"text": "a", "label": number}], names), path)
        said = rf"q\.parquet:1: a row without a label \({number} in a ClassLabel column\): leave it"
        with pytest.raises(DataError, match=said):
            read_rows(path)
        assert read_texts(path) == ["a"]
    for feature in ({"_type": "Value"}, {"_type": "ClassLabel"}, {"names": 3}, None, []):
        pyarrow.parquet.write_table(classes(rows, feature), path)
        with pytest.raises(DataError, match="but int 1: write it as text"):
            read_rows(path)
    for said in (b"{", b"[]", b'{"info": 1}', b"\xff"):
        table = classes(rows, names).replace_schema_metadata({"huggingface": said})
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(DataError, match="but int 1"):
            read_rows(path)


def test_what_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "q.parquet"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for read in (read_rows, read_texts):
        with pytest.raises(DataError, match=r"q\.parquet: a Git LFS pointer, not the file"):
            read(path)


def test_texts_come_in_every_format(tmp_path):
    rows = [{"text": "who?  ", "more": "x"}, {"text": "why?", "more": "y"}]
    jsonl = write_jsonl(tmp_path / "q.jsonl", rows)
    (tmp_path / "q.csv").write_text("more;Text\nx;who?  \ny;why?\n")
    parquet = write_parquet(tmp_path / "q.parquet", rows)
    for path in (jsonl, tmp_path / "q.csv", parquet):
        assert read_texts(path) == ["who?", "why?"]


def test_labels_are_taken_in_the_spelling_of_the_task(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("Pool", "WATER   heater", "CAFE\u0301")]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    assert [example.label for example in read_examples(path, TASK)] == [0, 1, 2]


def test_a_label_that_the_task_lacks_and_an_empty_text(tmp_path):
    rows = [{"text": "a", "label": "pool"}, {"text": "b", "label": "spa"}]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"q\.jsonl:2: label 'spa' is not in the task"):
        read_examples(path, TASK)
    write_jsonl(path, [{"text": "\0 \n", "label": "pool"}])
    with pytest.raises(DataError, match=r"q\.jsonl:1: the question is empty"):
        read_examples(path, TASK)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.fixed_dictionaries({"text": TEXTS, "label": TEXTS, "group": TEXTS}), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    wanted = [
        (
            row["text"],
            unicodedata.normalize("NFC", row["label"]).strip(),
            unicodedata.normalize("NFC", row["group"]).strip() or None,
        )
        for row in rows
    ]
    for path in (
        write_jsonl(folder / "q.jsonl", rows),
        write_parquet(folder / "q.parquet", rows),
        write_csv(folder / "q.csv", rows),
    ):
        if (
            path.suffix == ".csv"
        ):  # where a row of nothing is what a spreadsheet has below its table
            wanted = [row for row, given in zip(wanted, rows, strict=True) if any(given.values())]
        with suppress(DataError) if not wanted else nullcontext():
            assert [(row.text, row.label, row.group) for row in read_rows(path)] == wanted, path


@given(st.binary(max_size=200) | st.text('{}[]":,a\n text label\\u\0', max_size=80).map(str.encode))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    for name, start in (("q.jsonl", b""), ("q.csv", b"text,label\n"), ("q.parquet", b"PAR1")):
        path = folder / name
        path.write_bytes(start + data)
        found = []
        with suppress(DataError):
            found = scan_rows(path)
        lines = (start + data).count(b"\n") + data.count(b"\r") + 1
        assert all(1 <= row.line <= lines for row in found)
