"""Opens files for reading, with qcat's own error messages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qcat.charset import HEAD, escaped_byte, foreign, not_utf8
from qcat.errors import DataError

FoundRow = tuple[int, dict[str, Any] | str]
"""The line where a row begins, from 1, and its fields by column; or, of a row that cannot be read,
what is wrong with it."""
FORMATS = {
    ".csv": ".csv", ".tsv": ".csv", ".tab": ".csv", ".jsonl": ".jsonl", ".json": ".jsonl",
    ".parquet": ".parquet",
}  # fmt: skip
"""Suffixes of files that are read, with the usual one of their format."""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read.

    Raises:
        DataError: it cannot be read; also for an OSError that is raised within.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise DataError(f"{str(path)!r}: no file can have this name") from None
    with file:
        try:
            yield file
        except OSError as error:
            reason = error.strerror or "it is damaged"
            raise DataError(f"{path}: cannot be read: {reason}") from None


@contextmanager
def opened_text(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """A file of UTF-8 text to read, with or without a byte order mark, and Ctrl-Z at its end.

    Bytes that are not UTF-8 become surrogates, which `badly_encoded` finds in their row.

    Args:
        path: of the file.
        newline: as for `open`.

    Raises:
        DataError: as `opened`; or the file is not text, and the message says what it is.
    """
    with opened(path) as file:
        if what := foreign(file.read(HEAD)):
            raise DataError(f"{path}: {what}")
        padding = _padding(file)
        file.seek(0)
        source = io.BufferedReader(_Shorter(file, padding)) if padding is not None else file
        with io.TextIOWrapper(source, "utf-8-sig", "surrogateescape", newline) as text:
            yield text


class _Shorter(io.RawIOBase):
    """A file up to one of its bytes."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._left = file, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _padding(file: IO[bytes]) -> int | None:
    """Where the Ctrl-Z begin with which old programs end a text; None if there is none."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - 128))
    tail = file.read()
    kept = len(tail.rstrip(b"\x1a"))
    return None if kept == len(tail) else end - len(tail) + kept


def badly_encoded(text: str) -> str | None:
    """What is wrong with a text from a file, if one of its bytes is not UTF-8."""
    byte = escaped_byte(text)
    return None if byte is None else not_utf8(byte)
