"""The review queue: questions that the model abstained on, in one SQLite file.

Several processes may add at the same time, and a question is on the disk when `add` returns.
Each question is stored once and counted each time it is seen. Independent of models and terminals.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from qcat.encoding.prompt import clean_question
from qcat.errors import QuestionError, ReviewError
from qcat.monitor.review_store import (
    absolute,
    connect,
    create,
    explained,
    is_queue,
    owner,
    transaction,
)
from qcat.prediction import Prediction
from qcat.task import Task

NONE = "none of these"
"""The words with which a person says that no label fits."""
LABEL_KEYS = "abcdefghijklmoprtvwxyz"
"""Keys of the first labels, in the terminal and on the page; n, q, s and u have other uses."""
TOP = 5
"""Number of labels stored with their probabilities for each question."""
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


@dataclass(frozen=True)
class Entry:
    """A question in the queue."""

    hash: str
    """Result of `question_hash`."""
    text: str | None
    """Cleaned by `clean_question`; None if the text is not stored."""
    seen: int
    """How many times it was asked and abstained on."""
    label: str
    """The label that the model would have given, the last time."""
    reason: str | None
    """Why it abstained, the last time."""
    top: tuple[tuple[str, float], ...]
    """Its best labels, at most `TOP`, with their probabilities; empty if it gave none."""


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
    """Not answered, and stored only as a hash."""
    answered: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.pending + self.unreadable + self.answered


def question_hash(question: str) -> str:
    """SHA-256, in hex, of a question cleaned by `clean_question`, in lower case.

    Anyone who can guess a question can find out whether it is in a queue of hashes.

    Raises:
        QuestionError: the cleaned question is empty.
    """
    # Case folding can undo NFC, so the text is normalised again.
    text = unicodedata.normalize("NFC", clean_question(question).casefold())
    return hashlib.sha256(text.encode()).hexdigest()


def default_path(task: str) -> Path:
    """Path of a task's queue if no file is given: in the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("qcat") / "review" / f"{task}.db"


