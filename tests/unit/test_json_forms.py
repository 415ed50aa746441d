"""JSON as people and programs write it: read where it is unambiguous, else one line that helps."""

from __future__ import annotations

import gzip
import json

import pytest
from doors import messages
from hypothesis import given
from hypothesis import strategies as st

from qcat.data.dataset import BadRow, read_examples, read_texts, scan_rows
from qcat.data.lint import lint
from qcat.data.tables import open_table
from qcat.errors import DataError
from qcat.task import Task
from qcat.workflows.init import init_task

TASK = Task("house", {"pool": "", "garden gate": ""})
ROWS = [
    {"text": "who fixed it?", "label": "garden gate"},
    {"text": "[pump]\u2028?", "label": "pool"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]

# The file, the lines where the rows begin, and what lint notes of it
READ = {
    "lines": ("\n".join(LINES), [1, 2], None),
    "a byte order mark, Windows line ends": ("\ufeff" + "\r\n".join(LINES) + "\r\n", [1, 2], None),
    "line ends of old Macs": ("\r".join(LINES), [1, 2], None),
    "blank lines": ("\n\n" + "\n \n".join(LINES) + "\n\n", [3, 5], None),
    "a list on one line": (json.dumps(ROWS), [1, 1], "one list of objects"),
    "a list over lines": (json.dumps(ROWS, indent=2), [2, 6], "one list of objects"),
    "a list of lines": ("[\n" + ",\n".join(LINES) + "\n]\n", [2, 3], "one list of objects"),
    "a list after a mark": ("\ufeff[" + ",".join(LINES) + "]", [1, 1], "one list of objects"),
    "a list with Windows line ends": (
        json.dumps(ROWS, indent=1).replace("\n", "\r\n"), [2, 6], "one list of objects",
    ),
    "objects over lines": (
        "\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5], "objects over several lines",
    ),
    "objects over lines, blank ones between": (
        "\n" + "\n\n".join(json.dumps(row, indent=1) for row in ROWS), [2, 7], "over several lines",
    ),
    "a list under a key": (json.dumps({"data": ROWS}), [1, 1], "the list under 'data'"),
    "a list under a key, over lines": (
        json.dumps({"version": "1", "rows": ROWS}, indent=1), [4, 8], "the list under 'rows'",
    ),
    "keys in capitals": (
        "\n".join(LINES).replace('"text"', '"Text"').replace('"label"', '"LABEL"'), [1, 2],
        "column 'Text' read as 'text', 'LABEL' read as 'label'",
    ),
    "labels spelled otherwise": (
        "\n".join(LINES).replace("garden gate", " Garden  GATE"), [1, 2], None,
    ),
    "Ctrl-Z at the end": ("\n".join(LINES) + "\n\x1a", [1, 2], None),
    "Ctrl-Z after a list": (json.dumps(ROWS) + "\x1a", [1, 1], "one list of objects"),
    "more keys": (
        "\n".join(json.dumps({"id": 1, **row, "meta": {"a": [1, None]}}) for row in ROWS), [1, 2],
        None,
    ),
}  # fmt: skip


def write(folder, data, name="q.jsonl"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(door):
    """What a door says of a file; None if it takes it."""
    try:
        door()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
@pytest.mark.parametrize("case", list(READ))
def test_every_door_reads(case, name, tmp_path):
    text, lines, note = READ[case]
    path = write(tmp_path, text, name)
    assert [row.line for row in scan_rows(path)] == lines
    labels = list(TASK.labels)
    assert [(e.text, labels[e.label]) for e in read_examples(path, TASK)] == [
        (" ".join(row["text"].split()), row["label"]) for row in ROWS
    ]
    assert len(read_texts(path)) == len(init_task(path).counts) == 2
    assert open_table(path, ".csv").count == 2
    notes = [f.message for f in lint(TASK, path).findings if f.code == "format"]
    assert len(notes) == (note is not None)
    assert not notes or note in notes[0]


BAD_LABELS = {
    "3": "int 3: write it as text, \"3\"",
    "3.5": "float 3.5: write it as text",
    "true": "bool true: write it as text",
    "null": "null: write words",
    "NaN": "NaN: write words",
    '["pool"]': '["pool"]: write one text',
    '{"a": 1}': '{"a": 1}: write one text',
}  # fmt: skip


@pytest.mark.parametrize("value", list(BAD_LABELS))
def test_a_label_that_is_no_text_is_named(value, tmp_path):
    path = write(tmp_path, f'{{"text": "a", "label": "pool"}}\n{{"text": "a", "label": {value}}}\n')
    for door in (lambda: read_examples(path, TASK), lambda: init_task(path)):
        with pytest.raises(DataError) as caught:
            door()
        assert f"q.jsonl:2: no text under 'label' but {BAD_LABELS[value]}" in str(caught.value)


A = '{"text": "a", "label": "pool"}'
# The file, the line, and the words that help
REFUSED = {
    "single quotes": ("{'text': 'a', 'label': 'pool'}", 1, "single quotes: JSON has double ones"),
    "single quotes for a value": ("{\"text\": 'a'}", 1, "single quotes"),
    "typographic quotes": ("{“text”: “a”}", 1, "typographic quotes: write straight ones"),
    "a comma after each object": (f"{A},\n{A},\n", 1, "a comma after the object: remove it"),
    "a comma before the brace": (
        '{"text": "a", "label": "pool",}',
        1,
        "a comma after the last value",
    ),
    "a comma before the bracket": (f"[\n{A},\n{A},\n]", 4, "a comma after the last object"),
    "no comma in a list": (f"[\n{A}\n{A}\n]", 3, "a comma or ] expected after the object"),
    "a list after a list": (
        f"[\n{A}\n]\n[\n{A}\n]\n",
        4,
        "more after the list, which has ended: make one list of all",
    ),
    "a line after a list": (f"[\n{A}\n]\n\n{A}\n", 5, "more after the list, which has ended"),
    "a comma after a list": (f"[{A}],", 1, "more after the list"),
    "a list a line": (f"[{A}]\n[{A}]\n", 1, "expected, found a list: write one object a line"),
    "a list after objects": (
        json.dumps(ROWS[0], indent=1) + f"\n[{A}]",
        5,
        "expected, found a list",
    ),
    "a byte order mark within": (f"{A}\n\ufeff{A}\n", 2, "a byte order mark within the file"),
    "a list that does not end": (f"[\n{A},\n{A}", 3, "the list does not end: ] expected"),
    "a list cut in an object": (f"[\n{A},\n{A[:-9]}", 3, "does not end"),
    "a cut text": (f'{A}\n{{"text": "a", "la', 2, "does not end: the line is cut off"),
    "a cut object": (f'{A}\n{{"text": "a"', 2, "it does not end: the line is cut off"),
    "a cut first line": (f'{{"text": "a",\n{A}', 1, "it does not end"),
    "objects on one line": (A * 2, 1, "several objects on one line: write one a line"),
    "objects on one line, spaced": (f"{A} {A}\n{A}", 1, "several objects on one line"),
    "Python's None": ('{"text": "a", "label": None}', 1, "None is not JSON"),
    "Python's True": ('{"text": True}', 1, "True is not JSON"),
    "keys without quotes": ('{text: "a"}', 1, "a key without double quotes in column 2"),
    "a backslash": ('{"text": "C:\\data", "label": "pool"}', 1, "a backslash in column"),
    "a tab in a text": (
        '{"text": "a\tb", "label": "pool"}',
        1,
        "control character U+0009 in a text",
    ),
    "a NUL in a text": (
        '{"text": "a\0b", "label": "pool"}',
        1,
        "control character U+0000 in a text",
    ),
    "a key twice": (
        '{"text": "a", "text": "b", "label": "pool"}',
        1,
        "two values under the key 'text'",
    ),
    "a key twice in a list": (
        '[{"text": "a", "label": "b",\n "label": "pool"}]',
        1,
        "two values under the key 'label'",
    ),
    "lists": ('["a", "pool"]\n["b", "pool"]', 1, '{"text": …, "label": …} expected'),
    "a list of lists": ('[["a", "pool"]]', 1, "expected"),
    "a list of texts": ('[\n"a"\n]', 2, "expected"),
    "numbers": ("1\n2\n", 1, "expected"),
    "words": ("who fixed it?\n", 1, "found 'who fixed it?'"),
    "CSV": ("text,label\na,pool\n", 1, "found 'text,label': write {…}, or name a CSV file .csv"),
    "deep lists": ("[" * 100_000, 1, "not a JSON object: nested too deeply"),
    "a long number": ('{"text": ' + "1" * 5000 + "}", 1, "a number too long"),
    "other keys": (
        '{"question": "a", "category": "pool"}',
        1,
        "rename 'question' to 'text' and 'category' to 'label'",
    ),
    "prompt and completion": (
        '{"prompt": "a", "completion": " pool"}',
        1,
        "rename 'prompt' to 'text' and 'completion' to 'label'",
    ),
    "a chat": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        1,
        "no keys 'text' and 'label' but a chat under 'messages'",
    ),
    "a chat of ShareGPT": (
        '{"conversations": [{"from": "human", "value": "a"}]}',
        1,
        "a chat under 'conversations'",
    ),
    "no keys": (A + "\n{}", 2, "no keys 'text' and 'label': there is none"),
    "two keys for one": (
        '{"Text": "a", "TEXT": "b", "label": "pool"}',
        1,
        "both 'Text' and 'TEXT' could be 'text'",
    ),
    "a list under another key": (
        json.dumps({"foo": ROWS}),
        1,
        "no keys 'text' and 'label' but nested values under 'foo': write one object a line",
    ),
    "two lists": (json.dumps({"data": ROWS, "rows": ROWS}), 1, "values under 'data' and 'rows'"),
    "splits": (json.dumps({"train": ROWS, "test": ROWS}), 1, "values under 'train' and 'test'"),
    "rows by number": (json.dumps({"0": ROWS[0], "1": ROWS[1]}), 1, "values under '0' and '1'"),
    "an export of an annotation tool": (
        json.dumps({"id": 1, "data": {"text": "a"}, "annotations": []}),
        1,
        "no keys 'text' and 'label' but nested values under 'data' and 'annotations'",
    ),
    "other keys beside nested ones": (
        json.dumps({"question": "a", "category": "pool", "meta": {"a": 1}}),
        1,
        "rename 'question' to 'text' and 'category' to 'label'",
    ),
    "columns of lists": (
        json.dumps({"text": ["a", "b"], "label": ["pool", "pool"]}, indent=1),
        1,
        'columns, not rows: write one object a line, {"text": …, "label": …} (pandas: to_json(',
    ),
    "columns of pandas": (
        json.dumps({"Text": {"0": "a"}, "Label": {"0": "pool"}}),
        1,
        "columns, not rows",
    ),
    "columns of other names": (
        json.dumps({"question": ["a"], "category": ["pool"]}),
        1,
        "columns, not rows",
    ),
    "numbers beside names": (
        '{"text": "a", "label": 3, "label_text": "pool"}',
        1,
        "the label is the number 3, its name stands under 'label_text': rename that to 'label'",
    ),
    "YAML": ("- text: a\n  label: pool\n", 1, "it looks like YAML: write JSON, one object a line"),
    "YAML with a mark": ("---\n- text: a\n", 1, "it looks like YAML"),
    "RTF": ("{\\rtf1 a}", None, "an RTF document: save it as plain text"),
    "a pickle": (b"\x80\x05\x95a", None, "a pickle of Python"),
    "Windows-1252": (
        A.encode() + b'\n{"text": "caf\xe9"}',
        2,
        "not UTF-8 (byte 0xE9, 'é' in Windows-1252)",
    ),
    "Windows-1252 in a list": (b'[\n{"text": "caf\xe9"}]', 2, "not UTF-8 (byte 0xE9"),
    "UTF-16": (A.encode("utf-16"), None, "not UTF-8 but UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": (A.encode("utf-16-le"), None, "not UTF-8 but UTF-16"),
    "gzip": (gzip.compress(A.encode()), None, "a gzip file: unpack it"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        None,
        "a Git LFS pointer",
    ),
    "nothing": (b"", None, "no questions in it"),
    "an empty list": (b"[ ]\n", None, "no questions in it"),
    "an empty list under a key": (b'{"data": []}', None, "no questions in it"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_one_line_says_what_is_wrong(case, tmp_path):
    data, line, words = REFUSED[case]
    path = write(tmp_path, data)
    place = f"{path}:{line}: " if line else f"{path}: "
    with pytest.raises(DataError) as caught:
        read_examples(path, TASK)
    message = str(caught.value)
    assert message.startswith(place)
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 200
    with pytest.raises(DataError) as caught:
        init_task(path)
    assert str(caught.value) == message
    if line:
        bad = next(row for row in scan_rows(path) if isinstance(row, BadRow))
        assert f"{path}:{bad.line}: {bad.problem}" == message
        assert bad.problem in [f.message for f in lint(TASK, path).findings]


@pytest.mark.parametrize(
    "case",
    ["single quotes", "a comma after each object", "a key twice", "Windows-1252", "UTF-16", "gzip",
     "a list after a list", "a line after a list",
     "objects on one line", "a list that does not end", "CSV"],
)  # fmt: skip
def test_all_doors_say_the_same(case, tmp_path):
    path = write(tmp_path, REFUSED[case][0])
    said = messages(
        lambda: read_examples(path, TASK),
        lambda: read_texts(path),
        lambda: open_table(path, ".csv"),
    )
    assert len(said) == 1


def test_a_row_with_a_list_of_objects_is_a_row(tmp_path):
    path = write(tmp_path, '{"text": "a", "data": [{"b": 1}]}')
    assert open_table(path, ".csv").columns == ("text", "data")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "label", "data", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
PIECES = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", '"', ",", ":", "\n", " ", "'", A, '"text"', "a", "é", "1"]
    ),
    max_size=20,
).map("".join)
FORMS = st.lists(JSON, max_size=3).flatmap(
    lambda values: st.sampled_from(
        [
            "\n".join(map(json.dumps, values)),
            "\n".join(json.dumps(value, indent=1) for value in values),
            json.dumps(values),
            json.dumps({"data": values}, indent=2),
        ]
    )
)


@given(FORMS | PIECES | st.binary(max_size=60))
def test_any_file_gives_rows_or_one_line(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("any"), data)
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


@given(
    st.lists(
        st.fixed_dictionaries({"text": st.text(min_size=1), "label": st.text()}),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([None, 1]),
)
def test_all_forms_hold_the_same_rows(tmp_path_factory, rows, indent):
    folder = tmp_path_factory.mktemp("forms")
    forms = [
        "\n".join(map(json.dumps, rows)),
        "\n".join(json.dumps(row, indent=1) for row in rows),
        json.dumps(rows, indent=indent),
        json.dumps({"n": 1, "data": rows}, indent=indent),
    ]
    found = []
    for number, text in enumerate(forms):
        read = scan_rows(write(folder, text, f"{number}.json"))
        found.append([(row.text, row.label) for row in read])
    assert found == [found[0]] * len(forms)
    assert [text for text, _ in found[0]] == [row["text"] for row in rows]
