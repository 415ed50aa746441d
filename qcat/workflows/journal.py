"""The journal of a long job: one line for each answer so far, so that a kill loses nothing.

The first line describes the job; each other line is the answer to the next row, in order. A line
is one `write`, so it survives `kill -9`; lines are forced to the disk every second. An incomplete
line (after a kill or a full disk) is cut off when the job resumes. Only one process at a time can
have the journal open.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

from qcat.errors import DataError
from qcat.files import PLAIN, lock_open_file

SYNC = 1.0
"""Seconds after which added lines are forced to the disk."""
_START = b'{"qcat batch": 1, '
_MAX_HEAD = 1 << 16  # bytes of the first line


class Answer(NamedTuple):
    """The result for a row; all fields but `error` are as in `Prediction`."""

    label: str | None
    """None if the row could not be asked."""
    confidence: float | None
    abstained: bool
    reason: str | None
    truncated: bool
    """Whether the question was cut."""
    error: str | None
    """Why the row could not be asked."""


class Journal:
    """An open journal. Close it, or use it in a `with` statement; an empty one is then removed."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file
        self._empty = os.fstat(file).st_size == 0
        self._unwanted = False
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a journal, or create it.

        Raises:
            DataError: another process has it open, or it cannot be written or locked.
        """
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be written: {error.strerror}: choose another folder"
                ) from None
            except ValueError:  # a NUL or a lone surrogate in the name
                raise DataError(f"{str(path)!r}: no file can have this name") from None
            try:
                if not lock_open_file(file):
                    os.close(file)
                    raise DataError(
                        f"{path}: another process is at this work: wait for it, or name another "
                        "output"
                    )
                # Its last user may have removed it between the two calls.
                if os.path.samestat(os.stat(path), os.fstat(file)):
                    return cls(path, file)
            except FileNotFoundError:
                pass
            except OSError as error:  # a network disk without locks
                empty = os.fstat(file).st_size == 0
                os.close(file)
                if empty:
                    path.unlink(missing_ok=True)
                raise DataError(
                    f"{path}: cannot be locked: {error.strerror}: choose a folder on a local disk"
                ) from None
            os.close(file)

    def begin(self, about: Mapping[str, str]) -> int:
        """Start the job, or resume it.

        Args:
            about: everything that the answers depend on.

        Returns:
            How many answers there are already.

        Raises:
            DataError: the file is the journal of another job, not a journal, or not writable.
        """
        with self.path.open("rb") as file:
            head = file.readline(_MAX_HEAD)
            end, count = len(head), 0
            for line in file:
                if _answer(line) is None:
                    break
                end += len(line)
                count += 1
        whole = head.endswith(b"\n") and head.startswith(_START)
        if not whole and not _START.startswith(head[: len(_START)]):
            raise DataError(f"{self.path}: is not from qcat: move it away, or name another output")
        if count:
            self._check(head, about)
            os.ftruncate(self._file, end)
        else:
            os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_END)
        if not count:
            self._write(_START + json.dumps(about)[1:].encode() + b"\n")
        self._empty = count == 0
        return count

    def add(self, answer: Answer) -> None:
        """Append the answer to the next row. From then on it survives if the process is killed.

        Raises:
            DataError: it cannot be written, for example because the disk is full.
        """
        self._write(json.dumps(answer).encode() + b"\n")
        self._empty = False
        if time.monotonic() > self._synced + SYNC:
            self.sync()

    def sync(self) -> None:
        """Force the added lines to the disk. Raises DataError if that fails."""
        try:
            os.fsync(self._file)
        except OSError as error:
            self._unwritten(error.strerror)
        self._synced = time.monotonic()

    def answers(self) -> Iterator[Answer]:
        """All answers, in order.

        Raises:
            DataError: the file was changed by another program.
        """
        with self.path.open("rb") as file:
            file.readline(_MAX_HEAD)
            for line in file:
                answer = _answer(line)
                if answer is None:
                    raise DataError(f"{self.path}: was changed: rerun the command")
                yield answer

    def remove(self) -> None:
        """Delete the file: the job is done."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError:  # Windows does not delete open files
            self._unwanted = True

    def close(self) -> None:
        """Close the file, and delete it if it holds no answer. May be called more than once."""
        if self._file >= 0:
            if self._empty:
                self.remove()
            os.close(self._file)
            self._file = -1
            if self._unwanted:
                # Not by the way: elsewhere another process may have made it its own by now. Windows
                # does not delete it then.
                with suppress(OSError):
                    self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, head: bytes, about: Mapping[str, str]) -> None:
        try:
            found = json.loads(head)
        except ValueError:
            found = {}
        different = [name for name, value in about.items() if found.get(name) != value]
        if different:
            raise DataError(
                f"{self.path}: is half-done work with another {' and another '.join(different)}: "
                "give the command that it was begun with, or delete this file to begin anew"
            )

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
        except OSError as error:
            self._unwritten(error.strerror)
        if written < len(line):
            self._unwritten("no room left")

    def _unwritten(self, reason: str | None) -> NoReturn:
        raise DataError(
            f"{self.path}: cannot be written: {reason}: make room and rerun the command"
        )


def _answer(line: bytes) -> Answer | None:
    """The answer in a line; None if it is not an answer."""
    if not line.endswith(b"\n"):
        return None
    try:
        answer = Answer(*json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    fits = (
        isinstance(answer.label, str | None)
        and isinstance(answer.confidence, float | None)
        and isinstance(answer.abstained, bool)
        and isinstance(answer.reason, str | None)
        and isinstance(answer.truncated, bool)
        and isinstance(answer.error, str | None)
    )
    return answer if fits else None
