"""The prediction log: one line of JSON per answer; any number of processes may append at once.

A record is one `write` to a descriptor opened with O_APPEND. On a local disk the kernel keeps such
writes separate and holds the data once the call returns, so a killed process loses no record for
which `add` has returned. A power failure can lose the last seconds, because nothing is forced to
the disk. NFS has no atomic append: keep the log on a local disk.
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
"""How each record begins. No text in a record can contain it: JSON escapes its quotes."""
_MAX_CHARS = 20_000  # of a question that is kept
_MAX_BYTES = 1 << 20  # of a line that is read at once


@dataclass(frozen=True, slots=True)
class Record:
    """One answer as stored in the log."""

    time: datetime
    """When the answer was given, in UTC."""
    model: str
    """The model that gave it, as in `Classifier.identity`."""
    rule: str
    """What decided whether to abstain: the model's own thresholds, or one set by hand."""
    label: str
    confidence: float | None
    """As in `Prediction`, like the next three."""
    label_mass: float | None
    abstained: bool
    reason: str | None
    on_topic: float | None
    text: str | None
    """The question; None unless questions are logged."""


@dataclass(frozen=True)
class LogWindow:
    """A section of a log."""

    records: list[Record]
    skipped: int
    """Lines of the whole file without a record: incomplete, or not written by qcat."""
    others: int
    """Records of another model in the whole file."""


class PredictionLog:
    """A log to append to. Close it, or use it in a `with` statement.

    If the file is renamed or deleted meanwhile (logrotate), the next record starts a new file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, model: str, rule: str, text: bool = False
    ) -> None:
        """Open the file, or create it, readable by its owner only.

        Args:
            path: of the file.
            model: as in `Record`.
            rule: as in `Record`.
            text: also store the questions.

        Raises:
            DataError: it cannot be opened, or is not a file.
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
        """Append one answer. Once this returns, the record survives if the process is killed.

        Raises:
            DataError: it cannot be written, for example because the disk is full.
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
        if written < len(line):  # an incomplete line; the next record starts a new one
            raise self._unwritten("no room left")

    def close(self) -> None:
        """Close the file. May be called more than once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> int:
        try:
            # Without O_NONBLOCK, opening a pipe that nobody reads would block.
            unwaiting = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | PLAIN | unwaiting
            return os.open(self._path, flags, 0o600)
        except ValueError:  # a NUL or a lone surrogate in the name
            raise DataError(f"{str(self._path)!r}: no file can have this name") from None

    def _follow(self) -> None:
        """Reopen the path if it no longer refers to the open file."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        except FileNotFoundError:
            pass
        fresh = self._opened()
        self.close()
        self._file = fresh

    def _torn(self) -> bool:
        """Whether the file ends in the middle of a line: a writer was killed, or the disk was full.

        If another writer is writing its record at this moment, the result is an empty line, which
        readers skip; that writer's record stays intact.
        """
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                return False  # a pipe has no end that could be read
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:  # empty, or writable but not readable
            return False

    def _unwritten(self, reason: str | None) -> DataError:
        return DataError(f"{self._path}: the answer is not in the log: {reason}")


def scan_log(path: Path) -> Iterator[Record | None]:
    """The records of a log in file order, one at a time; None for anything that is not a record.

    If an incomplete line (after a full disk or a crash) is followed by a record on the same line,
    as when two processes wrote at once, that record is still read.

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
    """A section of a log. Only the selected records are kept in memory.

    Args:
        path: of the log.
        model: only records of this model; of any model if None.
        since: only answers given at this time or later.
        last: at most this many records, from the end of the file.

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
    """The records in a line, usually one; None stands for an incomplete one before them."""
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
    # Sums of rounded shares may slightly exceed 1.
    if isinstance(value, bool) or not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError
    return float(min(max(value, 0.0), 1.0))
