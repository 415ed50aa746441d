"""CSV as spreadsheets and people write it: read where it is unambiguous, else one line that helps.

Each file goes through every door: the labelled questions that `train` reads and `lint` scans, texts
alone as for off-topic questions, and the tables of `batch`.
"""

from __future__ import annotations

import gzip
import pickle
from contextlib import suppress

import pytest
from doors import messages
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.dataset import BadRow, Row, read_examples, read_texts, scan_rows
from qcat.data.lint import lint
from qcat.data.tables import open_table
from qcat.errors import DataError
from qcat.task import Task
from qcat.workflows.init import init_task

TASK = Task("house", {"pool": "", "garden gate": ""})
GATE, PUMP = ("who fixed the gate", "garden gate"), ("pump, or liner?", "pool")

BODY = b'who fixed the gate,garden gate\n"pump, or liner?",pool\n'
QUOTED = b'"who fixed the gate","garden gate"\n"pump, or liner?","pool"\n'
BARE = QUOTED.replace(b'"', b"").replace(b"e,g", b"e;g").replace(b"?,p", b"?;p")
MARK = b"\xef\xbb\xbf"

READ = {
    "plain": b"text,label\n" + BODY,
    "all quoted": b'"text","label"\n' + QUOTED,
    "a byte order mark": MARK + b"text,label\n" + BODY,
    "Windows line ends": MARK + (b"text,label\n" + BODY).replace(b"\n", b"\r\n"),
    "a byte order mark before a quoted header": MARK + b'"text","label"\n' + QUOTED,
    "line ends of old Macs": (b"text,label\n" + BODY).replace(b"\n", b"\r"),
    "semicolons": b"text;label\n" + BARE,
    "semicolons, all quoted": b'"text";"label"\n' + QUOTED.replace(b'","', b'";"'),
    "tabs": b"text\tlabel\n" + BARE.replace(b";", b"\t"),
    "Excel's line of the separator": b"sep=;\r\ntext;label\r\n" + BARE,
    "that line with spaces": b"sep = ;\ntext;label\n" + BARE,
    "that line, in quotes, of a comma": b'"sep=,"\r\ntext,label\r\n' + BODY,
    "that line, of a bar": b"sep=|\ntext|label\n" + BARE.replace(b";", b"|"),
    "capitals in the header": b"TEXT,Label\n" + BODY,
    "spaces in the header": b"text , label\n" + BODY,
    "Excel's empty columns": b"text,label,,\n" + BODY.replace(b"\n", b",,\n"),
    "a field that is empty beyond the header": b"text,label\n" + BODY.strip() + b",\n",
    "spaces after the separators": b"text, label\n" + BODY.replace(b",g", b", g"),
    "spaces before quotes": b'"text", "label"\n' + QUOTED.replace(b'","', b'",  "'),
    "spaces before quotes, semicolons": b"text; label\n" + QUOTED.replace(b'","', b'"; "'),
    "Ctrl-Z at the end": b"text,label\n" + BODY + b"\x1a",
    "Ctrl-Z to the end of a block": b"text,label\r\n" + BODY + b"\x1a" * 100,
    "labels spelled otherwise": b"text,label\n" + BODY.replace(b"n g", b"n   G"),
    "an index without a name": b",text,label\n0," + BODY.replace(b'\n"', b'\n1,"'),
    "more columns": b"id,text,label,note\n7," + BODY.replace(b'\n"', b',\n8,"').strip() + b",x",
    "blank lines": b"\n\ntext,label\n\n" + BODY.replace(b"\n", b"\n\n"),
    "no line end at the end": b"text,label\n" + BODY.strip(),
}


def write(folder, data, name="q.csv"):
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(door):
    """What a door says of a file; None if it takes it."""
    try:
        door()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", list(READ))
def test_every_door_reads(case, tmp_path):
    path = write(tmp_path, READ[case])
    rows = scan_rows(path)
    assert all(isinstance(row, Row) for row in rows), rows
    labels = list(TASK.labels)
    assert [(e.text, labels[e.label]) for e in read_examples(path, TASK)] == [
        (GATE[0], GATE[1]),
        (PUMP[0], PUMP[1]),
    ]
    assert read_texts(path) == [GATE[0], PUMP[0]]
    assert lint(TASK, path).questions == 2
    assert set(init_task(path).counts.values()) == {1}
    table = open_table(path, ".jsonl")
    assert table.count == 2
    text = next(name for name in table.columns if name.strip().lower() == "text")
    assert list(table.values(text)) == [GATE[0], PUMP[0]]


