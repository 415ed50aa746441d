"""Questions on stdin, one a line, as they come."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from qcat.charset import HEAD, foreign, not_utf8
from qcat.errors import DataError, QuestionError

_END = re.compile(rb"\r\n|\r|\n")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a]")


class Line(NamedTuple):
    """A question, or a line that cannot be one."""

    text: str
    """With U+FFFD for what cannot be decoded."""
    error: QuestionError | None = None


def available_lines(descriptor: int) -> Iterator[list[Line]]:
    """Lines of stdin in groups: as many as are there, so that a slow writer is answered at once.

    A byte order mark is passed over. A line ends as in files: with a line feed, a carriage return,
    or both.

    Raises:
        DataError: stdin is no text, or UTF-16 or UTF-32, by how it begins.
    """
    rest, head, first, returned = b"", b"", True, False
    while True:
        chunk = os.read(descriptor, 1 << 16)
        if first:
            head = (head + chunk)[:HEAD]
        data = rest + (chunk.removeprefix(b"\n") if returned else chunk)
        returned = chunk.endswith(b"\r")  # a line feed that comes next belongs to it
        *lines, rest = _END.split(data)
        if not chunk and rest:
            lines, rest = [rest], b""
        if lines:
            if first:
                _check_beginning(head)
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                first = False
            yield [_decoded(line) for line in lines]
        if not chunk:
            return


def _check_beginning(head: bytes) -> None:
    if _is_binary(head) and (what := foreign(head)):
        raise DataError(f"stdin: {what}")


def _is_binary(head: bytes) -> bool:
    """Whether something is no text: a question may begin with the letters that a format does."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its end may be cut
    except UnicodeDecodeError:
        return True
    return _CONTROL.search(head) is not None


def _decoded(line: bytes) -> Line:
    try:
        return Line(line.decode())
    except UnicodeDecodeError as error:
        return Line(line.decode(errors="replace"), QuestionError(not_utf8(line[error.start])))
