"""`qcat batch`: files in and out, bad input, half-done work, and who may go on with it."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pexpect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcat import Classifier, DataError
from qcat.classifier import DEFAULT_MODEL
from qcat.data.tables import SUFFIXES
from qcat.errors import ServerError
from qcat.gguf.bundle import Bundle
from qcat.gguf.sections import TASK_KEY, section, write_sections
from qcat.workflows.batch import COLUMNS, batch
from qcat.workflows.journal import Answer, Journal

QCAT = Path(sys.executable).with_name("qcat")
TEXTS = [
    "When was the pool pump replaced?",
    "",
    "who fixed the gate latch",
    'the "AC", is\nblowing warm air',
    "What is the capital of Mongolia?",
    "pool " * 400,
    None,
]
MANY = [{"id": number, "text": f"who fixed the gate latch {number}"} for number in range(3000)]


@pytest.fixture(scope="module")
def house():
    with Classifier.open() as classifier:
        yield classifier


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """The model that comes with qcat, but its task asks for a review queue."""
    path = tmp_path_factory.mktemp("model") / "house.gguf"
    shutil.copy(DEFAULT_MODEL, path)
    task = section(Bundle.read(path).header, TASK_KEY, path)
    write_sections(path, {TASK_KEY: {**task, "review": "text"}})
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write(path, rows):
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path):
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.fixture
def folder(tmp_path):
    """A folder that holds nothing but input and output in the end."""
    yield tmp_path
    left = [path.name for path in tmp_path.iterdir() if path.name[0] == "." or ".part" in path.name]
    assert not left


@pytest.mark.parametrize("kind", SUFFIXES)
def test_rows_are_answered_as_ask_does(kind, folder, house):
    rows = [{"id": number, "text": text, "more": "é"} for number, text in enumerate(TEXTS)]
    source = write(folder / f"in{kind}", rows)
    asked = [house.ask(text) if text else None for text in TEXTS]
    for other in SUFFIXES:
        target = folder / f"out{other}"
        shown = []
        done = batch(house, source, target, progress=lambda *step, to=shown: to.append(step))
        assert (done.rows, done.before, done.failed, done.truncated) == (7, 0, 2, 1)
        assert (done.answered, done.abstained) == (4, 1)
        assert shown[0] == ("questions", 0, 7)
        assert shown[-1] == ("writing", 7, 7)
        found = read(target)
        assert [str(row["id"]) for row in found] == [str(number) for number in range(7)]
        for row, answer, text in zip(found, asked, TEXTS, strict=True):
            assert list(row) == ["id", "text", "more", *COLUMNS]
            assert (row["text"] or "") == (text or "")
            row = {name: None if row[name] == "" else row[name] for name in COLUMNS}
            if other == ".csv":
                row |= {name: json.loads(row[name]) for name in ("abstained", "truncated")}
                row["confidence"] = row["confidence"] and float(row["confidence"])
            if answer is None:
                assert "the question is empty" in row.pop("error")
                assert (row.pop("abstained"), row.pop("truncated")) == (True, False)
                assert set(row.values()) == {None}
            else:
                assert row["error"] is None
                assert row["label"] == answer.label
                assert row["confidence"] == pytest.approx(answer.confidence, abs=0.02)
                assert (row["abstained"], row["reason"]) == (answer.abstained, answer.reason)
                assert row["truncated"] == answer.truncated


def test_the_command(folder, qcat):
    source = write(folder / "in.csv", [{"question": text, "label": "x"} for text in TEXTS])
    args = ("batch", source, "--column", "question", "--prefix", "qcat_", "--threads", "1")
    done = qcat(*args, "-o", folder / "out.jsonl")
    assert done.returncode == 0
    assert done.stdout == (
        f"{folder}/out.jsonl: 7 rows: 4 answered, 1 abstained, 2 not asked "
        "(see the column qcat_error)\n"
    )
    assert done.stderr == (
        "qcat: warning: 1 questions of more than 256 tokens were cut (see the column "
        "qcat_truncated)\n"
    )
    first = read_jsonl(folder / "out.jsonl")[0]
    assert list(first) == ["question", "label", *(f"qcat_{name}" for name in COLUMNS)]
    assert (first["label"], first["qcat_label"]) == ("x", "pool")

    again = qcat(*args, "-o", folder / "out.jsonl")
    assert again.returncode == 1
    assert again.stderr == (
        f"qcat: error: {folder}/out.jsonl: exists already: move it away, or name another output\n"
    )
    done = qcat(*args, "-o", folder / "all.jsonl", "--threshold", "0")
    assert "5 answered, 0 abstained" in done.stdout
    done = qcat(*args, "-o", folder / "more.csv", "-m", "ollama:house")
    assert done.returncode == 2
    assert "--threads" in done.stderr


def test_a_model_with_a_review_queue_fills_none(folder, reviewed):
    assert Bundle.read(reviewed).task.review == "text"
    source = write(folder / "in.jsonl", [{"text": "who fixed the gate latch"}])
    env = {**os.environ, "XDG_DATA_HOME": str(folder / "data"), "QCAT_MODEL": str(reviewed)}
    command = [QCAT, "batch", source, "-o", folder / "out.jsonl", "--threshold", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "0 answered, 1 abstained" in done.stdout
    assert not (folder / "data").exists()


def test_without_pyarrow(folder):
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from qcat.cli import run\n"
        "sys.exit(run(['batch', *sys.argv[1:]]))\n"
    )
    for first, second, status in (
        (".csv", ".jsonl", 0),
        (".jsonl", ".csv", 0),
        (".csv", ".parquet", 1),
        (".parquet", ".csv", 1),
    ):
        source = write(folder / f"in{first}", [{"text": "who fixed the gate latch"}])
        target = folder / f"from{first[1:]}{second}"
        command = [sys.executable, "-c", code, source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status
        assert target.exists() == (status == 0)
        if status:
            assert done.stderr == (
                'qcat: error: pyarrow is not installed: pip install "qcat-llm[parquet]", or in a '
                'clone pip install -e ".[parquet]"\n'
            )


def test_progress_on_a_terminal_only(folder):
    source = write(folder / "in.jsonl", MANY[:1000])
    command = [str(source), "-o", str(folder / "out.csv")]
    shell = pexpect.spawn(str(QCAT), ["batch", *command], encoding="utf-8", dimensions=(24, 100))
    # Rows done, time left and rate, as tqdm shows them.
    shell.expect(r"questions: +\d+%.*\d+/1000 \[\d+:\d+<\d+:\d+, +[\d.]+it/s\]")
    shell.expect("writing: ")
    shell.expect("1000 rows: ")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0


def refuse(house, source, target, message, **options):
    with pytest.raises(DataError) as caught:
        batch(house, source, target, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(folder, house):
    source = write(folder / "in.csv", [{"text": "a", "error": "b", "qcat_label": "c"}])
    target = folder / "out.csv"
    refuse(house, folder / "no.csv", target, "no.csv: cannot be read: No such file")
    refuse(house, folder, target, "CSV, JSONL or Parquet expected")
    refuse(house, source, folder / "out.txt", "out.txt: CSV, JSONL or Parquet expected")
    refuse(house, source, source, "in.csv: is the input")
    (folder / "link.csv").symlink_to(source)
    refuse(house, source, folder / "link.csv", "link.csv: is the input")
    refuse(house, source, folder / "no" / "out.csv", "out.csv.part: cannot be written: No such")
    refuse(house, source, folder / f"{'x' * 300}.csv", "cannot be written: File name too long")
    refuse(house, source, folder / "a\0.csv", "no file can have this name")
    refuse(house, source, target, "no column 'q': name that of the questions with", column="q")
    refuse(house, source, target, "there are 'text', 'error' and 'qcat_label'", column="q")
    refuse(house, source, target, "has a column 'error' already: give those of the answers other")
    refuse(house, source, target, "has a column 'qcat_label' already", prefix="qcat_")
    refuse(house, source, target, "'\\udcff", prefix="\udcff")
    os.mkfifo(folder / "pipe.csv")
    refuse(house, folder / "pipe.csv", target, "pipe.csv: is no file")
    (folder / "is.csv").mkdir()
    refuse(house, source, folder / "is.csv", "is.csv: exists already")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refuse(house, folder / "bad.jsonl", target, "bad.jsonl:2: not a JSON object")


def test_a_text_that_is_none_spoils_its_own_row(folder, house):
    rows = [{"text": 3}, {"other": 1}, {"text": ["a"]}, {"text": "who fixed the gate latch"}]
    done = batch(house, write(folder / "in.jsonl", rows), folder / "out.jsonl")
    assert (done.failed, done.answered) == (3, 1)
    assert [row["error"] for row in read_jsonl(folder / "out.jsonl")] == [
        "no text but int: write words",
        "the question is empty: write one",
        "no text but list: write words",
        None,
    ]


@given(st.lists(st.text(st.characters()), min_size=1, max_size=4))
@settings(max_examples=30)
def test_any_text_has_an_answer_or_an_error(tmp_path_factory, house, texts):
    folder = tmp_path_factory.mktemp("any")
    source = write(folder / "in.jsonl", [{"text": text} for text in texts])
    done = batch(house, source, folder / "out.jsonl")
    found = read_jsonl(folder / "out.jsonl")
    assert [row["text"] for row in found] == texts
    assert done.rows == len(texts) == done.answered + done.abstained + done.failed
    for row in found:
        assert (row["label"] in house.task.labels) != (row["error"] is not None)


def test_a_name_that_is_no_utf8(folder, qcat):
    source = write(folder / "\udcff.jsonl", [{"text": "who fixed the gate latch"}])
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = qcat("batch", source, "-o", folder / "\udcfe.csv", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?.csv: 1 rows: 1 answered" in done.stdout


def test_a_link_to_nothing_is_written_through(folder, house):
    source = write(folder / "in.jsonl", [{"text": "who fixed the gate latch"}])
    (folder / "link.csv").symlink_to(folder / "real.csv")
    batch(house, source, folder / "link.csv")
    assert (folder / "link.csv").is_symlink()
    assert read(folder / "real.csv")[0]["label"] == "fence"


def test_the_name_of_a_link_says_what_to_write(folder, house):
    source = write(folder / "in.jsonl", [{"text": "who fixed the gate latch"}])
    (folder / "link.csv").symlink_to(folder / "real.data")
    batch(house, source, folder / "link.csv")
    assert read(folder / "link.csv")[0]["label"] == "fence"
    assert (folder / "real.data").is_file()


def test_a_long_name(folder, house):
    source = write(folder / "in.jsonl", [{"text": "who fixed the gate latch"}])
    target = folder / f"{'x' * 246}.csv"
    batch(house, source, target)
    assert read(target)[0]["label"] == "fence"


def test_blank_lines_are_rows_of_one_column(folder, house):
    source = folder / "in.csv"
    source.write_text("text\nwho fixed the gate latch\n\nwho fixed the gate latch\n\n")
    batch(house, source, folder / "out.csv")
    assert [(row["label"], row["error"]) for row in read(folder / "out.csv")] == [
        ("fence", ""),
        ("", "the question is empty: write one"),
        ("fence", ""),
    ]


def stop(house, source, target, rows, **options):
    """Begin a batch, and break off after so many rows."""

    def show(step, done, total):
        if done == rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(house, source, target, progress=show, **options)
    return Path(f"{target}.part")


def test_half_done_work_is_gone_on_with(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:100]), folder / "out.csv"
    part = stop(house, source, target, 30)
    assert len(part.read_bytes().splitlines()) == 31
    part.write_bytes(part.read_bytes()[:-5])  # as a kill or a full disk leaves it
    stop(house, source, target, 50)
    with part.open("ab") as file:
        file.write(b"\0" * 500)  # as a loss of power may leave it
    done = batch(house, source, target)
    assert (done.before, done.rows, done.answered + done.abstained) == (50, 100, 100)
    assert [row["id"] for row in read(target)] == [str(number) for number in range(100)]


def test_a_server_that_goes_silent(folder, house, monkeypatch):
    source, target = write(folder / "in.jsonl", MANY[:5]), folder / "out.csv"
    answer = house.ask_each

    def fall_silent(questions):
        yield from islice(answer(questions), 2)
        raise ServerError("house on http://127.0.0.1:11434: does not answer: start it")

    with monkeypatch.context() as patch:
        patch.setattr(house, "ask_each", fall_silent)
        with pytest.raises(ServerError, match=r"in\.jsonl: row 3: .*: start it: then rerun"):
            batch(house, source, target)
    assert batch(house, source, target).before == 2


def test_stopped_before_the_first_row_nothing_is_left(folder, house):
    source = write(folder / "in.jsonl", MANY[:10])
    assert not stop(house, source, folder / "out.csv", 0).exists()


def test_half_done_work_is_not_mixed_with_other(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:20]), folder / "out.csv"
    part = stop(house, source, target, 5)
    half = part.read_bytes()
    write(source, MANY[:21])
    said = refuse(house, source, target, f"{part}: is half-done work with another input: give")
    assert "or delete this file to begin anew" in said
    write(source, [{"q": 1, **row} for row in MANY[:20]])
    refuse(house, source, target, "with another input and another column: give", column="q")
    write(source, MANY[:20])
    with Classifier.open(threshold=0.5) as strict:
        refuse(strict, source, target, "with another threshold: give")
    write_jsonl(source, MANY[:19])
    with source.open("a") as file:
        file.write("no JSON\n")
    refuse(house, source, target, "in.jsonl:20: not a JSON object")
    write(source, MANY[:20])
    assert part.read_bytes() == half
    assert batch(house, source, target).before == 5


@pytest.mark.parametrize("rows", [5, 64, 100])
def test_stopped_and_given_again_is_not_stopped_to_the_last_digit(rows, folder, house):
    """Neighbours share a forward pass, which rounds: they are the same ones."""
    source = write(folder / "in.jsonl", MANY[:150])
    batch(house, source, folder / "whole.csv")
    stop(house, source, folder / "out.csv", rows)
    assert batch(house, source, folder / "out.csv").before == rows
    assert (folder / "out.csv").read_bytes() == (folder / "whole.csv").read_bytes()


def test_the_same_bytes_under_another_suffix_are_another_input(folder, house):
    source, target = folder / "in.csv", folder / "out.jsonl"
    # Separated by commas or by tabs, there are two columns, one of them `text`.
    source.write_text("text,x\ttext\n" + "who fixed the latch,a\twhy\n" * 5)
    part = stop(house, source, target, 2)
    (folder / "in.tsv").write_bytes(source.read_bytes())
    refuse(house, folder / "in.tsv", target, f"{part}: is half-done work with another input: give")
    assert batch(house, source, target).before == 2


def test_half_done_work_of_another_model(folder, house, reviewed):
    source, target = write(folder / "in.jsonl", MANY[:20]), folder / "out.csv"
    part = stop(house, source, target, 5)
    with Classifier.open(reviewed) as other:
        refuse(other, source, target, "with another model")
    part.unlink()


def test_a_file_of_another_name_is_left_alone(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:3]), folder / "out.csv"
    part = folder / "out.csv.part"
    part.write_text("mine\n")
    refuse(house, source, target, "out.csv.part: is not from qcat")
    assert part.read_text() == "mine\n"
    part.unlink()


def test_input_that_changes_on_the_way(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:20]), folder / "out.csv"

    def change(step, done, total):
        if (step, done) == ("questions", 20):
            write(source, MANY[1:21])

    refuse(house, source, target, "in.jsonl: was changed while it was worked on", progress=change)
    assert not target.exists()
    (folder / "out.csv.part").unlink()


@pytest.mark.parametrize("moment", [("questions", 20), ("writing", 1)])
@pytest.mark.parametrize("first", [".csv", ".jsonl"])
def test_input_that_grows_on_the_way(first, moment, folder, house):
    row = "id,text\n" if first == ".csv" else '{"id": "new", "text": "a"}\n'

    def grow(step, done, total):
        steps.append(step)
        if (step, done) == moment:
            with source.open("a") as file:
                file.write(row)

    for second in SUFFIXES:
        source, target, steps = folder / f"in{first}", folder / f"out{second}", []
        write(source, [{"id": "new", "text": ""} for _ in range(20)])
        said = refuse(house, source, target, "was changed while it was worked on", progress=grow)
        assert said.startswith(f"{source}: ")
        assert steps[-1] == moment[0] or moment[0] == "writing"  # not seen after the whole writing
        assert not target.exists()
        (folder / f"out{second}.part").unlink()


def test_an_input_that_grew_and_is_as_before_again(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:3]), folder / "out.csv"
    part = stop(house, source, target, 2)
    part.write_bytes(part.read_bytes() + part.read_bytes().splitlines(keepends=True)[1] * 2)
    refuse(house, source, target, f"out.csv.part: has more answers than {source} has rows: delete")
    part.unlink()


def test_killed_between_the_last_two_steps(folder, qcat):
    source, target = write(folder / "in.jsonl", MANY[:20]), folder / "out.parquet"
    part = folder / "out.parquet.part"
    with Classifier.open() as house:
        stop(house, source, target, 20)
        journal = part.read_bytes()
        batch(house, source, target)
    whole = target.read_bytes()

    part.write_bytes(journal)
    done = qcat("batch", source, "-o", target)
    assert done.stdout.startswith(f"{target}: 20 rows, 20 of them asked before: ")
    assert target.read_bytes() == whole
    assert not part.exists()

    # An output that is another's, or a journal that is not whole: nothing is removed.
    for output, kept in (
        (b"mine", journal),
        (whole, b"".join(journal.splitlines(keepends=True)[:-1])),
    ):
        target.write_bytes(output)
        part.write_bytes(kept)
        done = qcat("batch", source, "-o", target)
        assert done.stderr.startswith(f"qcat: error: {target}: exists already: ")
        assert (target.read_bytes(), part.read_bytes()) == (output, kept)
    part.unlink()


def test_a_folder_that_cannot_be_forced_to_the_disk(folder, house, monkeypatch):
    source, target = write(folder / "in.jsonl", MANY[:3]), folder / "out.csv"
    force = os.fsync

    def forced(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        force(file)

    monkeypatch.setattr(os, "fsync", forced)
    assert batch(house, source, target).rows == 3
    assert len(read(target)) == 3


def test_a_folder_without_locks(folder, house, monkeypatch):
    source, target = write(folder / "in.jsonl", MANY[:3]), folder / "out.csv"

    def lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", lock)
    refuse(
        house,
        source,
        target,
        f"out.csv.part: cannot be locked: {os.strerror(errno.ENOLCK)}: choose a folder on a local",
    )


def test_an_output_that_appears_on_the_way_is_not_overwritten(folder, house):
    source, target = write(folder / "in.jsonl", MANY[:20]), folder / "out.csv"

    def appear(step, done, total):
        target.write_text("mine")

    refuse(house, source, target, "out.csv: exists already", progress=appear)
    assert target.read_text() == "mine"
    target.unlink()
    assert batch(house, source, target).before == 20


def test_two_at_once(folder, qcat):
    source = write(folder / "in.jsonl", MANY[:3])
    part = folder / "out.csv.part"
    with Journal.open(part):
        done = qcat("batch", source, "-o", folder / "out.csv")
        assert done.returncode == 1
        assert done.stderr == (
            f"qcat: error: {part}: another process is at this work: wait for it, or name another "
            "output\n"
        )
        assert part.exists()
    assert qcat("batch", source, "-o", folder / "out.csv").returncode == 0


def test_many_at_once_have_one_winner(folder):
    source = write(folder / "in.jsonl", MANY[:50])
    command = [QCAT, "batch", source, "-o", folder / "out.csv"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate() for process in running]
    assert sorted(process.returncode for process in running) == [0, 1, 1, 1]
    for process, (_, error) in zip(running, said, strict=True):
        known = "exists already" in error or "another process is at this work" in error
        assert known == (process.returncode == 1)
    assert len(read(folder / "out.csv")) == 50


def test_ctrl_c(folder, qcat):
    source, target = write(folder / "in.jsonl", MANY), folder / "out.jsonl"
    process = subprocess.Popen(
        [QCAT, "batch", source, "-o", target],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    part = folder / "out.jsonl.part"
    while not (part.exists() and part.read_bytes().count(b"\n") > 1):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "qcat: stopped: rerun the command to resume\n"
    assert not target.exists()
    assert part.read_bytes().count(b"\n") > 1
    part.unlink()


def test_a_full_disk(folder, qcat):
    source, target = write(folder / "in.jsonl", MANY[:200]), folder / "out.csv"

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    command = [QCAT, "batch", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "out.csv.part: cannot be written:" in done.stderr
    assert "make room and rerun the command" in done.stderr
    assert not target.exists()
    done = qcat("batch", source, "-o", target)
    assert "200 rows" in done.stdout
    assert "of them asked before" in done.stdout
    assert [row["id"] for row in read(target)] == [str(number) for number in range(200)]

    # The answers have room and the output has not.
    target.unlink()
    write(source, [{"text": "", "more": "x" * 1000} for _ in range(30)])
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full)
    assert "out.csv: cannot be written: File too large: make room" in done.stderr
    assert qcat(*command[1:]).stdout.startswith(f"{target}: 30 rows, 30 of them asked before")


def test_the_journal_takes_back_what_it_was_given(tmp_path):
    answers = [
        Answer("pool", 0.1 + 0.2, False, None, False, None),
        Answer(None, None, True, None, False, "empty: \ud800 \n é"),
        Answer("fence", None, True, "off_topic", True, None),
    ]
    about = {"input": "é", "model": "m"}
    with Journal.open(tmp_path / "j") as journal:
        assert journal.begin(about) == 0
        for answer in answers:
            journal.add(answer)
        assert list(journal.answers()) == answers
    with Journal.open(tmp_path / "j") as journal:
        assert journal.begin(about) == 3
        assert list(journal.answers()) == answers


def test_the_journal_cut_at_any_byte(tmp_path):
    about = {"input": "i", "model": "m"}
    path = tmp_path / "j"
    answer = Answer("pool", 0.5, False, None, False, None)
    with Journal.open(path) as journal:
        journal.begin(about)
        for _ in range(2):
            journal.add(answer)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        with Journal.open(path) as journal:
            kept = journal.begin(about)
            assert kept == max(data[:size].count(b"\n") - 1, 0)
            journal.add(answer)
        assert path.read_bytes() == lines[0] + lines[1] * (kept + 1)