def test_tabs_in_a_tsv_file(tmp_path):
    data = b"text\tlabel\nwho, what;\tpool\n"
    path = write(tmp_path, data, "q.tsv")
    assert read_texts(path) == ["who, what;"]
    assert open_table(path, ".csv").columns == ("text", "label")
    assert lint(TASK, path).count("info") == 0  # the suffix said so
    assert read_texts(write(tmp_path, data, "q.TAB")) == ["who, what;"]
    assert open_table(tmp_path / "q.TAB", ".csv").count == 1
    write(tmp_path, b'text,label\n"a, b",pool\n', "q.tsv")
    assert read_texts(path) == ["a, b"]


def test_rows_of_nothing_are_none_among_labelled_questions(tmp_path):
    path = write(tmp_path, b"text,label\na,pool\n,\n,,,\nb,pool\n,\n")
    assert [row.line for row in scan_rows(path)] == [2, 5]
    assert open_table(path, ".csv").count == 5  # there a row in is a row out


NOTED = {
    "text;label\na;pool\n": ["read as columns separated by semicolons"],
    "text\tlabel\na\tpool\n": ["read as columns separated by tabs"],
    "sep=,\ntext,label\na,pool\n": ["read as columns separated by commas"],
    "Text,label \na,pool\n": ["column 'Text' read as 'text', 'label ' read as 'label'"],
    "TEXT;label\na;pool\n": [
        "column 'TEXT' read as 'text'",
        "read as columns separated by semicolons",
    ],
    "text,label\na,pool\n": [],
    'text, label\n"a", "pool"\n': [
        "read as columns separated by commas, spaces after the separators passed over"
    ],
}


@pytest.mark.parametrize("text", list(NOTED))
def test_lint_notes_what_was_guessed(text, tmp_path):
    found = lint(TASK, write(tmp_path, text.encode())).findings
    notes = [f for f in found if f.code == "format"]
    assert sorted(note.message for note in notes) == NOTED[text]
    assert all((note.severity, note.lines) == ("info", (1,)) for note in notes)


# Whether a line within a text is like a row
JOINED = {
    b'text,label\n"Hi there,pool\nwho said hi",garden gate\nx,pool\n': True,
    b'label,text\npool,"Hi there\rGarden  gate,who said hi"\nx,pool\n': True,
    b'text,label\n"Hi there,pond\nwho said hi",garden gate\n': True,
    b'text;label\n"Hi there; pool\nwho said hi";garden gate\n': True,
    b'text,label\n"Hi there\npool\nwho said hi",garden gate\n': True,
    b'text,label\n"Hi,\n1,000 thanks, all","garden gate"\n': False,
    b'text,label\n"Hi,pool",garden gate\n': False,
}


@pytest.mark.parametrize("data", list(JOINED))
def test_rows_that_a_stray_quote_joins_are_found(data, tmp_path):
    tabs = data.replace(b",", b"\t")
    for path in (write(tmp_path, data), write(tmp_path, tabs, "q.tsv")):
        if path.suffix == ".tsv" and b";" in data:
            continue
        found = [f for f in lint(TASK, path).findings if f.code == "joined-rows"]
        assert [(f.severity, f.lines) for f in found] == [("warning", (2,))] * JOINED[data]
    lines = write(tmp_path, b'{"text": "Hi,pool\\nthere", "label": "pool"}', "q.jsonl")
    assert "joined-rows" not in {f.code for f in lint(TASK, lines).findings}


