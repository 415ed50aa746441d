"""The prediction log: one line of JSON an answer, appended by any number of processes at once.

A record is one `write` to a descriptor opened with O_APPEND. On a local disk the kernel keeps such
writes apart and has them all once the call returns, so a process that is killed loses nothing that
`add` came back from. A loss of power can take the last seconds: nothing is forced to the disk. NFS
has no such append: keep the log on a local disk.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from qcat.errors import DataError
from qcat.files import PLAIN
from qcat.prediction import Prediction

VERSION = 1
_START = f'{{"v": {VERSION}, '.encode()
"""How each record begins. No text in a record can hold it: JSON escapes its quotes."""
_MAX_CHARS = 20_000  # of a question that is kept
_MAX_BYTES = 1 << 20  # of a line that is read at once


@dataclass(frozen=True, slots=True)
class Record:
    """One answer as the log has it."""

    time: datetime
    """When it was given, in UTC."""
    model: str
    """Which model gave it, as `Classifier.identity` names it."""
    rule: str
    """What decided whether it was to abstain: the model's own thresholds, or one set by hand."""
    label: str
    confidence: float | None
    """As in `Prediction`, as are the next three."""
    label_mass: float | None
    abstained: bool
    reason: str | None
    on_topic: float | None
    text: str | None
    """The question; None unless the log was to keep it."""


@dataclass(frozen=True)
class LogWindow:
    """A stretch of a log."""

    records: list[Record]
    skipped: int
    """Lines of the whole file that hold no record: torn, or not written by qcat."""
    others: int
    """Records of the whole file that are of another model."""


class PredictionLog:
    """A log to append to. Close it, or use it in a `with` statement.

    When the file is renamed or deleted under it (logrotate), the next record begins a new one.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, model: str, rule: str, text: bool = False
    ) -> None:
        """Open the file, or create it for its owner alone.

        Args:
            path: of the file.
            model: as in `Record`.
            rule: as in `Record`.
            text: keep the questions too.

        Raises:
            DataError: it cannot be opened, or is no file.
        """
        self._path = Path(path)
        self._model, self._rule, self._text = model, rule, text
        try:
            self._file = self._opened()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror}: choose another"
            ) from None

    def add(self, question: str, prediction: Prediction) -> None:
        """Append one answer. What is in the file once this returns outlives the process.

        Raises:
            DataError: it cannot be written: the disk is full, say.
        """
        fields: dict[str, Any] = {
            "v": VERSION,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "model": self._model,
            "rule": self._rule,
            "label": prediction.label,
            "confidence": prediction.confidence,
            "label_mass": prediction.label_mass,
            "abstained": prediction.abstained,
            "reason": prediction.reason,
            "on_topic": prediction.on_topic,
        }
        if self._text:
            fields["text"] = question[:_MAX_CHARS]
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self._follow()
            written = os.write(self._file, b"\n" + line if self._torn() else line)
        except OSError as error:
            raise self._unwritten(error.strerror) from None
        if written < len(line):  # what did get in is a torn line, after which a new one begins
            raise self._unwritten("no room left")

    def close(self) -> None:
        """Close the file. Harmless a second time."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> int:
        try:
            # Without O_NONBLOCK a pipe that nobody reads would keep us waiting.
            unwaiting = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | PLAIN | unwaiting
            return os.open(self._path, flags, 0o600)
        except ValueError:  # a NUL or a lone surrogate in the name
            raise DataError(f"{str(self._path)!r}: no file can have this name") from None

    def _follow(self) -> None:
        """Open the path anew if it no longer names the open file."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        except FileNotFoundError:
            pass
        fresh = self._opened()
        self.close()
        self._file = fresh

    def _torn(self) -> bool:
        """Whether the file ends in the middle of a line: a writer was killed, or had no room.

        If it is another writer that is at its record just now, an empty line comes of it, which
        readers pass over; what it writes stays in one piece.
        """
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                return False  # a pipe has no end to look at
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:  # empty, or it may be written and not read
            return False

    def _unwritten(self, reason: str | None) -> DataError:
        return DataError(f"{self._path}: the answer is not in the log: {reason}")


def scan_log(path: Path) -> Iterator[Record | None]:
    """The records of a log in the order of the file, one at a time; None for what is no record.

    A line that was torn (a full disk, a crash) does not spoil a record that follows on it, as when
    two processes wrote at once.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_BYTES):
                if line.strip():
                    yield from _records(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name") from None


def read_log(
    path: Path,
    *,
    model: str | None = None,
    since: datetime | None = None,
    last: int | None = None,
) -> LogWindow:
    """A stretch of a log. Only what is asked for is kept in memory.

    Args:
        path: of the log.
        model: only the records of this one; of any model if None.
        since: only what was answered then or later.
        last: at most so many, the last of the file.

    Raises:
        DataError: the file cannot be read.
    """
    records: deque[Record] = deque(maxlen=last)
    skipped = others = 0
    for record in scan_log(path):
        if record is None:
            skipped += 1
        elif model is not None and record.model != model:
            others += 1
        elif since is None or record.time >= since:
            records.append(record)
    return LogWindow(list(records), skipped, others)


def _records(line: bytes) -> Iterator[Record | None]:
    """What a line holds: one record, or behind a torn one another."""
    torn, *rest = line.split(_START)
    if torn:
        yield None
    for piece in rest:
        yield _record(_START + piece)


def _record(data: bytes) -> Record | None:
    try:
        fields = json.loads(data)
        return Record(
            time=_time(fields["time"]),
            model=_typed(fields["model"], str),
            rule=_typed(fields["rule"], str),
            label=_typed(fields["label"], str),
            confidence=_or_none(fields["confidence"], _share),
            label_mass=_or_none(fields["label_mass"], _share),
            abstained=_typed(fields["abstained"], bool),
            reason=_or_none(fields["reason"], lambda value: _typed(value, str)),
            on_topic=_or_none(fields["on_topic"], _number),
            text=_or_none(fields.get("text"), lambda value: _typed(value, str)),
        )
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None


_T = TypeVar("_T")


def _typed(value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _or_none(value: Any, read: Callable[[Any], _T]) -> _T | None:
    return None if value is None else read(value)


def _time(value: Any) -> datetime:
    time = datetime.fromisoformat(value)
    if time.tzinfo is None or not 1970 <= time.year < 9999:  # a picture can show these
        raise ValueError
    return time.astimezone(UTC)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _share(value: Any) -> float:
    # Sums of rounded shares may pass 1 by a little.
    if isinstance(value, bool) or not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError
    return float(min(max(value, 0.0), 1.0))
