"""Lint of questions: labels that do not fit, repeats, damaged characters, lengths."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from qcat.data.characters import oddities
from qcat.data.findings import Finding, Question, listed, same_questions, shown
from qcat.data.near import families, near_pairs
from qcat.data.split import FEWEST
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM
from qcat.spelling import fold
from qcat.task import Task

ENOUGH = 10
"""Fewer different questions than this make a label hard to learn."""
MOST_WORDS, MOST_CHARS = 60, 500
"""A question beyond either is long; the characters count where no spaces are written."""
IMBALANCE = 10.0
"""The largest label over the smallest."""
_SUGGESTED = 50  # unknown labels that a likeness is looked up for: each costs some milliseconds


# Labels in the data


def label_findings(task: Task, questions: Sequence[Question]) -> Iterator[Finding]:
    """Labels that the task lacks or spells otherwise, and labels with too few questions."""
    by_label: defaultdict[str, list[Question]] = defaultdict(list)
    misspelled: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_label[question.label].append(question)
        if question.label != question.row.label:
            misspelled[question.row.label].append(question)
    for label, found in misspelled.items():
        right = found[0].label
        yield Finding(
            "warning",
            "label-spelling",
            f"label {shown(label)} ({_times(found)}) is read as {shown(right)}: "
            "write it so (--fix does)",
            (found[0].row.line,),
            (right,),
        )
    unknown = [label for label in by_label if label not in task.labels]
    for number, label in enumerate(unknown):
        likeness = _alike(label, task.labels) if number < _SUGGESTED else None
        advice = f"did you mean {shown(likeness)}?" if likeness else "add it or mend the rows"
        yield Finding(
            "error",
            "unknown-label",
            f"label {shown(label)} ({_times(by_label[label])}) is not in the task: {advice}",
            (by_label[label][0].row.line,),
            (label,),
        )
    for label in task.labels:
        found = by_label[label]
        yield from _amount(label, found, any(question.row.group for question in found))
    counts = {label: len(by_label[label]) for label in task.labels if by_label[label]}
    if counts:
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[most] / counts[least] >= IMBALANCE:
            yield Finding(
                "warning",
                "imbalance",
                f"{shown(most)} has {counts[most]} questions and {shown(least)} "
                f"{counts[least]}: write more for the small labels",
                labels=(most, least),
            )


def _amount(label: str, found: Sequence[Question], grouped: bool) -> Iterator[Finding]:
    different = len({question.key for question in found})
    # A repeat is no question of its own, and a group stays on one side of a split.
    units = len({question.row.group or question.key for question in found})
    name, labels = shown(label), (label,)
    if not found:
        message = f"label {name} has no questions: write at least {ENOUGH}, or drop the label"
        yield Finding("error", "unused-label", message, labels=labels)
    elif units < FEWEST:
        kind = "group" if grouped else "different question"
        yield Finding(
            "error",
            "too-few",
            f"label {name} has {units} {kind}{'s' if units > 1 else ''}: training, validation "
            f"and test need at least {FEWEST}: write more",
            labels=labels,
        )
    elif different < ENOUGH:
        message = f"label {name} has {different} different questions: write at least {ENOUGH}"
        yield Finding("warning", "few", message, labels=labels)


def _alike(label: str, labels: Iterable[str]) -> str | None:
    by_fold = {fold(known): known for known in labels}
    found = difflib.get_close_matches(fold(label)[:200], by_fold, 1)
    return by_fold[found[0]] if found else None


def _times(found: Sequence[Question]) -> str:
    return "1 row" if len(found) == 1 else f"{len(found)} rows"


# Repeats


def repeat_findings(questions: Sequence[Question]) -> Iterator[Finding]:
    """The same question twice, or nearly, under one label or under two."""
    by_key = same_questions(questions)
    for same in by_key.values():
        lines = tuple(question.row.line for question in same)
        labels = tuple(dict.fromkeys(question.label for question in same))
        text = shown(same[0].text)
        if len(labels) > 1:
            message = f"{text} stands under {listed(labels)}: keep one (--fix drops all)"
            yield Finding("error", "label-conflict", message, lines, labels)
        elif len(same) > 1:
            message = f"{text} stands {len(same)} times: keep one (--fix does)"
            yield Finding("warning", "duplicate", message, lines, labels)
    groups: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if question.row.group is not None:
            groups[question.row.group].append(question)
    for group, members in groups.items():
        first = {question.label: question.row.line for question in reversed(members)}
        if len(first) > 1:
            labels = tuple(dict.fromkeys(question.label for question in members))
            yield Finding(
                "error",
                "group-conflict",
                f"group {shown(group)} stands under {listed(labels)}: "
                "a group has one label: rename it for the others",
                tuple(first[label] for label in labels),
                labels,
            )
    yield from _near([same[0] for same in by_key.values()])


def _near(questions: Sequence[Question]) -> Iterator[Finding]:
    """What nearly repeats another: under two labels in pairs, under one in families."""
    pairs = near_pairs(
        [question.key for question in questions],
        [question.label for question in questions],
        [question.unit for question in questions],
    )
    within = []
    for one, two, likeness in pairs:
        a, b = questions[one], questions[two]
        if a.label == b.label:
            within.append((one, two, likeness))
            continue
        labels = (a.label, b.label)
        yield Finding(
            "warning",
            "near-conflict",
            f"{_near_pair(a, b, likeness)} are under {listed(labels)}: "
            "look whether one label is wrong",
            (a.row.line, b.row.line),
            labels,
        )
    for family, (one, two, likeness) in families(within):
        a = questions[one]
        more = f" (and {len(family) - 2} more)" if len(family) > 2 else ""
        yield Finding(
            "warning",
            "near-duplicate",
            f"{_near_pair(a, questions[two], likeness)}{more} could be parted by a split: "
            "give them one group, or keep one",
            tuple(questions[at].row.line for at in family),
            (a.label,),
        )


def _near_pair(a: Question, b: Question, likeness: float) -> str:
    return f"{shown(a.text)} and {shown(b.text)} ({likeness:.2f} alike)"


# Characters and lengths


def character_findings(questions: Iterable[Question]) -> Iterator[Finding]:
    """Damaged or invisible characters."""
    for question in questions:
        raw, line = question.row.text, question.row.line
        for code, found, advice in oddities(raw):
            message = f"{shown(question.text)} has {found}: {advice}"
            yield Finding("warning", code, message, (line,), (question.label,))


def joined_findings(task: Task, questions: Iterable[Question], separator: str) -> Iterator[Finding]:
    """Texts of CSV over several lines of which one looks like a row: a stray quote joins rows.

    A comma before a space, or between digits, is one of a sentence.
    """
    parted = re.compile(re.escape(separator) + r"[^\s\d]")
    for question in questions:
        lines = question.row.text.splitlines()
        if len(lines) > 1 and any(
            parted.search(line) or any(task.spelled(part.strip()) for part in line.split(separator))
            for line in lines
        ):
            message = f"{shown(question.text)} has a line that looks like a row: is a quote astray?"
            message += " Remove or close it"
            line, label = (question.row.line,), (question.label,)
            yield Finding("warning", "joined-rows", message, line, label)


def length_findings(
    questions: Sequence[Question], encoded: EncodedTask | None
) -> Iterator[Finding]:
    """Questions that are too long, by their tokens where the task is encoded."""
    for question in questions:
        line, text = (question.row.line,), question.text
        words = text.count(" ") + 1
        if encoded:
            count = len(encoded.ids(text))
            if count > QUESTION_ROOM:
                message = f"{shown(text)} takes {count} tokens, room for {QUESTION_ROOM}"
                message += ": shorten it"
                yield Finding("error", "too-long", message, line, (question.label,))
        elif words > MOST_WORDS or len(text) > MOST_CHARS:
            message = f"{shown(text)} has {words} words, {len(text)} characters"
            advice = f"shorten it, or count its tokens with --base (room for {QUESTION_ROOM})"
            yield Finding("warning", "long", f"{message}: {advice}", line, (question.label,))
