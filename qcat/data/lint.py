"""Checks whether a task and its data are fit for training, and writes repaired copies.

Looks at the questions (repeats, contradictions, balance, damaged text), at the label names, and,
if a tokenizer is given, at the label tokens. Prints nothing; does not use model weights.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from qcat.data.characters import unmangle
from qcat.data.csv_rows import csv_separator
from qcat.data.dataset import BadRow, Row, jsonl_line, reading_notes, scan_rows
from qcat.data.findings import Finding, Question, Report, Severity, same_questions
from qcat.data.lint_names import name_findings, token_findings
from qcat.data.lint_questions import (
    character_findings,
    joined_findings,
    label_findings,
    length_findings,
    repeat_findings,
)
from qcat.data.opened import FORMATS
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import Tokenizer, clean_question
from qcat.errors import DataError, ModelError, QuestionError
from qcat.files import write_whole
from qcat.spelling import fold
from qcat.task import Task


@dataclass(frozen=True)
class Fixed:
    """What `fix` made of a file."""

    rows: tuple[Row, ...]
    """As written; the lines are those of the input."""
    dropped: Mapping[str, tuple[int, ...]]
    """Code of the reason to lines of the input."""
    changed: Mapping[str, tuple[int, ...]]
    """The same of rows that were kept with another text or label."""


def lint(task: Task, path: Path | None = None, tokenizer: Tokenizer | None = None) -> Report:
    """Check a task, its questions if `path` is given, and its tokens if `tokenizer` is.

    Raises:
        DataError: the file cannot be read at all; a bad row is a finding.
        TaskError: the task answers in codes for which the vocabulary has no tokens.
    """
    findings = list(name_findings(task))
    passes = None
    questions: list[Question] = []
    encoded = None
    if tokenizer:
        try:
            encoded = EncodedTask.build(task, tokenizer)
        except ModelError as error:
            findings.append(Finding("error", "label-tokens", str(error)))
        else:
            passes, found = token_findings(encoded)
            findings += found
    if path:
        questions, found = _read(task, path)
        findings += found
        findings += label_findings(task, questions)
        findings += repeat_findings(questions)
        findings += character_findings(questions)
        if FORMATS.get(path.suffix.lower()) == ".csv":
            findings += joined_findings(task, questions, csv_separator(path))
        if encoded or not tokenizer:  # otherwise the problem with the tokens is already a finding
            findings += length_findings(questions, encoded)
    order = get_args(Severity)
    counted = Counter(question.label for question in questions)
    return Report(
        tuple(sorted(findings, key=lambda f: (order.index(f.severity), f.code, f.lines))),
        len(questions),
        {label: counted[label] for label in task.labels} if path else {},
        passes,
    )


def fix(task: Task, path: Path, target: Path) -> Fixed:
    """Write a copy of a file of questions as JSONL, repaired where that is safe.

    Texts are cleaned as in `clean_question`, mojibake is repaired if each sequence of it is
    complete, and labels get the task's spelling if only case or spaces differ. Unreadable and empty
    rows, all rows of a text with two labels, and repeats of a question with the same label are
    dropped.

    Raises:
        DataError: the input cannot be read, the target exists or cannot be written, or no row
            would be left.
    """
    if FORMATS.get(target.suffix.lower(), ".jsonl") != ".jsonl":
        raise DataError(f"{target}: the copy is JSONL: name it {target.with_suffix('.jsonl').name}")
    if os.path.lexists(target):
        raise DataError(f"{target}: exists already: name another file")
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    changed: defaultdict[str, list[int]] = defaultdict(list)
    questions: list[Question] = []
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            dropped["unreadable"].append(row.line)
            continue
        mended = unmangle(row.text)
        question = _question(task, replace(row, text=mended))
        if question is None:
            dropped["empty-text"].append(row.line)
            continue
        if mended != row.text:
            changed["mojibake"].append(row.line)
        elif question.text != row.text:
            changed["cleaned"].append(row.line)
        if question.label != row.label:
            changed["label-spelling"].append(row.line)
        questions.append(question)
    kept = []
    for same in same_questions(questions).values():
        if len({question.label for question in same}) > 1:
            dropped["label-conflict"] += [question.row.line for question in same]
            continue
        kept.append(same[0])
        dropped["duplicate"] += [question.row.line for question in same[1:]]
    if not kept:
        raise DataError(f"{path}: no row is left to write: mend it by hand")
    rows = tuple(replace(q.row, text=q.text, label=q.label) for q in kept)
    write_whole(target, b"".join(jsonl_line(row.text, row.label, row.group) for row in rows))
    gone = {line for lines in dropped.values() for line in lines}
    return Fixed(
        tuple(rows),
        {code: tuple(sorted(lines)) for code, lines in sorted(dropped.items()) if lines},
        {
            code: tuple(line for line in lines if line not in gone)
            for code, lines in sorted(changed.items())
            if not gone.issuperset(lines)
        },
    )


# Reading


def _read(task: Task, path: Path) -> tuple[list[Question], list[Finding]]:
    questions: list[Question] = []
    findings = [Finding("info", "format", note, (1,)) for note in reading_notes(path)]
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            findings.append(Finding("error", "unreadable", row.problem, (row.line,)))
        elif question := _question(task, row):
            questions.append(question)
        else:
            message = "no text: write a question or drop the row"
            findings.append(Finding("error", "empty-text", message, (row.line,)))
    return questions, findings


def _question(task: Task, row: Row) -> Question | None:
    try:
        text = clean_question(row.text)
    except QuestionError:
        return None
    return Question(row, text, fold(text), task.spelled(row.label) or row.label)
