"""The review queue: questions that the model left to a person, in one SQLite file.

Several processes may add at the same time, and what was added is on the disk when `add` returns.
A question is kept once and counted each time it is seen. Knows nothing of models and terminals.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from qcat.encoding.prompt import clean_question
from qcat.errors import QuestionError, ReviewError
from qcat.prediction import Prediction
from qcat.task import Task

NONE = "none of these"
"""How a person says that no label fits, in words."""
LABEL_KEYS = "abcdefghijklmoprtvwxyz"
"""Keys of the first labels, in the terminal and on the page; n, q, s and u have other uses."""
TOP = 5
"""Labels kept with their probabilities for each question."""
WAIT = 30.0
"""Seconds to wait for another process that holds the file."""
_APPLICATION = 0x71637251  # "qcrQ": says that an SQLite file is such a queue
_VERSION = 1
_SCHEMA = """
CREATE TABLE queue (task TEXT NOT NULL, labels TEXT NOT NULL);
CREATE TABLE questions (
    id INTEGER PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    text TEXT,
    seen INTEGER NOT NULL,
    first_seen TEXT NOT NULL,
    last_seen TEXT NOT NULL,
    label TEXT NOT NULL,
    reason TEXT,
    confidence REAL,
    label_mass REAL,
    top TEXT NOT NULL,
    answered_at TEXT,
    answer TEXT
);
"""
_ADD = """
INSERT INTO questions
    (hash, text, seen, first_seen, last_seen, label, reason, confidence, label_mass, top)
VALUES (:hash, :text, 1, :now, :now, :label, :reason, :confidence, :label_mass, :top)
ON CONFLICT (hash) DO UPDATE SET
    text = coalesce(text, excluded.text), seen = seen + 1, last_seen = excluded.last_seen,
    label = excluded.label, reason = excluded.reason, confidence = excluded.confidence,
    label_mass = excluded.label_mass, top = excluded.top
"""
_COLUMNS = "hash, text, seen, label, reason, top"
_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_IOERR: "reading or writing it failed: make room, or name another file",
    sqlite3.SQLITE_READONLY: "cannot be written: allow it, or name another file",
    sqlite3.SQLITE_PERM: "cannot be opened: allow it, or name another file",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: name a file in a folder that can be written",
    sqlite3.SQLITE_NOTADB: "is no review queue: name another file",
    sqlite3.SQLITE_CORRUPT: "is damaged: move it away, and a new one will be made",
    sqlite3.SQLITE_BUSY: f"another process has held it for {WAIT:.0f} s: try again",
}


@dataclass(frozen=True)
class Entry:
    """A question of the queue."""

    hash: str
    """As `question_hash` gives it."""
    text: str | None
    """As `clean_question` gives it; None where the text is kept out."""
    seen: int
    """How many times it was asked and left to a person."""
    label: str
    """What the model would have answered, the last time."""
    reason: str | None
    """Why it abstained, the last time."""
    top: tuple[tuple[str, float], ...]
    """Its best labels, at most `TOP`, with their probabilities; empty where it gave none."""


@dataclass(frozen=True)
class Decided:
    """A question that a person has answered."""

    hash: str
    text: str | None
    label: str | None
    """None: none of the labels fits."""


@dataclass(frozen=True)
class Counts:
    """How many different questions there are of each kind."""

    pending: int
    """Not answered, with a text to read."""
    unreadable: int
    """Not answered, and kept as a hash only."""
    answered: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.pending + self.unreadable + self.answered


def question_hash(question: str) -> str:
    """SHA-256, in hex, of a question as `clean_question` gives it, in lower case.

    Whoever can guess a question can tell whether it is in a queue of hashes.

    Raises:
        QuestionError: nothing is left of the question.
    """
    # Folding can undo NFC, so it is normalised again.
    text = unicodedata.normalize("NFC", clean_question(question).casefold())
    return hashlib.sha256(text.encode()).hexdigest()


def default_path(task: str) -> Path:
    """Where the queue of a task lies whose `task.toml` asks for one: in the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("qcat") / "review" / f"{task}.db"


def open_for(task: Task, path: str | os.PathLike[str] | None, hash_only: bool) -> ReviewQueue:
    """The queue that a classifier adds to, made if there is none.

    Args:
        task: whose questions they are. Where it asks for hashes only, nothing else is kept.
        path: the file; None is `default_path`.
        hash_only: keep the texts of questions out, whatever the task says.

    Raises:
        ReviewError: as for `ReviewQueue.open`; or the user's data folder cannot be made.
    """
    if path is None:
        path = default_path(task.name)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ReviewError(
                f"{path.parent}: cannot be made: {error.strerror}: name a file with --review"
            ) from None
    keep_text = not hash_only and task.review != "hash"
    return ReviewQueue.open(path, task=task.name, labels=tuple(task.labels), keep_text=keep_text)


