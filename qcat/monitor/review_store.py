"""Opens and creates the SQLite file of a review queue, and explains its errors."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qcat.errors import ReviewError
from qcat.files import PLAIN

WAIT = 30.0
"""Seconds to wait for another process that has locked the file."""
_APPLICATION = 0x71637251  # "qcrQ": marks an SQLite file as a review queue
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


def absolute(path: Path) -> str:
    """The file's absolute path: SQLite treats "" and ":memory:" specially."""
    try:
        name = os.path.abspath(path)
        name.encode()
    except UnicodeEncodeError:
        name = "\0"
    if "\0" in name:
        raise ReviewError(f"{str(path)!r}: no file can have this name: choose another")
    return name


def connect(path: Path, mode: str) -> sqlite3.Connection:
    name = absolute(path)
    if os.path.isdir(name):
        raise ReviewError(f"{path}: is a folder: name a file")
    if mode == "rwc":
        # Made by SQLite it could be read by anyone; its journals take their mode from it. Only if
        # there is none: closing a file that this process has open already ends SQLite's locks.
        with suppress(OSError):  # of which SQLite says the same
            flags = os.O_CREAT | os.O_EXCL | PLAIN
            os.close(os.open(os.path.realpath(name), flags, 0o600))
    with explained(path):
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
def explained(path: Path) -> Iterator[None]:
    """SQLite's error for a file, as a message of ours."""
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the kind of error; the others give details.
        advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if advice is None:
            advice = f"is damaged, or no review queue ({error}): name another file"
        raise ReviewError(f"{path}: {advice}") from None
    except (TypeError, ValueError, OverflowError, RecursionError):  # a cell that qcat did not write
        raise ReviewError(f"{path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}") from None


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction: either committed or rolled back."""
    # IMMEDIATE waits here for its turn; a plain BEGIN could fail at the first write.
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


def is_queue(connection: sqlite3.Connection) -> bool:
    return (
        _pragma(connection, "application_id") == _APPLICATION
        and _pragma(connection, "user_version") == _VERSION
    )


def create(connection: sqlite3.Connection, path: Path, task: str, labels: Sequence[str]) -> None:
    with transaction(connection):
        if is_queue(connection):
            return  # another process was quicker
        # No table yet: just created, or created by a process that was killed before going further.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables or _pragma(connection, "application_id"):
            raise ReviewError(f"{path}: is no review queue: name another file")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO queue VALUES (?, ?)", (task, json.dumps(list(labels))))
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")


def owner(connection: sqlite3.Connection, path: Path) -> tuple[str, tuple[str, ...]]:
    """The task's name and labels."""
    with explained(path):
        [(task, labels)] = connection.execute("SELECT task, labels FROM queue").fetchall()
        names: Any = json.loads(labels)
        if not (isinstance(task, str) and isinstance(names, list) and names):
            raise ValueError
        if not all(isinstance(name, str) for name in names):
            raise ValueError
    return task, tuple(names)
