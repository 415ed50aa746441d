"""`task.toml` as people write it: what is wrong is named in one line, and nothing is guessed."""

from __future__ import annotations

import gzip
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat.errors import TaskError
from qcat.task import Task
from qcat.task_toml import KEYS

HEAD = 'name = "x"\n'
LABELS = '[labels]\n"pool" = ""\n"fence" = ""\n'
JSON = "not valid TOML but JSON"
YAML = "it looks like YAML: write name"

READ = {
    "bare labels": HEAD + '[labels]\npool = ""\nfence = ""\n',
    "single quotes": "name = 'x'\n[labels]\n'pool' = ''\n'fence' = ''\n",
    "in one line": HEAD + 'labels = {pool = "", "fence" = ""}\n',
    "a byte order mark": "\ufeff" + HEAD + LABELS,
    "Windows line ends": (HEAD + LABELS).replace("\n", "\r\n"),
    "comments": f"# a task\n{HEAD}{LABELS}# the end",
    "keys of labels": HEAD + 'labels.pool = ""\nlabels.fence = ""\n',
}


@pytest.mark.parametrize("case", list(READ))
def test_what_is_read(case, tmp_path):
    (tmp_path / "task.toml").write_bytes(READ[case].encode())
    assert Task.read(tmp_path / "task.toml") == Task("x", {"pool": "", "fence": ""})


