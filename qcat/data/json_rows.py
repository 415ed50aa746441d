"""Rows of JSONL and JSON files, one at a time; bad ones are reported, not raised.

JSONL has one object per line. Also accepted are a list of objects, an object with one such list
(under "data", "rows" or the like) and otherwise only plain values, and a sequence of objects that
span several lines. These are held in memory as a whole; JSONL is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qcat.data.json_faults import json_fault
from qcat.data.opened import FoundRow, badly_encoded, opened_text

_LISTS = ("data", "rows", "examples", "records", "questions")
_SPACE = re.compile(r"[ \t\n\r]*")


class _Repeated(dict[str, Any]):
    """An object in which a key occurs twice."""

    key: str


class _Document(NamedTuple):
    """A JSON file that is not JSONL."""

    text: str
    start: int
    """Where the first object is looked for."""
    in_list: bool
    note: str
    whole: bool = False
    """Whether the list is to be all of the file."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    repeated = _Repeated(found)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_rows(path: Path, shape: str) -> Iterator[FoundRow]:
    """The objects of a file; blank lines are skipped.

    Args:
        path: of the file.
        shape: what an object should look like, for messages.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    document = _document(path)
    return _line_rows(path, shape) if document is None else _document_rows(document, shape)


def json_note(path: Path) -> str | None:
    """The form that the file was read as, if not JSONL. Raises the errors of `json_rows`."""
    document = _document(path)
    return document and document.note


def _line_rows(path: Path, shape: str) -> Iterator[FoundRow]:
    with opened_text(path, newline=None) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            if problem := badly_encoded(text):
                yield line, problem
                continue
            try:
                value = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                yield line, json_fault(text, error)
                continue
            yield line, _fields(value, shape)


def _fields(value: Any, shape: str) -> dict[str, Any] | str:
    if isinstance(value, _Repeated):
        return f"two values under the key {value.key[:60]!r}: keep one"
    if isinstance(value, dict):
        return value
    found = ", found a list: write one object a line" if isinstance(value, list) else ""
    return f"{shape} expected{found}"


# Files that are not JSONL


def _document(path: Path) -> _Document | None:
    """A file whose first line shows that it is not JSONL; None for JSONL and for non-JSON."""
    with opened_text(path, newline=None) as file:
        first = next((line for line in file if line.strip()), "").strip()
        if first[:1] not in ("{", "["):
            return None
        whole = True
        try:
            value = json.loads(first)
        except (ValueError, RecursionError) as error:
            whole = False
            # An object that spans several lines continues after the first of them.
            if first[0] == "{" and getattr(error, "pos", 0) < len(first):
                return None
        if whole and isinstance(value, dict) and _list_key(value) is None:
            return None
        if whole and any(line.strip() for line in file):  # each line is complete by itself
            return None
    with opened_text(path, newline=None) as file:
        text = file.read()
    if first[0] == "[":
        return _Document(text, text.index("[") + 1, True, "read as one list of objects", True)
    return _of_objects(text)


def _of_objects(text: str) -> _Document | None:
    """A file of objects over several lines, or of one that has the list of rows in it."""
    start = text.index("{")
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    key = _list_key(value)
    if key is None or text[end:].strip():
        return _Document(text, start, False, "read as objects over several lines")
    found = re.search(rf'"{re.escape(key)}"\s*:\s*\[', text)
    return found and _Document(text, found.end(), True, f"read as the list under {key!r}")


def _list_key(value: dict[str, Any]) -> str | None:
    """The key of an object's only list of rows, if all its other values are plain."""
    keys = [key for key, inner in value.items() if isinstance(inner, list | dict)]
    if len(keys) != 1 or keys[0].lower() not in _LISTS or "text" in value:
        return None
    rows = value[keys[0]]
    is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return keys[0] if is_list else None


def _document_rows(document: _Document, shape: str) -> Iterator[FoundRow]:
    """The objects of a document, up to the first place that is not JSON."""
    text, at, counted, line = document.text, document.start, 0, 1
    wants_object = False  # after a comma
    while True:
        at = _after_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text):
            if document.in_list:
                yield line, "the list does not end: ] expected"
            return
        if document.in_list and text[at] == "]":
            if wants_object:
                yield line, "a comma after the last object: remove it"
            at = _after_space(text, at + 1)
            if document.whole and at < len(text):
                line += text.count("\n", counted, at)
                yield line, "more after the list, which has ended: make one list of all objects"
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line + text.count("\n", at, getattr(error, "pos", at)), json_fault(text, error)
            return
        yield line, badly_encoded(text[at:end]) or _fields(value, shape)
        at = end
        if document.in_list:
            at = _after_space(text, end)
            wants_object = text[at : at + 1] == ","
            if not wants_object and text[at : at + 1] not in ("]", ""):
                yield line + text.count("\n", counted, at), "a comma or ] expected after the object"
                return
            at += wants_object


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