# What every door refuses, with the line and the words that help
REFUSED = {
    "nothing": (b"", "is empty: write a header line with text and label"),
    "blank lines": (b"\n\r\n\n", "is empty: write a header line"),
    "a header alone": (b"text,label\n", "q.csv: no questions in it: write a row"),
    "no header": (
        b"who fixed it,pool\nwhen,pool\n",
        "q.csv:1: the header line has no columns 'text' and 'label': there are 'who fixed it' and "
        "'pool': name them 'text' and 'label'",
    ),
    "no label": (b"text,note\na,b\n", "no column 'label': there are 'text' and 'note': name one"),
    "no text": (b"label\npool\n", "no column 'text': there are 'label': name one 'text'"),
    "other names": (
        b"question;category\na;pool\n",
        "rename 'question' to 'text' and 'category' to 'label'",
    ),
    "a name that could be either of two": (
        b"question,query,label\na,b,pool\n",
        "no column 'text': there are 'question', 'query' and 'label': name one 'text'",
    ),
    "a bar between them": (b"text|label\na|pool\n", "q.csv:1: what separates the columns cannot"),
    "colons between them": (b"text:label\na:pool\n", "separates the columns cannot be told"),
    "spaces between them": (
        b'"text" "label"\n"1" "a" "pool"\n',
        "q.csv:1: what separates the columns cannot be told: separate them by commas",
    ),
    "semicolons or tabs": (
        b"text;label\tnote\na;pool\tx\n",
        "separates the columns cannot be told",
    ),
    "semicolons and commas": (
        b"text;label,note\na;pool,x\n",
        "q.csv:1: the columns are separated in two ways: separate them by commas alone",
    ),
    "brackets": (b"[text],[label]\na,pool\n", "there are '[text]' and '[label]': name them 'text'"),
    "a title": (
        b"Questions of 2024\n\ntext,label\na,pool\n",
        "q.csv:1: the header line is not the first: remove the lines above line 3",
    ),
    "a title of a spreadsheet": (b"Questions,,\n,,\ntext,label,note\na,pool,x\n", "above line 3"),
    "a title, other names": (b"Questions\nid;question;category\n1;a;pool\n", "above line 2"),
    "a comment": (b"# mine, and so\ntext,label\na,pool\n", "the header line is not the first"),
    "an empty line of a spreadsheet": (b",,\nText,Label,\na,pool,\n", "above line 2"),
    "an empty header line": (b",,\na,pool,\n", "q.csv:1: the header line is empty: remove it, or"),
    "the header line twice": (
        b"text,label\na,pool\n\xef\xbb\xbftext,label\nb,pool\n",
        "q.csv:3: the header line again, as joined files have it: remove it",
    ),
    "YAML": (b"- text: a\n  label: pool\n", "q.csv:1: looks like YAML: write CSV, or JSON"),
    "RTF": (b"{\\rtf1\\ansi text,label\\par}", "q.csv: an RTF document: save it as plain text"),
    "Arrow": (b"ARROW1\0\0" + b"\xff" * 60, "q.csv: an Arrow file: write the table as Parquet"),
    "a stream of Arrow": (b"\xff\xff\xff\xff\x78\0\0\0", "q.csv: an Arrow file"),
    "a pickle": (pickle.dumps({"text": ["a"]}), "q.csv: a pickle of Python: write the table"),
    "a workbook of XML": (
        MARK + b'<?xml version="1.0"?>\n<?mso-application progid="Excel.Sheet"?>',
        "q.csv: XML, as old Excel workbooks are: save the table as CSV UTF-8",
    ),
    "a table of HTML": (b"<table><tr><td>text", "q.csv: a table of HTML: save the table as CSV"),
    "numbers beside names": (
        b"text,label,label_text\na,0,pool\n",
        "q.csv:2: the label is the number 0, its name stands under 'label_text': rename that to",
    ),
    "two labels": (
        b"text,label,label\na,pool,pool\n",
        "two columns are called 'label': rename one",
    ),
    "two that could be the label": (
        b"text,Label,LABEL\na,pool,pool\n",
        "both 'Label' and 'LABEL' could be 'label': rename one",
    ),
    "two without a name": (b"text,,,label\na,,,pool\n", "two columns have no name: name them"),
    "more fields": (
        b"text,label\na, b,pool\n",
        "q.csv:2: more fields than columns: quote a text with commas",
    ),
    "more fields of semicolons": (
        b"text;label\na;b;pool\n",
        ":2: more fields than columns: quote a text with semicolons",
    ),
    "more fields of tabs": (
        b"text\tlabel\na\tb\tpool\n",
        ":2: more fields than columns: quote a text with tabs",
    ),
    "more fields in every row": (
        b"text,label\na, b,pool\nc, d,pool\n",
        "q.csv:1: each row has one field more than the header line: leave out row names "
        "(R: row.names=FALSE), or quote each text with commas",
    ),
    "R's row names": (
        b'"text","label"\n"1","who, and when","pool"\n"12","why","pool"\n',
        "q.csv:1: each row has one field more than the header line: row names: leave them out, "
        "in R write.table(",
    ),
    "R's row names, one row": (b'"text","label"\n"1","who","pool"\n', "line: row names: leave"),
    "R's row names, an empty last column": (
        b'"text","label","note"\n"1","who fixed","pool",""\n"2","why","pool",""\n',
        "row names: leave them out",
    ),
    "R's row names that are words": (
        b'"text","label","note"\n"q1","who fixed","pool",""\n"q2","why","pool",""\n',
        "each row has one field more than the header line: leave out row names (R: row.names=FALSE)"
        ", or the empty last field",
    ),
    "a space before a quote": (
        b'text,label\na,pool\n"why", "pool"\n',
        "q.csv:3: a space between a separator and a quote: remove it",
    ),
    "a space before a quote, a comma within": (
        b'label,text\npool,a\ngarden gate, "the gate, again"\n',
        "q.csv:3: a space between a separator and a quote: remove it",
    ),
    "spaces around the separator": (
        b'"text" , "label"\n"why" , "pool"\n',
        "q.csv:1: not CSV: a space between a quote and a separator: remove it",
    ),
    "R's backslashes": (
        b'"text","label"\n"a \\"3/4\\" pipe","pool"\n',
        'q.csv:2: not CSV: a backslash before a quote: write the quote twice, "" (R: qmethod=',
    ),
    "a space after a quote": (
        b'text,label\n"why" ,pool\n',
        "q.csv:2: not CSV: a space between a quote and a separator: remove it",
    ),
    "fewer fields": (b"text,label\na,pool\nb\n", "q.csv:3: no text under 'label'"),
    "a quote in quotes": (
        b'text,label\n"is 3/4" pipe?",pool\n',
        'q.csv:2: not CSV: a quote within a quoted text: write it twice, ""',
    ),
    "an open quote": (
        b'text,label\na,pool\n"b,pool\nc,pool\n',
        "q.csv:3: not CSV: the quote that is opened here is never closed",
    ),
    "Windows-1252": (
        b"text,label\na,pool\ncaf\xe9,pool\n",
        "q.csv:3: not UTF-8 (byte 0xE9, 'é' in Windows-1252): save it as UTF-8",
    ),
    "Windows-1252 in the header": (
        b"text,label,gr\xf6\xdfe\na,pool,1\n",
        "q.csv:1: not UTF-8 (byte 0xF6, 'ö' in Windows-1252)",
    ),
    "a byte that is nothing": (
        b"text,label\na\x81,pool\n",
        "q.csv:2: not UTF-8 (byte 0x81): save it as UTF-8",
    ),
    "UTF-16": (
        "text,label\na,pool\n".encode("utf-16"),
        "q.csv: not UTF-8 but UTF-16: save it as UTF-8",
    ),
    "UTF-16, big end first": (
        "\ufefftext,label\n".encode("utf-16-be"),
        "q.csv: not UTF-8 but UTF-16",
    ),
    "UTF-16 without a mark": ("text,label\n".encode("utf-16-le"), "q.csv: not UTF-8 but UTF-16"),
    "UTF-16 without a mark, big end first": (
        "text,label\n".encode("utf-16-be"),
        "q.csv: not UTF-8 but UTF-16",
    ),
    "UTF-32": ("text,label\n".encode("utf-32"), "q.csv: not UTF-8 but UTF-32"),
    "a workbook": (
        b"PK\x03\x04\x14\0\x06\0\x08\0" + bytes(range(256)),
        "q.csv: an Excel workbook or other ZIP file: save the table as CSV UTF-8",
    ),
    "an old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 100, "an old Excel workbook"),
    "gzip": (gzip.compress(b"text,label\na,pool\n"), "q.csv: a gzip file: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58", "a zstd file: unpack it"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer, not the file: fetch that with `git lfs pull`",
    ),
    "a web page": (
        b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
        "a web page: download the file itself",
    ),
    "Parquet": (b"PAR1\x15\x04\x15\x10", "a Parquet file: name it .parquet"),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "zero bytes": (b"\0" * 4096, "nothing but zero bytes: it is damaged"),
    "JSONL": (
        b'{"text": "a", "label": "pool"}\n',
        "q.csv:1: looks like JSON: name the file .jsonl",
    ),
    "a label that is not in the task": (
        b"text,label\na,pond\n",
        "q.csv:2: label 'pond' is not in the task",
    ),
    "no label in a row": (b"text,label\na,\n", "q.csv:2: label '' is not in the task"),
    "no text in a row": (b"text,label\n,pool\n", "q.csv:2: the question is empty"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_one_line_says_what_is_wrong(case, tmp_path):
    data, words = REFUSED[case]
    path = write(tmp_path, data)
    with pytest.raises(DataError) as caught:
        read_examples(path, TASK)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert message.isprintable()
    assert "with commas" not in message or b";" not in data
    if whole := refusal(lambda: lint(TASK, path)):
        assert whole == message
        return
    found = lint(TASK, path).findings  # it goes on after a bad row
    said = {f"{path}:{f.lines[0]}: {f.message}" for f in found if f.code == "unreadable"}
    others = {"unknown-label", "empty-text"} & {f.code for f in found}
    assert message in said or (others and not said)


# The same file is refused in the same words where it is no table at all, whatever the door
NO_TABLE = [
    "Windows-1252", "Windows-1252 in the header", "UTF-16", "UTF-16 without a mark", "UTF-32",
    "a workbook", "gzip", "a Git LFS pointer", "a web page", "zero bytes", "two labels",
    "two without a name", "more fields", "more fields of semicolons", "a quote in quotes",
    "an open quote", "more fields in every row", "R's row names", "R's row names, one row",
    "R's row names, an empty last column", "R's row names that are words",
    "spaces between them", "semicolons and commas", "a title", "a comment",
    "a title of a spreadsheet",
    "an empty line of a spreadsheet", "the header line twice", "YAML", "JSONL", "RTF", "Arrow",
    "a pickle", "a workbook of XML", "a table of HTML",
    "a space before a quote", "a space before a quote, a comma within", "a space after a quote",
]  # fmt: skip


@pytest.mark.parametrize("case", NO_TABLE)
def test_all_doors_say_the_same(case, tmp_path):
    path = write(tmp_path, REFUSED[case][0])
    said = messages(
        lambda: read_examples(path, TASK),
        lambda: init_task(path),
        lambda: read_texts(path),
        lambda: open_table(path, ".csv"),
    )
    assert len(said) == 1


def test_a_nul_is_a_control_character_among_others(tmp_path):
    path = write(tmp_path, b"text,label\nwhen was\0 it,pool\n")
    assert read_texts(path) == ["when was it"]
    assert "control-character" in {f.code for f in lint(TASK, path).findings}
    assert list(open_table(path, ".csv").values("text")) == ["when was\0 it"]


PIECES = st.sampled_from(
    ["text", "label", "Text", "a", "pool", "é", ",", ";", "\t", '"', "\n", "\r", "\r\n", " ", "\0",
     "sep=;", "sep=", "\ufeff", "{", "[", "'"]
)  # fmt: skip
FILES = st.lists(PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode())
HEADED = FILES.map(lambda data: b"text;label\n" + data)


@given(FILES | HEADED | st.binary(max_size=80), st.sampled_from(["q.csv", "q.tsv"]))
def test_any_file_gives_rows_or_one_line(tmp_path_factory, data, name):
    path = write(tmp_path_factory.mktemp("any"), data, name)
    for door in (
        lambda: scan_rows(path),
        lambda: read_examples(path, TASK),
        lambda: read_texts(path),
        lambda: open_table(path, ".csv"),
        lambda: lint(TASK, path),
    ):
        if message := refusal(door):
            assert message.isprintable()
            assert message.startswith(str(path))


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.lists(st.tuples(CELL, CELL), min_size=1), st.sampled_from([",", ";", "\t"]))
def test_quoted_tables_are_read_whatever_separates_them(tmp_path_factory, rows, separator):
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(map(quoted, row)) for row in [("text", "label"), *rows]]
    path = write(tmp_path_factory.mktemp("quoted"), "\n".join(lines).encode())
    found = scan_rows(path)
    assert not [row for row in found if isinstance(row, BadRow)]
    assert [row.text for row in found] == [text for text, _ in rows]
    with suppress(DataError):
        assert len(read_examples(path, TASK)) == len(rows)