def open_for(task: Task, path: str | os.PathLike[str] | None, hash_only: bool) -> ReviewQueue:
    """The queue for a classifier, created if it does not exist.

    Args:
        task: the task of the questions. If it asks for hashes only, no texts are stored.
        path: the file; None for `default_path`.
        hash_only: do not store texts, whatever the task says.

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
    """An open review queue. Close it, or use it in a `with` statement.

    Methods raise ReviewError if the file cannot be read or written, or is damaged.
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
        self._connection, self._process = connection, os.getpid()
        self._keep_text = keep_text

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        task: str,
        labels: Sequence[str],
        keep_text: bool = True,
    ) -> Self:
        """Open the queue of a task, or create it, readable by its owner only, if there is none.

        Args:
            path: the file.
            task: the task's name.
            labels: the task's labels, in order.
            keep_text: whether `add` stores the texts of questions, or only their hashes.

        Raises:
            ReviewError: it is not a queue, belongs to another task or to other labels, or cannot
                be opened.
        """
        file = Path(path)
        connection = connect(file, "rwc")
        try:
            with explained(file):
                if not is_queue(connection):
                    create(connection, file, task, labels)
            queue = cls(file, connection, *owner(connection, file), keep_text)
            if queue.task != task:
                raise ReviewError(
                    f"{file}: is the review queue of task {queue.task!r}, not of {task!r}: "
                    "name another file"
                )
            if set(queue.labels) != set(labels):
                raise ReviewError(
                    f"{file}: is the review queue of task {task!r} with other labels: finish it "
                    "with `qcat review answer` and move it away, or name another file"
                )
        except BaseException:
            connection.close()
            raise
        return queue

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> Self:
        """Open a queue to review it; the task and labels are read from it.

        Raises:
            ReviewError: the file does not exist, is not a queue, or cannot be opened.
        """
        file = Path(path)
        if not os.path.lexists(absolute(file)):
            raise ReviewError(
                f"{file}: no such review queue: name another file, or make one with `qcat ask "
                "--review FILE`"
            )
        connection = connect(file, "rw")
        try:
            with explained(file):
                known = is_queue(connection)
            if not known:
                raise ReviewError(f"{file}: is no review queue: name another file")
            return cls(file, connection, *owner(connection, file), keep_text=True)
        except BaseException:
            connection.close()
            raise

    def add(self, question: str, prediction: Prediction) -> None:
        """Add a question to the queue, or count it once more; its existing answer is kept.

        The question is on the disk when this returns.

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
        """Questions that wait for an answer, the most frequent first.

        Args:
            unreadable: include questions whose text is not stored.
        """
        where = "answered_at IS NULL" + ("" if unreadable else " AND text IS NOT NULL")
        query = f"SELECT {_COLUMNS} FROM questions WHERE {where} ORDER BY seen DESC, id"
        with explained(self.path):
            return [_entry(row) for row in self._db.execute(query).fetchall()]

    def decided(self) -> list[Decided]:
        """Answered questions, in the order in which they were added."""
        query = "SELECT hash, text, answer FROM questions WHERE answered_at IS NOT NULL ORDER BY id"
        with explained(self.path):
            found = [Decided(*row) for row in self._db.execute(query).fetchall()]
            labels = {None, *self.labels}
            if not all(_fits(one.hash, one.text) and one.label in labels for one in found):
                raise ValueError
            return found

    def texts(self) -> list[str]:
        """All texts, answered or not, in the order in which they were added."""
        query = "SELECT hash, text FROM questions WHERE text IS NOT NULL ORDER BY id"
        with explained(self.path):
            found = self._db.execute(query).fetchall()
            if not all(_fits(*row) for row in found):
                raise ValueError
            return [text for _, text in found]

    def hashes(self) -> set[str]:
        """The hashes of all questions."""
        with explained(self.path):
            return {hash for (hash,) in self._db.execute("SELECT hash FROM questions")}

    def counts(self) -> Counts:
        """How many questions there are of each kind."""
        query = """
            SELECT count(*) FILTER (WHERE answered_at IS NULL AND text IS NOT NULL),
                   count(*) FILTER (WHERE answered_at IS NULL AND text IS NULL),
                   count(*) FILTER (WHERE answered_at IS NOT NULL)
            FROM questions
        """
        with explained(self.path):
            return Counts(*self._db.execute(query).fetchone())

    def answer(self, hash: str, label: str | None) -> None:
        """Answer a question, or change its answer.

        Args:
            hash: hash of the question.
            label: one of the queue's labels; None if none of them fits.

        Raises:
            ReviewError: there is no such question, or no such label.
        """
        self.answer_all([Decided(hash, None, label)])

    def answer_all(self, answers: Iterable[Decided]) -> None:
        """Answer several questions, all or none. Given texts are added if they were not stored.

        Raises:
            ReviewError: as for `answer`, or a text does not match its hash. The queue is then
                unchanged.
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
        """Withdraw an answer: the question is waiting again.

        Raises:
            ReviewError: there is no such question.
        """
        with self._transaction():
            self._change("answer = NULL, answered_at = NULL", (), hash)

    def close(self) -> None:
        """Close the file. May be called more than once."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._process != os.getpid():  # SQLite's locks do not work there: the file could be lost
            raise ReviewError(f"{self.path}: was opened before a fork: open it in the child")
        return self._connection

    def _change(self, what: str, values: tuple[object, ...], hash: str) -> None:
        changed = self._db.execute(f"UPDATE questions SET {what} WHERE hash = ?", (*values, hash))
        if changed.rowcount != 1:
            raise ReviewError(f"{self.path}: has no question with the hash {hash[:12]}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.path), transaction(self._db):
            yield


def _fits(hash: Any, text: Any) -> bool:
    """Whether a row's hash matches its text, if stored; SQLite accepts any type."""
    if text is None:
        return isinstance(hash, str)
    try:
        return bool(question_hash(text) == hash)
    except QuestionError:
        return False


def _entry(row: tuple[Any, ...]) -> Entry:
    """An entry from the `_COLUMNS` of a row."""
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
