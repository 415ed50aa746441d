"""Questions on stdin, one a line, as they come."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from typing import NamedTuple

from qcat.charset import HEAD, not_utf8, wider
from qcat.errors import DataError, QuestionError


class Line(NamedTuple):
    """A question, or a line that cannot be one."""

    text: str
    """With U+FFFD for what cannot be decoded."""
    error: QuestionError | None = None


def available_lines(descriptor: int) -> Iterator[list[Line]]:
    """Lines of stdin in groups: as many as are there, so that a slow writer is answered at once.

    A byte order mark is passed over.

    Raises:
        DataError: stdin is UTF-16 or UTF-32, by how it begins.
    """
    rest, first = b"", True
    while True:
        chunk = os.read(descriptor, 1 << 16)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines, rest = [rest], b""
        if lines:
            if first:
                _check_beginning(b"\n".join([*lines[:HEAD], rest]))
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                first = False
            yield [_decoded(line.removesuffix(b"\r")) for line in lines]
        if not chunk:
            return


def _check_beginning(data: bytes) -> None:
    if what := wider(data[:HEAD]):
        raise DataError(f"stdin: {what}")


def _decoded(line: bytes) -> Line:
    try:
        return Line(line.decode())
    except UnicodeDecodeError as error:
        return Line(line.decode(errors="replace"), QuestionError(not_utf8(line[error.start])))