class ReviewQueue:
    """A review queue, open. Close it, or use it in a `with` statement.

    Methods raise ReviewError where the file cannot be read or written, or is damaged.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        task: str,
        labels: tuple[str, ...],
        keep_text: bool,
    ) -> None:
        self.path = path
        self.task = task
        self.labels = labels
        self._db, self._keep_text = connection, keep_text

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        task: str,
        labels: Sequence[str],
        keep_text: bool = True,
    ) -> Self:
        """Open the queue of a task, or make it, for its owner alone, where there is no such file.

        Args:
            path: the file.
            task: the task's name.
            labels: the task's labels, in order.
            keep_text: whether `add` keeps the texts of questions, or their hashes only.

        Raises:
            ReviewError: it is no queue, is that of another task or of other labels, or cannot be
                opened.
        """
        file = Path(path)
        connection = _connect(file, "rwc")
        try:
            with _explained(file):
                if not _is_queue(connection):
                    _create(connection, file, task, labels)
            queue = cls(file, connection, *_owner(connection, file), keep_text)
            if queue.task != task:
                raise ReviewError(
                    f"{file}: is the review queue of task {queue.task!r}, not of {task!r}: "
                    "name another file"
                )
            if set(queue.labels) != set(labels):
                raise ReviewError(
                    f"{file}: is the review queue of task {task!r} with other labels: finish it "
                    "with `qcat review` and move it away, or name another file"
                )
        except BaseException:
            connection.close()
            raise
        return queue

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> Self:
        """Open a queue to review it; its task and labels are what it says itself.

        Raises:
            ReviewError: there is no such file, it is no queue, or it cannot be opened.
        """
        file = Path(path)
        if not os.path.lexists(_absolute(file)):
            raise ReviewError(
                f"{file}: no such review queue: name another file, or make one with `qcat ask "
                "--review FILE`"
            )
        connection = _connect(file, "rw")
        try:
            with _explained(file):
                known = _is_queue(connection)
            if not known:
                raise ReviewError(f"{file}: is no review queue: name another file")
            return cls(file, connection, *_owner(connection, file), keep_text=True)
        except BaseException:
            connection.close()
            raise

    def add(self, question: str, prediction: Prediction) -> None:
        """Put a question into the queue, or count it once more; answers given to it stay.

        The disk has it when this returns.

        Raises:
            QuestionError: the question is empty.
        """
        best = list(prediction.probabilities.items())[:TOP]
        row = {
            "hash": question_hash(question),
            "text": clean_question(question) if self._keep_text else None,
            "now": _now(),
            "label": prediction.label,
            "reason": prediction.reason,
            "confidence": prediction.confidence,
            "label_mass": prediction.label_mass,
            "top": json.dumps(best),
        }
        with self._transaction():
            self._db.execute(_ADD, row)

    def pending(self, *, unreadable: bool = False) -> list[Entry]:
        """Questions that wait for an answer, those seen most often first.

        Args:
            unreadable: those too whose text is kept out.
        """
        where = "answered_at IS NULL" + ("" if unreadable else " AND text IS NOT NULL")
        query = f"SELECT {_COLUMNS} FROM questions WHERE {where} ORDER BY seen DESC, id"
        with _explained(self.path):
            return [_entry(row) for row in self._db.execute(query).fetchall()]

    def decided(self) -> list[Decided]:
        """Answered questions, in the order in which they came into the queue."""
        query = "SELECT hash, text, answer FROM questions WHERE answered_at IS NOT NULL ORDER BY id"
        with _explained(self.path):
            found = [Decided(*row) for row in self._db.execute(query).fetchall()]
            labels = {None, *self.labels}
            if not all(_fits(one.hash, one.text) and one.label in labels for one in found):
                raise ValueError
            return found

    def texts(self) -> list[str]:
        """All texts, answered or not, in the order in which they came into the queue."""
        query = "SELECT hash, text FROM questions WHERE text IS NOT NULL ORDER BY id"
        with _explained(self.path):
            found = self._db.execute(query).fetchall()
            if not all(_fits(*row) for row in found):
                raise ValueError
            return [text for _, text in found]

    def hashes(self) -> set[str]:
        """The hashes of all questions."""
        with _explained(self.path):
            return {hash for (hash,) in self._db.execute("SELECT hash FROM questions")}

    def counts(self) -> Counts:
        """How many questions there are of each kind."""
        query = """
            SELECT count(*) FILTER (WHERE answered_at IS NULL AND text IS NOT NULL),
                   count(*) FILTER (WHERE answered_at IS NULL AND text IS NULL),
                   count(*) FILTER (WHERE answered_at IS NOT NULL)
            FROM questions
        """
        with _explained(self.path):
            return Counts(*self._db.execute(query).fetchone())

    def answer(self, hash: str, label: str | None) -> None:
        """Answer a question, for the first time or anew.

        Args:
            hash: the question's.
            label: one of the queue's; None where none of them fits.

        Raises:
            ReviewError: no such question, or no such label.
        """
        self.answer_all([Decided(hash, None, label)])

    def answer_all(self, answers: Iterable[Decided]) -> None:
        """Answer several questions, all or none. A text given fills in where it was kept out.

        Raises:
            ReviewError: as for `answer`, or a text is not that of its hash; the queue is as it was
                then.
        """
        with self._transaction():
            for given in answers:
                if not _fits(given.hash, given.text):
                    raise ReviewError(f"{self.path}: a text is not that of hash {given.hash[:12]}")
                if given.label is not None and given.label not in self.labels:
                    raise ReviewError(f"{self.path}: {given.label!r} is none of its labels")
                self._change(
                    "answer = ?, answered_at = ?, text = coalesce(text, ?)",
                    (given.label, _now(), given.text),
                    given.hash,
                )

    def withdraw(self, hash: str) -> None:
        """Take an answer back: the question waits again.

        Raises:
            ReviewError: no such question.
        """
        with self._transaction():
            self._change("answer = NULL, answered_at = NULL", (), hash)

    def close(self) -> None:
        """Close the file. Harmless a second time."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, what: str, values: tuple[object, ...], hash: str) -> None:
        changed = self._db.execute(f"UPDATE questions SET {what} WHERE hash = ?", (*values, hash))
        if changed.rowcount != 1:
            raise ReviewError(f"{self.path}: has no question with the hash {hash[:12]}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _explained(self.path), _begun(self._db):
            yield


def _absolute(path: Path) -> str:
    """The file's whole name: SQLite gives "" and ":memory:" a meaning of their own."""
    try:
        name = os.path.abspath(path)
        name.encode()
    except UnicodeEncodeError:
        name = "\0"
    if "\0" in name:
        raise ReviewError(f"{str(path)!r}: no file can have this name: choose another")
    return name


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    name = _absolute(path)
    if os.path.isdir(name):
        raise ReviewError(f"{path}: is a folder: name a file")
    if mode == "rwc":
        # Made by SQLite it could be read by anyone; its journals take their mode from it. Only if
        # there is none: closing a file that this process has open already ends SQLite's locks.
        with suppress(OSError):  # of which SQLite says the same
            flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(os.path.realpath(name), flags, 0o600))
    with _explained(path):
        # A classifier may be opened in one thread and asked in another, one at a time.
        connection = sqlite3.connect(
            f"{Path(name).as_uri()}?mode={mode}",
            uri=True,
            timeout=WAIT,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            # EXTRA also waits for the folder, from which a commit removes the journal.
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA trusted_schema = OFF")
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What SQLite says of a file, in words of ours."""
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the kind of error, the others are its detail.
        advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if advice is None:
            advice = f"is damaged, or no review queue ({error}): name another file"
        raise ReviewError(f"{path}: {advice}") from None
    except (TypeError, ValueError, OverflowError, RecursionError):  # a cell that is not of ours
        raise ReviewError(f"{path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}") from None


@contextmanager
def _begun(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that writes: committed, or as if it had not been."""
    # IMMEDIATE waits its turn here; a plain BEGIN could fail when it comes to write.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _is_queue(connection: sqlite3.Connection) -> bool:
    return (
        _pragma(connection, "application_id") == _APPLICATION
        and _pragma(connection, "user_version") == _VERSION
    )


def _create(connection: sqlite3.Connection, path: Path, task: str, labels: Sequence[str]) -> None:
    with _begun(connection):
        if _is_queue(connection):
            return  # another process was quicker
        # Without a table it was just made, or by a process that was killed before it came further.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables or _pragma(connection, "application_id"):
            raise ReviewError(f"{path}: is no review queue: name another file")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO queue VALUES (?, ?)", (task, json.dumps(list(labels))))
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")


def _owner(connection: sqlite3.Connection, path: Path) -> tuple[str, tuple[str, ...]]:
    """The task's name and labels."""
    with _explained(path):
        [(task, labels)] = connection.execute("SELECT task, labels FROM queue").fetchall()
        names: Any = json.loads(labels)
        if not (isinstance(task, str) and isinstance(names, list) and names):
            raise ValueError
        if not all(isinstance(name, str) for name in names):
            raise ValueError
    return task, tuple(names)


def _fits(hash: Any, text: Any) -> bool:
    """Whether a row's hash is that of its text, where that is kept; SQLite keeps any type."""
    if text is None:
        return isinstance(hash, str)
    try:
        return bool(question_hash(text) == hash)
    except QuestionError:
        return False


def _entry(row: tuple[Any, ...]) -> Entry:
    """An entry of the `_COLUMNS`."""
    hash, text, seen, label, reason, top = row
    best = tuple((name, float(share)) for name, share in json.loads(top))
    if not (
        _fits(hash, text)
        and isinstance(seen, int)
        and isinstance(label, str)
        and isinstance(reason, str | None)
        and all(isinstance(name, str) and math.isfinite(share) for name, share in best)
    ):
        raise ValueError
    return Entry(hash, text, seen, label, reason, best[:TOP])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
