"""Imports answers: the JSON that the page of `qcat review html` saves, or a CSV.

A CSV has a header line, a column `label`, and `hash` or `text` or both, as `questions_csv` writes
it. The question is identified by its hash, or by its text if there is no hash. If both are given,
they must match. A row without a label is not answered yet.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from qcat.encoding.prompt import clean_question
from qcat.errors import QuestionError, ReviewError
from qcat.monitor.review import NONE, Decided, ReviewQueue, question_hash

FORMAT = "qcat-review"
"""Value of `format` in the page's JSON."""

GUARD = "'"
"""Precedes cells of a CSV that a spreadsheet would interpret as a formula."""

_KEYS = ("hash", "text")
_Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""The place of a row, and its fields; a label of None stands for `NONE`."""


def read_answers(path: Path, queue: ReviewQueue) -> list[Decided]:
    """Read answers to the questions of a queue: CSV by the file's suffix, else JSON.

    Raises:
        ReviewError: names the file and place; the file is neither, the queue lacks a question or
            label, or a question has two answers.
    """
    known = queue.hashes()
    places: dict[str, tuple[str, str | None]] = {}
    answers = []
    for where, fields in (_csv if path.suffix.lower() == ".csv" else _json)(path, queue):
        label = fields.get("label", "")
        if label == "":
            continue
        if label is not None and label not in queue.labels:
            raise ReviewError(
                f"{where}: label {_shown(label)} is none of the queue's: mend it, or write {NONE!r}"
            )
        hash, text = _question(fields, known, where)
        if hash not in known:
            raise ReviewError(f"{where}: no such question in {queue.path}: take the row out")
        first, other = places.setdefault(hash, (where, label))
        if other != label:
            raise ReviewError(f"{where}: another label than at {first} for one question: keep one")
        answers.append(Decided(hash, text, label))
    return answers


def _question(
    fields: Mapping[str, Any], known: Container[str], where: str
) -> tuple[str, str | None]:
    """Hash and text of the question in a row."""
    hash, text = (fields.get("hash") or "").lower(), fields.get("text")
    if not hash and not text:
        raise ReviewError(f"{where}: names no question: fill in hash or text")
    if not text:
        return hash, None
    try:
        for bare in (text, text.removeprefix(GUARD)):
            found = question_hash(bare)
            if found == hash or (not hash and found in known):
                return found, clean_question(bare)
    except QuestionError as error:
        raise ReviewError(f"{where}: {error}") from None
    if not hash:
        return question_hash(text), text
    raise ReviewError(f"{where}: the text is not that of the hash: mend it, or take it out")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ReviewError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ReviewError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise ReviewError(f"{str(path)!r}: no file can have this name") from None


def _csv(path: Path, queue: ReviewQueue) -> _Rows:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    line = 1
    try:
        columns = next(reader, [])
        if "label" not in columns or not set(_KEYS) & set(columns):
            raise ReviewError(
                f"{path}:1: a header line with label and one of {' or '.join(_KEYS)} expected"
            )
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(columns):
                raise ReviewError(f"{path}:{line}: more fields than columns: quote what has commas")
            row: dict[str, str | None] = {
                column: cell.strip() for column, cell in zip(columns, cells, strict=False)
            }
            row["label"] = label = unicodedata.normalize("NFC", row.get("label") or "")
            if label not in queue.labels:
                bare = label.removeprefix(GUARD)
                row["label"] = None if label.casefold() == NONE else bare or label
            if any(cells):
                yield f"{path}:{line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ReviewError(f"{path}:{line}: not CSV: {error}") from None


def _json(path: Path, queue: ReviewQueue) -> _Rows:
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ReviewError(
            f"{path}: not JSON ({error}): name what the page saved, or a .csv"
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ReviewError(f"{path}: not what the page of `qcat review html` saves")
    if data.get("task") != queue.task:
        raise ReviewError(
            f"{path}: has answers for task {_shown(data.get('task'))}, and {queue.path} is of task "
            f"{queue.task!r}"
        )
    answers = data.get("answers")
    if not isinstance(answers, list):
        raise ReviewError(f"{path}: a list of answers expected: save the page's answers again")
    for number, answer in enumerate(answers, 1):
        where = f"{path}: answer {number}"
        if not isinstance(answer, dict) or not isinstance(answer.get("hash"), str):
            raise ReviewError(f'{where}: {{"hash": …, "label": …}} expected')
        if not isinstance(answer.get("label", 0), str | None):
            raise ReviewError(f"{where}: a label or null expected")
        yield where, {"hash": answer["hash"], "label": answer["label"]}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
