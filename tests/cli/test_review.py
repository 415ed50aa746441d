"""The review queue: what it keeps, what it refuses, and how a person answers it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import unicodedata
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
import pytest
from chromium import Page, needs_chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import LABELS, prediction

from qcat.classifier import Classifier
from qcat.cli import review_terminal
from qcat.cli.review_walk import (
    Answer,
    Quit,
    Walk,
    Withdraw,
    by_key,
    keys,
    screen,
    shown,
    width,
    wrap,
)
from qcat.data import near
from qcat.data.dataset import read_examples, read_texts
from qcat.data.split import split_examples
from qcat.errors import DataError, RecordError, ReviewError, TaskError
from qcat.monitor.log import read_log
from qcat.monitor.recorder import Recorder
from qcat.monitor.review import LABEL_KEYS, NONE, Decided, Entry, ReviewQueue, question_hash
from qcat.monitor.review_csv import questions_csv
from qcat.monitor.review_import import read_answers
from qcat.monitor.review_page import review_page
from qcat.monitor.review_rows import group_names, training_rows
from qcat.task import Task

EVIL = "</script><!--<script>alert('1')\x1b[2J\u202e & \"q\" \u2028 {"
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
QUESTION = TEXT.filter(
    lambda text: any(not c.isspace() and unicodedata.category(c) != "Cc" for c in text)
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queue.db"


def opened(path, *, task="sorts", labels=LABELS, keep_text=True):
    return ReviewQueue.open(path, task=task, labels=labels, keep_text=keep_text)


def filled(path, *questions):
    """The file, with questions that were left to a person."""
    with opened(path) as queue:
        for question in questions:
            queue.add(question, prediction())
    return path


def entry(text="who fixed it?", top=(("pool", 0.5), ("car", 0.25)), seen=1):
    return Entry(question_hash(text), text, seen, "pool", "ambiguous", tuple(top))


# The file


def test_a_question_is_kept_once_and_counted(path):
    with opened(path) as queue:
        queue.add("Is the café  open?", prediction("pool"))
        queue.add("other", prediction())
        queue.add(" is the CAFE\u0301 open?\n", prediction("car", 0.7, reason="ambiguous"))
    with ReviewQueue.existing(path) as queue:
        first, second = queue.pending()  # the one seen more often comes first
        assert (queue.task, queue.labels) == ("sorts", LABELS)
    assert (first.text, first.seen, second.seen) == ("Is the café open?", 2, 1)
    assert (first.label, first.reason) == ("car", "ambiguous")  # the latest
    assert first.top[0] == ("car", 0.7)
    assert first.hash == question_hash("is the café open?")


def test_an_answer_stays_when_the_question_comes_again(path):
    with opened(path) as queue:
        queue.add("who?", prediction())
        [one] = queue.pending()
        queue.answer(one.hash, "car")
        queue.add("who?", prediction())
        assert queue.pending() == []
        assert queue.decided() == [Decided(one.hash, "who?", "car")]
        queue.answer(one.hash, None)
        assert queue.decided()[0].label is None
        queue.withdraw(one.hash)
        assert [again.seen for again in queue.pending()] == [2]
        assert queue.counts().total == queue.counts().pending == 1


def test_an_old_server_gives_no_probabilities(path):
    with opened(path) as queue:
        bare = replace(prediction("car"), probabilities={}, confidence=None, label_mass=None)
        queue.add("who?", bare)
        [one] = queue.pending()
    assert (one.label, one.top) == ("car", ())
    assert by_key(LABELS, one)["1"] == "car"


def test_without_text_only_a_hash_is_in_the_file(path):
    with opened(path, keep_text=False) as queue:
        queue.add("a secret question?", prediction())
        assert queue.pending() == []
        assert queue.counts().unreadable == 1
    assert b"secret" not in path.read_bytes()
    with opened(path) as queue:  # another process keeps texts
        queue.add("a secret question?", prediction())
        assert queue.pending()[0].seen == 2


STEP = st.tuples(
    st.sampled_from(["add", "answer", "withdraw"]),
    st.sampled_from(["one", "two", "THREE", "three", "four?"]),
    st.sampled_from([None, *LABELS]),
)


@given(st.lists(STEP, max_size=30))
@settings(max_examples=15)
def test_the_queue_is_what_a_dictionary_would_be(tmp_path_factory, steps):
    seen: dict[str, int] = {}
    answers: dict[str, str | None] = {}
    with opened(tmp_path_factory.mktemp("queue") / "queue.db") as queue:
        for what, question, label in steps:
            key = question_hash(question)
            if what == "add":
                queue.add(question, prediction())
                seen[key] = seen.get(key, 0) + 1
            elif key not in seen:
                with pytest.raises(ReviewError, match="no question with the hash"):
                    queue.answer(key, label) if what == "answer" else queue.withdraw(key)
            elif what == "answer":
                queue.answer(key, label)
                answers[key] = label
            else:
                queue.withdraw(key)
                answers.pop(key, None)
        assert {one.hash: one.seen for one in queue.pending()} == {
            key: count for key, count in seen.items() if key not in answers
        }
        assert {one.hash: one.label for one in queue.decided()} == answers
        assert queue.counts().total == len(seen)


@given(QUESTION)
def test_a_hash_minds_neither_case_nor_space_nor_form(question):
    spaced = f"\n {question.replace(' ', '  ')}\t"
    assert question_hash(spaced) == question_hash(question)
    assert question_hash(unicodedata.normalize("NFD", question)) == question_hash(question)
    assert question_hash(question.casefold()) == question_hash(question)
    assert question_hash(f"{question} more") != question_hash(question)


@given(st.lists(QUESTION, max_size=5))
@settings(max_examples=15)
def test_any_question_is_kept(tmp_path_factory, questions):
    with opened(tmp_path_factory.mktemp("queue") / "queue.db") as queue:
        for question in questions:
            queue.add(question, prediction())
        assert {one.hash for one in queue.pending()} == set(map(question_hash, questions))
        assert all(question_hash(one.text) == one.hash for one in queue.pending())


def table(path, script):
    database = sqlite3.connect(path)
    database.executescript(script)
    database.close()


def cut(path):
    """A queue whose second half is overwritten."""
    filled(path, *(f"question {number}" for number in range(30)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff" * (len(data) // 2))


DEEP = "[" * 100_000
NO_QUEUE = {
    "text": lambda path: path.write_text("no database\n" * 100),
    "another database": lambda path: table(path, "CREATE TABLE notes (text)"),
    "another program's": lambda path: table(path, "PRAGMA application_id = 7"),
    "a later version": lambda path: (filled(path), table(path, "PRAGMA user_version = 2")),
    "a folder": lambda path: path.mkdir(),
    "lost tables": lambda path: (filled(path), table(path, "DROP TABLE queue")),
    "labels that are none": lambda path: (
        filled(path), table(path, "UPDATE queue SET labels = '[1, 2]'"),
    ),
    "labels that are a text": lambda path: (
        filled(path), table(path, "UPDATE queue SET labels = '\"pool\"'"),
    ),
    "no labels": lambda path: (filled(path), table(path, "UPDATE queue SET labels = '[]'")),
    "deep labels": lambda path: (
        filled(path), table(path, f"UPDATE queue SET labels = '{DEEP}'"),
    ),
    "no JSON": lambda path: (filled(path), table(path, "UPDATE queue SET labels = 'pool'")),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_QUEUE)
def test_what_is_no_queue_is_refused_and_left_alone(path, kind):
    NO_QUEUE[kind](path)
    before = path.read_bytes() if path.is_file() else None
    for open_it in (opened, ReviewQueue.existing):
        with pytest.raises(ReviewError, match=re.escape(str(path))) as caught:
            open_it(path)
        assert str(caught.value).isprintable()
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE questions SET top = 'x'",
        "UPDATE questions SET top = '[[1]]'",
        "UPDATE questions SET top = '[[1, 0.5]]'",
        "UPDATE questions SET top = '[[\"pool\", NaN]]'",
        f"UPDATE questions SET top = '[[\"pool\", {10**400}]]'",
        f"UPDATE questions SET top = '{DEEP}'",
        "UPDATE questions SET seen = 'often'",
        "UPDATE questions SET seen = 1.5",
        "UPDATE questions SET label = x'ff'",
        "UPDATE questions SET reason = x'ff'",
        "UPDATE questions SET hash = 'f'",
        "UPDATE questions SET text = ''",
        "UPDATE questions SET text = x'ff'",
        "UPDATE questions SET text = CAST(x'ff' AS TEXT)",
        "DROP TABLE questions",
    ],
)
def test_a_queue_that_holds_nonsense_is_one_error(path, script):
    filled(path, "who?")
    table(path, script)
    with ReviewQueue.existing(path) as queue, pytest.raises(ReviewError, match="damaged"):
        queue.pending()


def test_an_answer_that_is_no_label_is_nonsense_too(path):
    filled(path, "who?")
    table(path, "UPDATE questions SET answer = 'x', answered_at = 'now'")
    with ReviewQueue.existing(path) as queue, pytest.raises(ReviewError, match="damaged"):
        queue.decided()


@pytest.mark.parametrize("what", ["hash = 'f'", "text = 'when?'", "text = ' '", "text = x'ff'"])
def test_a_hash_that_is_not_of_its_text_is_nonsense_too(qcat, path, what):
    with opened(path) as queue:
        queue.add("who?", prediction())
        queue.answer(question_hash("who?"), "car")
    table(path, f"UPDATE questions SET {what}")
    with ReviewQueue.existing(path) as queue:
        for read in (queue.decided, queue.texts):
            with pytest.raises(ReviewError, match="damaged"):
                read()
    if what.startswith("hash"):
        done = qcat("review", "export", path, "-o", path.with_name("more.jsonl"))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"qcat: error: {path}: is damaged")


def test_an_answer_cannot_bring_another_questions_text(path):
    with opened(path, keep_text=False) as queue:
        queue.add("who?", prediction())
        for text in ("when?", " "):
            with pytest.raises(ReviewError, match="a text is not that of hash"):
                queue.answer_all([Decided(question_hash("who?"), text, "car")])
        assert queue.decided() == []


@pytest.mark.parametrize("link", [False, True])
def test_a_queue_is_for_its_owner_alone(path, link):
    file = path.with_name("elsewhere.db") if link else path
    if link:
        path.symlink_to(file)
    before = os.umask(0)
    try:
        with opened(path) as queue:
            queue.add("who?", prediction())
            with queue._transaction():
                queue._db.execute("UPDATE questions SET seen = 2")
                journal = file.with_name(f"{file.name}-journal")
                assert journal.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o660)  # shared since: that is the owner's to say
        opened(path).close()
        assert file.stat().st_mode & 0o777 == 0o660
    finally:
        os.umask(before)


def test_a_damaged_file_is_one_error(path):
    cut(path)
    with pytest.raises(ReviewError, match="damaged"), ReviewQueue.existing(path) as queue:
        queue.pending()


def test_a_queue_of_another_task_or_other_labels_is_refused(path):
    filled(path)
    with pytest.raises(ReviewError, match="of task 'sorts', not of 'house'"):
        opened(path, task="house")
    with pytest.raises(ReviewError, match="other labels"):
        opened(path, labels=LABELS[1:])
    opened(path, labels=LABELS[::-1]).close()  # another order is the same labels


def test_an_empty_file_becomes_a_queue(path):
    path.touch()  # as a process leaves it that is killed before it comes further
    with opened(path) as queue:
        assert queue.counts().total == 0


@pytest.mark.parametrize("name", ["no/such/folder/queue.db", "a\0b", "\udcff", "x" * 300])
def test_a_name_that_cannot_be_is_one_error(tmp_path, name):
    for open_it in (opened, ReviewQueue.existing):
        with pytest.raises(ReviewError):
            open_it(tmp_path / name)


@pytest.mark.parametrize("name", [":memory:", "a?mode=memory", "100%.db", "file:x.db"])
def test_a_name_means_a_file_and_nothing_else(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    filled(Path(name), "who?")
    assert (tmp_path / name).is_file()
    with ReviewQueue.existing(name) as queue:
        assert queue.counts().pending == 1


def test_a_file_that_cannot_be_written_is_one_error(unprivileged_folder):
    path = unprivileged_folder / "queue.db"
    filled(path, "who?")
    path.chmod(0o400)
    with opened(path) as queue, pytest.raises(ReviewError, match="cannot be written"):
        queue.add("who?", prediction())


# The task, the classifier and `qcat ask`


def test_a_task_asks_for_a_queue_but_names_no_file():
    labels = {"a": "", "b": ""}
    task = Task("sorts", labels, review="hash")
    assert Task.from_toml(task.to_toml()) == task
    assert "review" not in Task("sorts", labels).to_dict()  # what is off is not written
    for wrong in ("/etc/passwd", "", True, 1, ["text"], {}):
        with pytest.raises(TaskError, match=r"review .* is not one of text, hash"):
            Task.from_dict({"name": "sorts", "labels": labels, "review": wrong})


def test_abstentions_go_into_the_queue(house, path):
    questions = ["who fixed it?", "how much?", "who fixed it?", "when?"]
    with (
        Classifier.open(house, threshold=1) as classifier,
        Recorder.open(classifier, review=path) as recorder,
    ):
        for question, prediction in zip(questions, classifier.ask_many(questions), strict=True):
            recorder.add(question, prediction)
    with Classifier.open(house) as sure, Recorder.open(sure, review=path) as recorder:
        answer = sure.ask("never left to a person")
        assert not answer.abstained
        recorder.add("never left to a person", answer)
    with ReviewQueue.existing(path) as queue:
        assert [(one.text, one.seen) for one in queue.pending()] == [
            ("who fixed it?", 2), ("how much?", 1), ("when?", 1),
        ]  # fmt: skip


def test_both_places_are_tried_and_named(house, path, tmp_path):
    log = tmp_path / "log"
    with (
        Classifier.open(house, threshold=1) as classifier,
        Recorder.open(classifier, review=path, log=log) as recorder,
    ):
        answer = classifier.ask("who?")
        table(path, "DROP TABLE questions")
        with pytest.raises(RecordError, match="damaged"):
            recorder.add("who?", answer)
        assert len(read_log(log).records) == 1
        log.unlink()
        log.mkdir()
        with pytest.raises(RecordError) as caught:
            recorder.add("who?", answer)
        assert [type(error) for error in caught.value.errors] == [DataError, ReviewError]


def test_a_models_own_queue_lies_in_the_users_folder(
    qcat, bundle_file, household, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for kind in ("text", "hash"):
        task = household.replace(name=f"own-{kind}", review=kind)
        model = bundle_file(task)
        ask = ("ask", "-m", model, "--threshold", "1")
        assert qcat(*ask, "not kept").returncode == 3
        assert not (tmp_path / "qcat" / "review" / f"own-{kind}.db").exists()
        assert qcat(*ask, "--review-default", "a secret?").returncode == 3
        assert qcat("ask", "-m", model, "--decode", "free", "another?").returncode == 0
        file = tmp_path / "qcat" / "review" / f"own-{kind}.db"
        assert (b"secret" in file.read_bytes()) == (kind == "text")
        rows = tmp_path / "page.html"
        done = qcat("review", "html", "-m", model, "-o", rows)
        assert done.returncode == 0
        assert ("kept as hashes only" in done.stderr) == (kind == "hash")
    # What is measured is not left to a person: its labels are known, and it would leak.
    with Classifier.open(model, threshold=1) as classifier:
        classifier.ask("not queued")
    with ReviewQueue.existing(file) as queue:
        assert queue.counts().total == 1


def test_a_full_disk_ends_ask_after_the_answer(house, path):
    program = Path(sys.executable).with_name("qcat")
    command = f"ulimit -f 40; exec '{program}' ask -m '{house}' --threshold 1 --review '{path}'"
    questions = [f"question {number} {'word ' * 100}" for number in range(200)]
    done = subprocess.run(
        ["bash", "-c", command], input="\n".join(questions), capture_output=True, text=True
    )
    assert done.returncode == 1
    taken = len(done.stdout.splitlines()) - 1
    assert 0 < taken < len(questions)
    assert re.fullmatch(
        rf"qcat: error: question {taken + 1}: {re.escape(str(path))}: .*make room.*\n", done.stderr
    )
    with ReviewQueue.existing(path) as queue:
        assert queue.counts().pending == taken


def test_ask_refuses_a_file_that_is_no_queue(qcat, house, tmp_path):
    done = qcat("ask", "-m", house, "--review", house, "who?")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"qcat: error: {house}: is no review queue: name another file\n"
    assert qcat("ask", "-m", house, "--review", "x", "--decode", "free", "who?").returncode == 2


# Answers that come back


def test_from_ask_to_training(qcat, house, household, tmp_path):
    database, answers = tmp_path / "house.db", tmp_path / "answers.csv"
    questions = ["who cleaned the pool?", "Who cleaned the pool??", "the fence", "what is love?"]
    env = {**os.environ, "QCAT_REVIEW": str(database)}
    done = qcat("ask", "-m", house, "--threshold", "1", *questions, env=env)
    assert (done.returncode, done.stderr) == (3, "")
    with answers.open("w", newline="") as file:
        rows = zip(questions, ["pool", "pool", "", NONE.title()], strict=True)
        csv.writer(file).writerows([("text", "label"), *rows])
    done = qcat("review", "import", answers, env=env)
    assert done.stdout == f"{answers}: 3 answers taken; 1 questions wait\n", done.stderr

    more, strangers = tmp_path / "more.jsonl", tmp_path / "strangers.jsonl"
    done = qcat("review", "export", database, "-o", more, "--off-topic", strangers)
    assert done.returncode == 0, done.stderr
    one, two = read_examples(more, household)
    assert [one.text, two.text] == questions[:2]
    assert one.group == two.group
    assert list(household.labels)[one.label] == "pool"
    assert read_texts(strangers) == ["what is love?"]
    again = tmp_path / "again.jsonl"
    qcat("review", "export", database, "-o", again)
    assert again.read_bytes() == more.read_bytes()


def test_hashes_come_back_by_text_or_hash(qcat, path, tmp_path):
    with opened(path, keep_text=False) as queue:
        for question in ("one?", "two?", "three?"):
            queue.add(question, prediction())
    answers, more = tmp_path / "answers.csv", tmp_path / "more.jsonl"
    answers.write_text(
        f"hash,text,label\n,ONE?,pool\n{question_hash('two?')},,car\n{question_hash('three?').upper()},Three?,car\n"
    )
    assert qcat("review", "import", answers, path).returncode == 0
    done = qcat("review", "export", path, "-o", more)
    assert "1 answered questions are kept as hashes only" in done.stderr
    assert [json.loads(line)["text"] for line in more.read_text().splitlines()] == [
        "ONE?",
        "Three?",
    ]


WHO = question_hash("who?")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text,label\nwho?,pool\nwho?,car\n", ":3: another label than at"),
        ("a.csv", "text,label\nwho?,pool\nwhen?,pond\n", ":3: label 'pond' is none of the queue's"),
        ("a.csv", 'text,label\n"wh\no?",pool\nnever asked,pool\n', ":4: no such question"),
        ("a.csv", "text,label\nwho?,pool\n'=1,pool\n", ":3: no such question"),
        ("a.csv", f"hash,label\n{WHO},pool\n{'f' * 64},car\n", ":3: no such question"),
        ("a.csv", f"hash,text,label\n,who?,pool\n{WHO},when?,car\n", ":3: the text is not that"),
        ("a.csv", f"hash,text,label\n{WHO},,pool\n,,car\n", ":3: names no question"),
        ("a.csv", "text,label\nwho?,pool\nwhen?,'\n", ":3: label \"'\" is none of the queue's"),
        ("a.csv", "id,label\n1,pool\n", ":1: a header line with label and one of hash or text"),
        ("a.csv", "text,label\nwho?,pool\nwhen?,pool,car\n", ":3: more fields than columns"),
        ("a.csv", 'text,label\nwho?,pool\n"when?\n', ":3: not CSV"),
        ("a.csv", "text,sort\nwho?,pool\n", ":1: a header line with label and one of"),
        ("a.csv", "", ":1: a header line"),
        ("a.csv", "text,label\nwho?,pool\n\x01,car\n", ":3: the question is empty"),
        ("a.json", "nothing", ": not JSON"),
        ("a.json", "[" * 100_000, ": not JSON"),
        ("a.json", "[]", ": not what the page"),
        ("a.json", '{"format": "qcat-review", "task": "house"}', ": has answers for task 'house'"),
        ("a.json", '{"format": "qcat-review", "task": "sorts", "answers": 1}', ": a list of"),
    ],
)  # fmt: skip
def test_an_import_is_whole_or_nothing(qcat, path, tmp_path, name, text, said):
    filled(path, "who?", "when?", "wh o?")
    (tmp_path / name).write_text(text)
    done = qcat("review", "import", tmp_path / name, path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"qcat: error: {tmp_path / name}{said}")
    assert done.stderr.count("\n") == 1
    with ReviewQueue.existing(path) as queue:
        assert queue.decided() == []


@pytest.mark.parametrize(
    "answer",
    ["7", '{"label": "pool"}', '{"hash": 1}', '{"hash": "x"}', '{"hash": "x", "label": 1}'],
)
def test_an_answer_of_the_page_is_checked(path, tmp_path, answer):
    (tmp_path / "a.json").write_text(
        f'{{"format": "qcat-review", "task": "sorts", "answers": [{answer}]}}'
    )
    with opened(path) as queue, pytest.raises(ReviewError, match=r"answer 1: .* expected"):
        read_answers(tmp_path / "a.json", queue)


@given(
    st.binary(max_size=200) | TEXT.map(lambda text: f"text,label\n{text}".encode()), st.booleans()
)
@settings(max_examples=50)
def test_any_file_is_read_or_refused(tmp_path_factory, data, as_csv):
    folder = tmp_path_factory.mktemp("import")
    file = folder / ("a.csv" if as_csv else "a.json")
    file.write_bytes(data)
    with opened(folder / "queue.db") as queue, suppress(ReviewError):
        assert read_answers(file, queue) == []


def test_a_sheet_is_filled_in_and_comes_back(qcat, path, tmp_path):
    with opened(path) as queue:
        queue.add("when?", prediction("car"))
        for _ in range(2):
            queue.add("=1+1 is what, in the café?", prediction())
        queue.add("answered", prediction())
        queue.answer(question_hash("answered"), "pool")
    with opened(path, keep_text=False) as queue:
        queue.add("hidden", prediction())
    sheet = tmp_path / "sheet.csv"
    done = qcat("review", "csv", path, "-o", sheet)
    assert (
        done.stdout
        == f"{sheet}: 3 questions: fill in the column label, and `qcat review import` it\n"
    )
    assert "1 questions are kept as hashes only" in done.stderr
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbfhash,text,seen,suggested,label\r\n")
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["text"], row["seen"], row["suggested"], row["label"]) for row in rows] == [
        ("'=1+1 is what, in the café?", "2", "pool", ""), ("when?", "1", "car", ""),
        ("", "1", "pool", ""),
    ]  # fmt: skip
    done = qcat("review", "import", sheet, path)  # nothing is filled in yet
    assert done.stdout.startswith(f"{sheet}: 0 answers taken; 2 questions wait")
    for row, label in zip(rows, ["fence", NONE, "car"], strict=True):
        row["label"] = label
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    done = qcat("review", "import", sheet, path)
    assert done.stdout.startswith(f"{sheet}: 3 answers taken; 0 questions wait"), done.stderr
    sheet.write_text('text,label\n"\'=1+1 is what, in the café?",car\n')  # without the hash
    assert qcat("review", "import", sheet, path).returncode == 0
    with ReviewQueue.existing(path) as queue:
        assert [(one.text, one.label) for one in queue.decided()] == [
            ("when?", None), ("=1+1 is what, in the café?", "car"), ("answered", "pool"),
            (None, "car"),
        ]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "=", "+", "-", "@", "'=", "'", "\uff1d"]), QUESTION),
        max_size=6,
    ),
    st.sampled_from(["pool", "=car", "'car"]),
)
@settings(max_examples=15)
def test_any_question_comes_back_from_a_sheet(tmp_path_factory, parts, label):
    folder = tmp_path_factory.mktemp("sheet")
    sheet = folder / "sheet.csv"
    labels = (*LABELS, "=car", "'car")
    with opened(folder / "queue.db", labels=labels) as queue:
        for begins, question in parts:
            queue.add(begins + question, prediction(label))
        entries = queue.pending()
        data = questions_csv(entries).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(data, newline="")))
        for row in rows:
            for cell in row.values():
                assert not cell.startswith(("=", "+", "-", "@", "\uff1d", "\t", "\r"))
            row["label"] = row["suggested"]
        with sheet.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["hash", "text", "seen", "suggested", "label"])
            writer.writeheader()
            writer.writerows(rows)
        for answer, one in zip(read_answers(sheet, queue), entries, strict=True):
            assert answer == Decided(one.hash, one.text, label)


def test_an_answer_that_fails_takes_the_others_back(path):
    filled(path, "one", "two")
    with ReviewQueue.existing(path) as queue:
        good = Decided(question_hash("one"), None, "pool")
        for bad in (Decided("f" * 64, None, "pool"), Decided(question_hash("two"), None, "pond")):
            with pytest.raises(ReviewError):
                queue.answer_all([good, bad])
            assert queue.decided() == []


def test_none_of_these_may_be_a_label(path, tmp_path):
    with opened(path, labels=(*LABELS, NONE)) as queue:
        queue.add("who?", prediction())
        (tmp_path / "a.csv").write_text(f"text,label\nwho?,{NONE}\n")
        [answer] = read_answers(tmp_path / "a.csv", queue)
    assert answer.label == NONE


# What is exported


NEAR = [
    "who painted the hall",
    "when does the swimming pool pump run",
    "Who painted the hall?",
    "how old is the fence behind the house",
    "WHO PAINTED THE HALL!",
    "when does the swimming pool pump run?",
]


def test_near_duplicates_share_a_group():
    names = group_names(NEAR)
    assert names[0] == names[2] == names[4]
    assert names[1] == names[5]
    assert len(set(names)) == 3
    assert names[0] == f"review-{question_hash(NEAR[0])[:16]}"
    assert group_names([]) == []


def test_a_question_near_two_families_makes_them_one():
    middle = "when was the swimming pool pump last replaced"
    texts = [f"now {middle}", f"{middle} here", middle]
    apart, joined = group_names(texts[:2]), group_names(texts)
    assert len(set(apart)) == 2
    assert joined == [apart[0]] * 3


def test_distances_are_measured_once(monkeypatch):
    measured = []
    neighbours = near._neighbours
    monkeypatch.setattr(
        near, "_neighbours", lambda *given: measured.append(given) or neighbours(*given)
    )
    group_names(NEAR)
    assert len(measured) == 1


def test_later_questions_leave_groups_as_they_are():
    for count in range(1, len(NEAR)):
        assert group_names(NEAR[:count]) == group_names(NEAR)[:count]


def test_a_chain_of_near_duplicates_is_one_group():
    # Each word of the sentence changes in turn: the ends have nothing in common.
    words = [f"word{number}" for number in range(40)]
    chain = [
        " ".join([*words[:0], *(w.upper()[::-1] for w in words[:n]), *words[n:]]) for n in range(41)
    ]
    assert len(set(group_names(chain))) == 1
    assert len(set(group_names([chain[0], chain[-1]]))) == 2


def test_groups_cannot_leak_into_the_test_split(household, tmp_path):
    labels = list(household.labels)
    texts = [
        f"{shape} {label} {place}{end}"
        for label in labels
        for place in ("behind the old house", "on the roof", "by the gate", "in the cellar",
                      "at the neighbour's", "under the stairs", "next to the road", "in the attic")
        for shape in ("when did somebody last look after the",)
        for end in ("", "?", "!")
    ]  # fmt: skip
    decided = [
        Decided(question_hash(text), text, labels[number // 24])
        for number, text in enumerate(texts)
    ]
    (tmp_path / "more.jsonl").write_bytes(training_rows(decided, texts))
    split = split_examples(read_examples(tmp_path / "more.jsonl", household), household, seed=0)
    sides = [
        {e.text.rstrip("?!") for e in part} for part in (split.train, split.validation, split.test)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]


# The terminal


def plain(lines):
    return [click.unstyle(line) for line in lines]


def test_keys_answer_skip_and_undo():
    entries = [entry(f"question {number}") for number in range(4)]
    walk = Walk("sorts", LABELS, entries)
    assert walk.press("u") is None  # nothing to undo
    assert walk.press("2") == Answer(entries[0].hash, "car")
    assert walk.press("9") is None  # the model named two labels
    assert walk.press("d") == Answer(entries[1].hash, "water heater")
    assert walk.press(" ") is None
    assert (walk.at, walk.answered) == (3, 2)
    assert walk.press("u") is None  # back to what was skipped
    assert walk.press("u") == Withdraw(entries[1].hash)
    assert (walk.at, walk.answered) == (1, 1)
    assert walk.press("n") == Answer(entries[1].hash, None)
    walk.press("s")
    walk.press("s")
    assert walk.entry is None
    assert walk.press("1") is None
    assert "That was the last one." in plain(screen(walk, 80, 24))
    assert isinstance(walk.press("q"), Quit)


def test_search_narrows_and_takes_a_label():
    labels = [f"label {number}" for number in range(200)] + ["gate", "Garden gate"]
    walk = Walk("sorts", labels, [entry(), entry("two")])
    for key in "/gAte":
        assert walk.press(key) is None
    assert walk.found() == ["gate", "Garden gate"]  # what begins so comes first
    walk.press("down")
    assert "> Garden gate" in plain(screen(walk, 80, 24))
    assert walk.press("enter") == Answer(walk.entries[0].hash, "Garden gate")
    for key in ("/", "q", "u", "back", "clear", "x", "x"):
        walk.press(key)
    assert walk.press("enter") is None  # no such label
    assert "no such label" in plain(screen(walk, 80, 24))
    walk.press("esc")
    assert walk.query is None
    assert any("more: / finds them" in line for line in plain(screen(walk, 80, 24)))


def test_what_a_terminal_sends_is_keys():
    assert list(keys("1\r\x7f\x1b[A\x1bOB\x1b[15~é\x1b")) == [
        "1", "enter", "back", "up", "down", "é", "esc",
    ]  # fmt: skip


@given(st.text(max_size=80))
def test_any_input_moves_the_walk_without_failing(read):
    walk = Walk("sorts", LABELS, [entry(f"question {number}") for number in range(3)])
    written: dict[str, str | None] = {}
    for key in keys(read):
        match walk.press(key):
            case Answer(hash, label):
                assert label is None or label in LABELS
                written[hash] = label
            case Withdraw(hash):
                del written[hash]  # only what was answered is withdrawn
        assert len(written) == walk.answered
        screen(walk, 40, 12)


@given(QUESTION, st.lists(TEXT.filter(bool), min_size=1, max_size=40), st.integers(20, 120),
       st.integers(8, 50), st.sampled_from([None, "", "a", "x" * 99]))  # fmt: skip
@settings(max_examples=100)
def test_the_screen_fits_and_obeys_nothing(question, labels, columns, rows, query):
    top = [(label, 0.1) for label in labels[:5]]
    walk = Walk("sorts", labels, [replace(entry(), text=question * 9, top=tuple(top), seen=3)])
    walk.query = query
    lines = plain(screen(walk, columns, rows))
    assert len(lines) <= rows
    assert max(map(width, lines)) <= columns
    for char in "".join(lines):
        assert char.isprintable() or char in "\u200c\u200d"


@given(TEXT, st.integers(2, 40))
def test_wrapped_text_is_whole(text, columns):
    text = shown(text)
    lines = wrap(text, columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_wide_characters_take_two_columns():
    assert width("プール") == 6
    assert width("cafe\u0301") == 4
    assert wrap("庭のプールの水", 6) == ["庭のプ", "ールの", "水"]
    assert shown(EVIL) == "</script><!--<script>alert('1')\\x1b[2J\\u202e & \"q\" \\u2028 {"


def test_without_a_terminal_review_says_what_else_there_is(qcat, path):
    done = qcat("review", "answer", filled(path, "who?"), input="")
    assert done.returncode == 1
    assert "review html" in done.stderr
    assert "review import" in done.stderr
    assert done.stderr.count("\n") == 1


def test_review_says_what_cannot_be(qcat, path, tmp_path):
    assert "no such review queue" in qcat("review", "answer", tmp_path / "none.db").stderr
    assert qcat("review", "export", path, "-o", "x.csv").returncode == 2
    assert qcat("review", "csv", path, "-o", "x.xlsx").returncode == 2
    nowhere = {**os.environ, "QCAT_REVIEW": "", "OLLAMA_HOST": "127.0.0.1:1"}
    done = qcat("review", "answer", "-m", "ollama:house", env=nowhere)
    assert (done.returncode, "no Ollama server there" in done.stderr) == (1, True)
    done = qcat("review", "html", filled(path), "-o", tmp_path / "no" / "page.html")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_a_person_walks_through_it_in_a_terminal(path):
    pexpect = pytest.importorskip("pexpect")
    filled(path, "who cleaned it?", f"what is {EVIL}?", "which gate?", "what is love?", "the last?")
    program = str(Path(sys.executable).with_name("qcat"))

    def start():
        return pexpect.spawn(
            program,
            ["review", "answer", str(path)],
            dimensions=(24, 80),
            encoding="utf-8",
            timeout=30,
        )

    walk = start()
    walk.expect("1 of 5 .*who cleaned it")
    walk.send("1")
    walk.expect("2 of 5   1 answered")
    walk.expect(re.escape("[2J\\u202e & "))
    walk.send("s")
    walk.expect("3 of 5")
    walk.send("/fen")
    walk.expect("> fence")
    walk.send("\r")
    walk.expect("4 of 5   2 answered")
    walk.send("p")  # no label has this key
    walk.send("c")
    walk.expect("5 of 5   3 answered")
    walk.send("un")  # typed faster than read
    walk.expect("5 of 5   3 answered")
    walk.setwinsize(10, 30)
    walk.expect("the last")
    walk.sendintr()
    walk.expect("3 answered now.")
    walk.expect("3 of 5 questions are answered, 2 wait.")
    walk.expect(pexpect.EOF)
    walk.close()
    assert walk.exitstatus == 0
    with ReviewQueue.existing(path) as queue:
        assert [one.label for one in queue.decided()] == ["pool", "fence", None]

    walk = start()
    walk.expect("1 of 2 ")
    walk.send("1")
    walk.expect("2 of 2 ")
    walk.kill(9)  # an answer is on the disk when the next question is shown
    walk.close()
    with ReviewQueue.existing(path) as queue:
        assert queue.counts().pending == 1


def test_ctrl_c_between_two_keys_quits_too(path, monkeypatch, capsys):
    def draw(walk):
        if walk.answered:
            raise KeyboardInterrupt

    filled(path, "who?", "when?")
    monkeypatch.setattr(review_terminal, "_draw", draw)
    monkeypatch.setattr(click, "getchar", lambda: "1")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with ReviewQueue.existing(path) as queue:
        try:
            review_terminal.answer_in_terminal(queue)
        except KeyboardInterrupt:  # which would end the tests
            pytest.fail("it came through")
    assert f"1 answered now.\n{path}: 1 of 2 questions are answered" in capsys.readouterr().out


# The page


@given(st.lists(QUESTION, max_size=4), TEXT, st.lists(TEXT, max_size=4))
def test_the_page_holds_any_text_as_data(questions, task, labels):
    entries = [entry(text, top=[(label, 0.5) for label in labels]) for text in [*questions, EVIL]]
    page = review_page(task, labels, entries)
    embedded = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(embedded[0])
    assert [row["text"] for row in data["entries"]] == [one.text for one in entries]
    assert (data["task"], data["labels"]) == (task, labels)
    assert page.count("<script") == page.count("</script") == 2
    assert page.count("<!--") == 0


@needs_chromium
def test_a_person_walks_through_the_page(qcat, path, tmp_path):
    filled(path, "who cleaned it?", f"what is {EVIL}?", "which gate?", "what is love?", "last?")
    page = tmp_path / "page.html"
    done = qcat("review", "html", path, "-o", page)
    assert done.stdout == f"{page}: 5 questions: open it in a browser\n"

    def shows(what):
        browser.wait(f"document.body.innerText.includes({json.dumps(what)})")

    with Page(tmp_path) as browser:
        browser.open(page)
        shows("0 of 5 answered")
        browser.press("1")
        shows("1 of 5 answered")
        shows("<!--<script>alert('1') [2J\\u202e & \"q\"")  # the queue has cleaned its controls
        browser.press("s")
        shows("which gate?")
        browser.press("/", "f", "e")
        assert browser.run("document.querySelectorAll('#labels button').length") == 1
        browser.press("Enter")
        shows("what is love?")
        browser.press("c")
        shows("3 of 5 answered")
        browser.click("#undo")
        shows("what is love?")
        # What was answered is kept, and what was skipped comes again. Chromium hands on what a page
        # keeps a moment after it was kept, so the first page opened anew may be too early.
        until = time.monotonic() + 30
        browser.open(page)
        while not browser.run("document.body.innerText.includes('2 of 5 answered')"):
            assert time.monotonic() < until
            time.sleep(0.2)
            browser.open(page)
        shows('& "q"')
        browser.press("s")
        browser.click("#none")
        browser.click("#top button:nth-child(2)")
        shows("4 of 5 answered")
        shows("Skip shows those again")
        browser.click("#save")
        saved = tmp_path / "sorts.review.json"
        until = time.monotonic() + 30
        while not saved.exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        said = [m["method"] for m in browser.messages]
        assert "Log.entryAdded" not in said  # the policy has blocked nothing
        assert "Runtime.exceptionThrown" not in said
        asked = [m["params"]["request"]["url"] for m in browser.messages
                 if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert {url.split(":")[0] for url in asked} <= {"file", "blob"}
    done = qcat("review", "import", saved, path)
    assert done.stdout == f"{saved}: 4 answers taken; 1 questions wait\n", done.stderr
    with ReviewQueue.existing(path) as queue:
        assert [one.label for one in queue.decided()] == ["pool", "fence", None, "fence"]


@needs_chromium
def test_a_page_leaves_alone_what_others_of_its_task_keep(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(review_page("sorts", LABELS, [entry("one"), entry("two")]))
    one, two, other = map(question_hash, ("one", "two", "of another queue"))

    def keep(*answers):
        """As another page of the task does in the same browser."""
        value = json.dumps(json.dumps(answers))
        browser.run(f"localStorage.setItem('qcat-review:sorts', {value})")

    def kept():
        return browser.run("JSON.parse(localStorage.getItem('qcat-review:sorts'))")

    def shows(what):
        browser.wait(f"document.body.innerText.includes({json.dumps(what)})")

    with Page(tmp_path) as browser:
        browser.open(page)
        shows("0 of 2 answered")
        keep([other, "car"])
        browser.press("1")
        shows("1 of 2 answered")
        assert kept() == [[other, "car"], [one, "pool"]]
        keep([other, None], [one, "fence"])  # the same page in another tab has changed its mind
        browser.press("1")
        shows("2 of 2 answered")
        assert kept() == [[other, None], [one, "fence"], [two, "pool"]]
        browser.press("u")
        shows("1 of 2 answered")
        assert kept() == [[other, None], [one, "fence"]]
        browser.run("localStorage.setItem('qcat-review:sorts', '7')")  # not of a page like this
        browser.press("1")
        shows("2 of 2 answered")
        assert kept() == [[two, "pool"]]


def test_every_label_key_is_free():
    assert len(set(LABEL_KEYS)) == len(LABEL_KEYS)
    assert not set(LABEL_KEYS) & set("nqsu/ 123456789")
