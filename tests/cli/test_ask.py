"""`qcat ask` through the installed command, as a script uses it."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcat.charset import HEAD, foreign
from qcat.cli import COMMANDS
from qcat.cli.stdin_lines import available_lines


def test_prints_one_label_a_line(qcat, house, household):
    done = qcat("ask", "-m", house, "When was the pool pump replaced?", "and the fence")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert set(lines) <= set(household.labels)


def test_json_has_all_probabilities(qcat, house, household):
    done = qcat("ask", "-m", house, "--json", "When was the pool pump replaced?")
    row = json.loads(done.stdout)
    assert set(row["probabilities"]) == set(household.labels)
    assert abs(sum(row["probabilities"].values()) - 1) < 1e-9
    assert row["label"] == next(iter(row["probabilities"]))
    assert row["confidence"] == row["probabilities"][row["label"]]
    assert row["truncated"] is False


def test_reads_stdin_and_keeps_lines_apart(qcat, house):
    alone = qcat("ask", "-m", house, "--top", "2", "second")
    done = qcat("ask", "-m", house, "--top", "2", "-", input="first\n \nsecond\n")
    assert done.returncode == 1
    assert done.stderr == "qcat: error: question 2: the question is empty: write one\n"
    first, empty, second = done.stdout.splitlines()
    assert empty == "-"
    assert second.split("\t")[0].rsplit(" ", 1)[0] == alone.stdout.split("\t")[0].rsplit(" ", 1)[0]
    assert first != second


def test_a_slow_writer_is_answered_line_by_line(house):
    program = Path(sys.executable).with_name("qcat")
    with subprocess.Popen(
        [program, "ask", "-m", house, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for question in ("first?", "second?"):
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait() == 0


def test_odd_bytes_on_stdin(house):
    program = Path(sys.executable).with_name("qcat")
    text = b"\xef\xbb\xbfbom?\r\n\xff\xfe?\n\x00pool\x00?\nno line break at the end"
    done = subprocess.run([program, "ask", "-m", house, "--json"], input=text, capture_output=True)
    assert done.returncode == 1
    problem = "not UTF-8 (byte 0xFF, 'ÿ' in Windows-1252): save it as UTF-8"
    assert done.stderr.decode() == f"qcat: error: question 2: {problem}\n"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    asked = [row["question"] for row in rows]
    assert asked == ["bom?", "\ufffd\ufffd?", "\x00pool\x00?", "no line break at the end"]
    assert rows[1] == {"question": "\ufffd\ufffd?", "error": problem}
    assert all("label" in row for number, row in enumerate(rows) if number != 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("more", [(), ("--decode", "free")])
def test_utf16_on_stdin_is_named(house, encoding, more):
    program = Path(sys.executable).with_name("qcat")
    text = "who fixed it?\nwhen?\n".encode(encoding)
    done = subprocess.run([program, "ask", "-m", house, *more], input=text, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    name = "UTF-32" if "32" in encoding else "UTF-16"
    assert done.stderr.decode() == f"qcat: error: stdin: not UTF-8 but {name}: save it as UTF-8\n"


BINARY = {
    b"PK\x03\x04\x14\0\x06\0\n": "an Excel workbook or other ZIP file: save the table as CSV UTF-8",
    gzip.compress(b"who?\nwhen?\n"): "a gzip file: unpack it",
    b"%PDF-1.7\n%\xe2\xe3\n": "a PDF: save the table as CSV UTF-8",
    b"GGUF\x03\0\0\0": "a GGUF model: name a file of text",
}


@pytest.mark.parametrize("data", list(BINARY))
def test_what_is_no_text_on_stdin_is_named(house, data):
    program = Path(sys.executable).with_name("qcat")
    done = subprocess.run([program, "ask", "-m", house], input=data, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"qcat: error: stdin: {BINARY[data]}\n"


def test_lines_end_on_stdin_as_in_files(house):
    program = Path(sys.executable).with_name("qcat")
    text = b"GGUF models: which?\rBZh?\r\n%PDF-what?\nlast"
    done = subprocess.run([program, "ask", "-m", house, "--json"], input=text, capture_output=True)
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line)["question"] for line in done.stdout.splitlines()]
    assert asked == ["GGUF models: which?", "BZh?", "%PDF-what?", "last"]


@given(
    st.lists(st.binary(max_size=6) | st.sampled_from([b"\r", b"\n"]), max_size=12).map(b"".join),
    st.lists(st.integers(1, 4), min_size=1, max_size=8),
)
def test_lines_of_any_bytes_keep_their_number(data, sizes):
    """However they come: whole lines, and one for each in the input."""
    if foreign(data[:HEAD]):
        return
    ends = list(accumulate(sizes))
    pieces = [data[a:b] for a, b in pairwise([0, *ends])] + [data[ends[-1] :]]
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb", buffering=0) as sink:
        found = []
        lines = available_lines(source.fileno())
        for piece in pieces:
            sink.write(piece)
        sink.close()
        for group in lines:
            found += group
    wanted = re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf"))
    if data.endswith((b"\n", b"\r")) or not data:
        wanted.pop()
    assert len(found) == len(wanted)
    for line, given_bytes in zip(found, wanted, strict=True):
        assert line.text == given_bytes.decode(errors="replace")
        assert (line.error is None) == (line.text.encode() == given_bytes)


def test_a_closed_pipe_is_no_traceback(house):
    program = Path(sys.executable).with_name("qcat")
    command = f"yes 'pool?' | head -n 2000 | '{program}' ask -m '{house}' - | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_abstains_under_the_threshold_with_status_3(qcat, house):
    done = qcat("ask", "-m", house, "--threshold", "1", "anything?")
    assert (done.returncode, done.stdout) == (3, "-\n")
    done = qcat("ask", "-m", house, "--threshold", "1", "--abstain", "human", "anything?")
    assert (done.returncode, done.stdout) == (3, "human\n")


def test_says_why_it_abstains(qcat, house):
    def reason(*more):
        return json.loads(qcat("ask", "-m", house, "--json", *more, "who fixed it?").stdout)

    row = reason()
    best, second, *_ = row["probabilities"].values()
    assert row["reason"] is None
    assert reason("--threshold", best + second / 2)["reason"] == "ambiguous"
    assert reason("--threshold", best + second + 0.01)["reason"] == "low_confidence"


def test_too_long_is_cut_with_a_warning_or_refused(qcat, house):
    question = "pump " * 1000
    cut = qcat("ask", "-m", house, "--json", question)
    assert cut.returncode == 0
    assert cut.stderr == "qcat: warning: question 1 was cut: it is too long\n"
    assert json.loads(cut.stdout)["truncated"] is True
    refused = qcat("ask", "-m", house, "--strict", question)
    assert refused.returncode == 1
    assert "too long" in refused.stderr
    assert refused.stdout == "-\n"


def test_free_decoding_shows_what_the_model_says(qcat, house, household):
    done = qcat("ask", "-m", house, "--decode", "free", "When was the pump replaced?")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.strip() not in household.labels  # random weights know no label


def test_usage_errors_exit_with_2(qcat, house):
    assert qcat("ask", "-m", house, "--threshold", "2", "q").returncode == 2
    assert qcat("nonsense").returncode == 2


def test_a_missing_file_is_one_line(qcat, tmp_path):
    done = qcat("ask", "-m", tmp_path / "none.gguf", "q")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("qcat: error: ")


def test_help_has_an_example_on_every_command(call):
    for command in COMMANDS:
        done = call(command, "--help")
        assert done.returncode == 0
        assert "Example" in done.stdout, command


@pytest.mark.parametrize("more", [(), ("--decode", "free")])
def test_bytes_that_are_no_text_in_json(house, more):
    program = Path(sys.executable).with_name("qcat")
    command = [program, "ask", "-m", house, "--json", *more, b"caf\xe9?", b" "]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"qcat: error: question 2: the question is empty: write one\n"
    answered, empty = map(json.loads, done.stdout.splitlines())
    assert answered["question"] == "caf??"
    assert set(empty) == {"question", "error"}


NO_NUMBER = [
    ("ask", "--threshold", "nan", "q"),
    ("ask", "--set", "--coverage", "NaN", "q"),
    ("batch", "--threshold", "nan", "in.csv", "-o", "out.csv"),
    ("calibrate", "--threshold", "nan", "m.gguf"),
    ("calibrate", "--max-error", "nan", "m.gguf", "q.jsonl"),
    ("calibrate", "--max-error", "0.1", "--confidence", "-nan", "m.gguf", "q.jsonl"),
    ("drift", "--level", "nan", "log.jsonl"),
    ("retrain", "run", "--add", "q", "-o", "new", "--bundle", "old", "--max-loss", "nan"),
]


@pytest.mark.parametrize("args", NO_NUMBER, ids=lambda args: " ".join(args[:3]))
def test_nan_is_a_usage_error(call, args):
    done = call(*args)
    assert done.returncode == 2
    assert "is not a number" in done.stderr


def test_a_closed_stdin_is_a_usage_error(house):
    program = Path(sys.executable).with_name("qcat")
    command = f"'{program}' ask -m '{house}' <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stdin is closed" in done.stderr
    assert "unexpected" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to be had")
@pytest.mark.parametrize("args", [("ask", "x"), ("ask", "--json", "x", "y"), ("--help",)])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_one_line(args, unbuffered):
    program = Path(sys.executable).with_name("qcat")
    run = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [program, *args], stdout=full, stderr=subprocess.PIPE, text=True, env=run
        )
    assert done.returncode == 1
    assert done.stderr.startswith("qcat: error: stdout cannot be written: No space left")
    assert done.stderr.count("\n") == 1


def test_a_dash_stands_alone(qcat):
    done = qcat("ask", "-", "who fixed it")
    assert (done.returncode, done.stdout) == (2, "")
    assert "- stands for stdin, alone" in done.stderr


def test_stdout_that_is_closed_from_the_start():
    program = Path(sys.executable).with_name("qcat")
    done = subprocess.run(f"'{program}' ask x >&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "qcat: error: stdout is closed: send it somewhere\n",
    )