REFUSED = {
    "a key after the labels": (
        HEAD + LABELS + 'style = "chat"\n',
        "style is a key of the task, but stands among the labels: move it above [labels], or write "
        '"style" in quotes if it is a label',
    ),
    "the name after the labels": (
        LABELS + HEAD,
        "name is a key of the task, but stands among the labels",
    ),
    "a key among labels in one line": (
        'name = "x"\nlabels = {pool = "", answer = ""}\n',
        "answer is a key of the task",
    ),
    "a dotted label": (
        HEAD + '[labels]\ngarden.lights = ""\npool = ""\n',
        "label 'garden' has a table and no description: quote a name with a dot, as in "
        "'garden.lights' = \"\"",
    ),
    "a table for a label": (
        HEAD + '[labels]\npool = ""\n[labels.fence]\ndescription = ""\n',
        "label 'fence' has a table",
    ),
    "a label with a space": (
        HEAD + '[labels]\nwater heater = ""\n',
        'line 3: put the label in quotes, and a description after it, as in "water heater" = ""',
    ),
    "a label alone": (
        HEAD + "[labels]\npool\nfence\n",
        'line 3: put the label in quotes, and a description after it, as in "pool" = ""',
    ),
    "a label of other letters": (
        HEAD + '[labels]\ncafé = ""\n',
        'line 3: put the label in quotes, and a description after it, as in "café" = ""',
    ),
    "typographic quotes": (
        HEAD + "[labels]\n“pool” = “”\n",
        "line 3: typographic quotes: write straight ones",
    ),
    "typographic quotes in a value": ("name = “x”\n", "line 1: typographic quotes"),
    "a label twice": (
        HEAD + '[labels]\npool = ""\npool = ""\n',
        "line 4: 'pool' stands twice: keep one",
    ),
    "a label twice, once quoted": (
        HEAD + '[labels]\npool = ""\n"pool" = "a"\n',
        "line 4: '\"pool\"' stands twice",
    ),
    "a table twice": (HEAD + LABELS + "[labels]\n", "not valid TOML"),
    "JSON": ('{"name": "x", "labels": {"pool": ""}}', JSON),
    "JSON over lines": ('\n{\n  "name": "x"\n}', JSON),
    "YAML": ("name: x\nlabels:\n  - pool\n", f"line 1: {YAML}"),
    "YAML with a mark": ("---\nname: x\n", f"line 1: {YAML}"),
    "a list as in YAML": (HEAD + "[labels]\n- pool\n", f"line 3: {YAML}"),
    "a list of labels": (
        HEAD + 'labels = ["pool", "fence"]\n',
        "labels: a table expected, one line a label",
    ),
    "a text of labels": (HEAD + 'labels = "pool, fence"\n', "labels: a table expected"),
    "a truth": (
        HEAD + '[labels]\npool = true\nfence = ""\n',
        "label 'pool': description: text expected, found bool True: write it in quotes",
    ),
    "a number": (HEAD + '[labels]\npool = 1\nfence = ""\n', "found int 1: write it in quotes"),
    "a date": (HEAD + '[labels]\npool = 2026-01-01\nfence = ""\n', "text expected, found date"),
    "a list": (HEAD + '[labels]\npool = ["a"]\nfence = ""\n', "text expected, found list ['a']"),
    "labels of other case": (
        HEAD + '[labels]\npool = ""\nPool = ""\n',
        "labels 'pool' and 'Pool' differ only in case or spacing: keep one",
    ),
    "labels of other spaces": (
        HEAD + '[labels]\n"garden  gate" = ""\n"garden gate" = ""\n',
        "differ only in case or spacing",
    ),
    "a no-break space": (
        HEAD + '[labels]\n"garden\u00a0gate" = ""\n"garden gate" = ""\n',
        "differ only in case or spacing",
    ),
    "a zero-width space": (
        HEAD + '[labels]\n"pool\u200b" = ""\n"pool" = ""\n',
        "differ in the invisible U+200B: keep one",
    ),
    "a soft hyphen": (
        HEAD + '[labels]\n"pool" = ""\n"po\u00adol" = ""\n',
        "differ in the invisible U+00AD",
    ),
    "an emoji in another form": (
        HEAD + '[labels]\n"\u2764" = ""\n"\u2764\ufe0f" = ""\n',
        "differ in the invisible U+FE0F: keep one",
    ),
    "a mark of direction": (
        HEAD + '[labels]\n"pool\u200f" = ""\n"pool" = ""\n',
        "differ in the invisible U+200F",
    ),
    "Cyrillic letters": (
        HEAD + '[labels]\n"p\u043eol" = ""\n"pool" = ""\n',
        "look the same, but one has a CYRILLIC SMALL LETTER O: keep one",
    ),
    "a Greek letter": (
        HEAD + '[labels]\n"p\u03bf\u03bfl" = ""\n"pool" = ""\n',
        "one has a GREEK SMALL LETTER OMICRON",
    ),
    "a line break": (
        HEAD + '[labels]\n"pool\\nspa" = ""\nfence = ""\n',
        "control character U+000A: remove it",
    ),
    "no labels": (HEAD + "[labels]\n", "labels: 0 given, from 2 to 500"),
    "one label": (HEAD + '[labels]\npool = ""\n', "labels: 1 given"),
    "no table of labels": (HEAD, "key 'labels' is missing"),
    "nothing": ("", "is empty: write a task, or have `qcat init` make one"),
    "blank lines": ("\n \n", "is empty"),
    "an unknown key": (HEAD + "labl = 1\n" + LABELS, "unknown key 'labl': the keys are name"),
    "no instruction": (
        HEAD + 'instruction = ""\n' + LABELS,
        "instruction: is empty: write some text",
    ),
    "a name with spaces": ('name = "My House"\n' + LABELS, "name 'My House' cannot name a file"),
    "a name without quotes": ("name = house\n" + LABELS, "not valid TOML"),
    "an open quote": ('name = "x\n' + LABELS, "not valid TOML"),
    "Windows-1252": (
        (HEAD + '[labels]\n"caf').encode() + b'\xe9" = ""\n',
        ":3: not UTF-8 (byte 0xE9, 'é' in Windows-1252): save it as UTF-8",
    ),
    "UTF-16": ((HEAD + LABELS).encode("utf-16"), "not UTF-8 but UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": ((HEAD + LABELS).encode("utf-16-le"), "not UTF-8 but UTF-16"),
    "RTF": ("{\\rtf1 name}", "task.toml: an RTF document: save it as plain text"),
    "gzip": (gzip.compress(b"name"), "a gzip file: unpack it"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_one_line_says_what_is_wrong(case, tmp_path):
    data, words = REFUSED[case]
    path = tmp_path / "task.toml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(TaskError) as caught:
        Task.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert words in message
    assert message.isprintable()


def test_a_label_may_be_called_as_a_key_if_it_is_quoted():
    labels = dict.fromkeys(KEYS, "")
    assert Task.from_toml(Task("x", labels).to_toml()).labels == labels
    for quoted in ('"style"', "'style'", '  "style" '):
        task = Task.from_toml(f'{HEAD}[labels]\n{quoted} = ""\npool = ""\n')
        assert list(task.labels) == ["style", "pool"]
    assert Task.from_toml(HEAD + 'labels = {"style" = "", pool = ""}').labels["style"] == ""


@pytest.mark.parametrize(
    ("label", "spelled"),
    [
        ("pool", "pool"),
        ("POOL", "pool"),
        ("garden  gate", "garden gate"),
        ("Garden\u00a0Gate", "garden gate"),
        ("gardengate", None),
        ("pools", None),
        ("", None),
    ],
)
def test_a_label_in_another_spelling(label, spelled):
    assert Task("x", {"pool": "", "garden gate": ""}).spelled(label) == spelled


def refusal(door):
    """What a door says of a file; None if it takes it."""
    try:
        door()
    except TaskError as error:
        return str(error)
    return None


TEXTS = st.lists(
    st.sampled_from(
        [HEAD, LABELS, "[labels]\n", '"a b" = ""\n', "pool", " = ", '""', "\n", "name", "style",
         "“", ".", "{", "}", "[", "]", ": ", "- ", "\r\n", "é", "\u200b", "1", "'", '"""', "\\"]
    ),
    max_size=20,
).map("".join)  # fmt: skip


@given(TEXTS.map(str.encode) | st.binary(max_size=60))
def test_any_file_is_a_task_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "task.toml"
    path.write_bytes(data)
    if message := refusal(lambda: Task.read(path)):
        assert message.isprintable()
        assert message.startswith(f"{path}:")
    else:
        task = Task.read(path)
        assert Task.from_toml(task.to_toml()) == task


@given(st.dictionaries(st.text() | st.sampled_from(KEYS), st.text(), min_size=2, max_size=5))
def test_what_is_written_is_read(labels):
    with suppress(TaskError):
        task = Task("x", labels)
        assert Task.from_toml(task.to_toml()) == task
