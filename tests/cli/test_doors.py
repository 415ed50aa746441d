"""The same file at every command that reads labelled questions: one reader, one set of rules."""

from __future__ import annotations

import io
import json

import pytest

from qcat.task import Task

ROWS = [("when was the pool pump replaced?", "pool"), ("who fixed the gate latch?", "fence")]


@pytest.fixture
def doors(call, house, tmp_path):
    """Gives a file to each command; what each says, by its name."""
    (tmp_path / "task.toml").write_text(Task("x", {"pool": "", "fence": ""}).to_toml())
    bundle = tmp_path / "house.gguf"
    bundle.write_bytes(house.read_bytes())

    def run(path):
        task = tmp_path / "task.toml"
        (tmp_path / "new.toml").unlink(missing_ok=True)
        # Those that would train or measure for long end at the base, which is not there.
        return {
            "lint": call("lint", task, path),
            "init": call("init", path, "-o", tmp_path / "new.toml"),
            "train": call("train", path, "-t", task, "--base", tmp_path / "no", "-o", "run"),
            "build": call("build", path, "--base", tmp_path / "no", "-o", tmp_path / "built"),
            "eval": call("eval", bundle, path, "--json"),
            "calibrate": call("calibrate", bundle, path),
            "off-topic": call("eval", bundle, tmp_path / "good.jsonl", "--off-topic", path),
        }

    good = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    return run


REFUSED = {
    "two columns": ("q.csv", b"text,label,text\na,pool,b\n", "two columns are called 'text'"),
    "Windows-1252": ("q.csv", b"text,label\ncaf\xe9,pool\n", "not UTF-8 (byte 0xE9, 'é' in"),
    "UTF-16": ("q.csv", "text,label\na,pool\n".encode("utf-16"), "not UTF-8 but UTF-16"),
    "a workbook": ("q.csv", b"PK\x03\x04....", "an Excel workbook or other ZIP file"),
    "a pointer": ("q.parquet", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    "a key twice": ("q.jsonl", b'{"text": "a", "text": "b", "label": "pool"}', "two values under"),
    "two lists": ("q.json", b'[\n{"text": "a", "label": "pool"}\n]\n[\n]', "more after the list"),
    "row names": ("q.csv", b'"text","label"\n"1","a","pool"\n', "row names: leave them out"),
    "a space before a quote": ("q.csv", b'text,label\n"a", "pool"\n', "a space between a sep"),
    "cut": ("q.jsonl", b'{"text": "a", "label"', "the line is cut off"),
    "other columns": ("q.csv", b"question\na\n", "there are 'question': rename 'question' to"),
}


def parquet(columns, rows):
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.Table.from_arrays(
        [list(column) for column in zip(*rows, strict=True)], names=columns
    )
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


REFUSED["two columns of Parquet"] = (
    "q.parquet",
    parquet(["text", "label", "label"], [("a", "pool", "fence")]),
    "two columns are called 'label'",
)


@pytest.mark.parametrize("case", list(REFUSED))
def test_each_command_names_what_is_wrong(case, doors, tmp_path):
    name, data, words = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    for door, done in doors(tmp_path / name).items():
        said = done.stderr + done.stdout
        assert words in said, (door, said)
        assert done.returncode == 1, door
        assert "unexpected" not in said, door


TAKEN = {
    "semicolons and other case": ("q.csv", "Text;LABEL\n{0};POOL\n{1};  Fence\n"),
    "a list": (
        "q.json",
        '[{{"text": "{0}", "label": "Pool"}},\n{{"text": "{1}", "label": "fence"}}]',
    ),
}


@pytest.mark.parametrize("case", list(TAKEN))
def test_each_command_takes_what_is_clear(case, doors, tmp_path):
    name, text = TAKEN[case]
    (tmp_path / name).write_text(text.format(ROWS[0][0], ROWS[1][0]))
    said = doors(tmp_path / name)
    assert "2 questions" in said["lint"].stdout
    assert "[format]" in said["lint"].stdout
    assert said["init"].returncode == 0
    assert "/no': no such folder" in said["train"].stderr
    for door in ("eval", "off-topic"):
        assert said[door].returncode == 0, said[door].stderr
    assert "q." not in said["calibrate"].stderr  # too few, but nothing is wrong with the file
