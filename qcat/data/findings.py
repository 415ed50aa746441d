"""Findings of lint, and questions in a comparable form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qcat.data.dataset import Row

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One problem or note."""

    severity: Severity
    code: str
    """Short and stable, such as `label-conflict`."""
    message: str
    """What is wrong and what to do, one printable line."""
    lines: tuple[int, ...] = ()
    """Where in the file of questions, from 1; none if it is about the task."""
    labels: tuple[str, ...] = ()
    """The labels that it is about."""


@dataclass(frozen=True)
class Report:
    """All findings, errors first, and counts."""

    findings: tuple[Finding, ...]
    questions: int = 0
    """Readable rows with a text."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Questions of each label of the task, in its order; empty without a file."""
    passes: int | None = None
    """Forward passes that a question costs; None without a tokenizer."""

    def count(self, severity: Severity) -> int:
        """Number of findings with this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "questions": self.questions,
            "labels": dict(self.counts),
            "forward_passes": self.passes,
            **{severity: self.count(severity) for severity in get_args(Severity)},
            "findings": [vars(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class Question:
    """A row that can be compared with others."""

    row: Row
    text: str
    """Cleaned."""
    key: str
    """The text folded: two questions with the same key are the same."""
    label: str
    """The task's spelling of the label where only case or spaces differ, else as it stands."""

    @property
    def unit(self) -> str | int:
        """The unit that a split keeps together: the group, or the single row."""
        return self.row.line if self.row.group is None else self.row.group


def same_questions(questions: Iterable[Question]) -> dict[str, list[Question]]:
    by_key: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_key[question.key].append(question)
    return by_key


def shown(text: str) -> str:
    """A text quoted and escaped, fit for one line of a terminal."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def listed(labels: Sequence[str]) -> str:
    quoted = [shown(label) for label in labels[:6]]
    if len(labels) > 6:
        return f"{', '.join(quoted)} and {len(labels) - 6} more"
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"
