"""Is a task and its data fit to train on? Findings, and a copy mended where that is safe.

Looks at the questions (repeats, contradictions, balance, damaged text), at the label names, and
given a tokenizer at the label tokens. Prints nothing; knows no model weights.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from qcat.data.characters import oddities, unmangle
from qcat.data.dataset import BadRow, Row, jsonl_line, scan_rows
from qcat.data.near import families, near_pairs
from qcat.data.split import FEWEST
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import (
    QUESTION_ROOM,
    Encoder,
    Tokenizer,
    clean_question,
    with_codes,
)
from qcat.errors import DataError, ModelError, QuestionError, TaskError
from qcat.files import write_whole
from qcat.task import Task

Severity = Literal["error", "warning", "info"]

ENOUGH = 10
"""Fewer different questions than this make a label hard to learn."""
MOST_WORDS, MOST_CHARS = 60, 500
"""A question beyond either is long; the characters count where no spaces are written."""
IMBALANCE = 10.0
"""The largest label over the smallest."""
_SUGGESTED = 50  # unknown labels that a likeness is looked up for: each costs some milliseconds
_OVERLAP = 0.6  # words of two names that both have, over the words that either has
_LIKE = 0.88  # difflib's ratio of two names, about one letter in eight


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

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
    """All findings, errors first, and what was counted on the way."""

    findings: tuple[Finding, ...]
    questions: int = 0
    """Readable rows with a text."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Questions of each label of the task, in its order; empty without a file."""
    passes: int | None = None
    """Forward passes that a question costs; None without a tokenizer."""

    def count(self, severity: Severity) -> int:
        """How many findings have this severity."""
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
class Fixed:
    """What `fix` made of a file."""

    rows: tuple[Row, ...]
    """As written; the lines are those of the input."""
    dropped: Mapping[str, tuple[int, ...]]
    """Code of the reason to lines of the input."""
    changed: Mapping[str, tuple[int, ...]]
    """The same of rows that were kept with another text or label."""


@dataclass(frozen=True)
class _Question:
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
        """What a split keeps together: the group, or the row alone."""
        return self.row.line if self.row.group is None else self.row.group


def lint(task: Task, path: Path | None = None, tokenizer: Tokenizer | None = None) -> Report:
    """Check a task, its questions if `path` is given, and its tokens if `tokenizer` is.

    Raises:
        DataError: the file cannot be read at all; a bad row is a finding.
        TaskError: the task answers in codes for which the vocabulary has no tokens.
    """
    findings = list(_names(task))
    passes = None
    questions: list[_Question] = []
    encoded = None
    if tokenizer:
        try:
            encoded = EncodedTask.build(task, tokenizer)
        except ModelError as error:
            findings.append(Finding("error", "label-tokens", str(error)))
        else:
            passes, found = _tokens(encoded)
            findings += found
    if path:
        questions, found = _read(task, path)
        findings += found
        findings += _labels(task, questions)
        findings += _repeats(questions)
        findings += _characters(questions)
        findings += _lengths(questions, encoded)
    order = get_args(Severity)
    counted = Counter(question.label for question in questions)
    return Report(
        tuple(sorted(findings, key=lambda f: (order.index(f.severity), f.code, f.lines))),
        len(questions),
        {label: counted[label] for label in task.labels} if path else {},
        passes,
    )


def fix(task: Task, path: Path, target: Path) -> Fixed:
    """Write a copy of a file of questions, mended where that is safe, as JSONL.

    Texts are cleaned as `clean_question` does, mojibake is undone where each sequence of it is
    whole, and labels take the task's spelling where only case or spaces differ. Dropped are
    unreadable and empty rows, all rows of a text that stands under two labels, and repeats of a
    question under its label but the first.

    Raises:
        DataError: the input cannot be read, the target exists or cannot be written, or no row
            would be left.
    """
    if target.suffix.lower() in (".csv", ".parquet"):
        raise DataError(f"{target}: the copy is JSONL: name it {target.with_suffix('.jsonl').name}")
    if os.path.lexists(target):
        raise DataError(f"{target}: exists already: name another file")
    spelled = _speller(task)
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    changed: defaultdict[str, list[int]] = defaultdict(list)
    questions: list[_Question] = []
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            dropped["unreadable"].append(row.line)
            continue
        mended = unmangle(row.text)
        question = _question(replace(row, text=mended), spelled)
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
    for same in _same(questions).values():
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


def _read(task: Task, path: Path) -> tuple[list[_Question], list[Finding]]:
    spelled = _speller(task)
    questions, findings = [], []
    for row in scan_rows(path):
        if isinstance(row, BadRow):
            findings.append(Finding("error", "unreadable", row.problem, (row.line,)))
        elif question := _question(row, spelled):
            questions.append(question)
        else:
            message = "no text: write a question or drop the row"
            findings.append(Finding("error", "empty-text", message, (row.line,)))
    return questions, findings


def _question(row: Row, spelled: Callable[[str], str]) -> _Question | None:
    try:
        text = clean_question(row.text)
    except QuestionError:
        return None
    return _Question(row, text, _fold(text), spelled(row.label))


def _speller(task: Task) -> Callable[[str], str]:
    """A label to the task's own spelling of it, where only case or runs of spaces differ."""
    folded = Counter(_fold(label) for label in task.labels)
    names = {_fold(label): label for label in task.labels if folded[_fold(label)] == 1}
    return lambda label: label if label in task.labels else names.get(_fold(label), label)


def _fold(text: str) -> str:
    # Folding can undo NFC, so it is normalised again.
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def _same(questions: Iterable[_Question]) -> dict[str, list[_Question]]:
    by_key: defaultdict[str, list[_Question]] = defaultdict(list)
    for question in questions:
        by_key[question.key].append(question)
    return by_key


# Labels in the data


def _labels(task: Task, questions: Sequence[_Question]) -> Iterator[Finding]:
    by_label: defaultdict[str, list[_Question]] = defaultdict(list)
    misspelled: defaultdict[str, list[_Question]] = defaultdict(list)
    for question in questions:
        by_label[question.label].append(question)
        if question.label != question.row.label:
            misspelled[question.row.label].append(question)
    for label, found in misspelled.items():
        right = found[0].label
        yield Finding(
            "error",
            "label-spelling",
            f"label {_shown(label)} ({_times(found)}) is {_shown(right)} in the task: "
            "mend it (--fix does)",
            (found[0].row.line,),
            (right,),
        )
    unknown = [label for label in by_label if label not in task.labels]
    for number, label in enumerate(unknown):
        likeness = _alike(label, task.labels) if number < _SUGGESTED else None
        advice = f"did you mean {_shown(likeness)}?" if likeness else "add it or mend the rows"
        yield Finding(
            "error",
            "unknown-label",
            f"label {_shown(label)} ({_times(by_label[label])}) is not in the task: {advice}",
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
                f"{_shown(most)} has {counts[most]} questions and {_shown(least)} "
                f"{counts[least]}: write more for the small labels",
                labels=(most, least),
            )


def _amount(label: str, found: Sequence[_Question], grouped: bool) -> Iterator[Finding]:
    different = len({question.key for question in found})
    # A repeat is no question of its own, and a group stays on one side of a split.
    units = len({question.row.group or question.key for question in found})
    name, labels = _shown(label), (label,)
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
    by_fold = {_fold(known): known for known in labels}
    found = difflib.get_close_matches(_fold(label)[:200], by_fold, 1)
    return by_fold[found[0]] if found else None


def _times(found: Sequence[_Question]) -> str:
    return "1 row" if len(found) == 1 else f"{len(found)} rows"


# Repeats


def _repeats(questions: Sequence[_Question]) -> Iterator[Finding]:
    by_key = _same(questions)
    for same in by_key.values():
        lines = tuple(question.row.line for question in same)
        labels = tuple(dict.fromkeys(question.label for question in same))
        text = _shown(same[0].text)
        if len(labels) > 1:
            message = f"{text} stands under {_listed(labels)}: keep one (--fix drops all)"
            yield Finding("error", "label-conflict", message, lines, labels)
        elif len(same) > 1:
            message = f"{text} stands {len(same)} times: keep one (--fix does)"
            yield Finding("warning", "duplicate", message, lines, labels)
    groups: defaultdict[str, list[_Question]] = defaultdict(list)
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
                f"group {_shown(group)} stands under {_listed(labels)}: "
                "a group has one label: rename it for the others",
                tuple(first[label] for label in labels),
                labels,
            )
    yield from _near([same[0] for same in by_key.values()])


def _near(questions: Sequence[_Question]) -> Iterator[Finding]:
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
            f"{_near_pair(a, b, likeness)} are under {_listed(labels)}: "
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


def _near_pair(a: _Question, b: _Question, likeness: float) -> str:
    return f"{_shown(a.text)} and {_shown(b.text)} ({likeness:.2f} alike)"


# Characters and lengths


def _characters(questions: Iterable[_Question]) -> Iterator[Finding]:
    for question in questions:
        raw, line = question.row.text, question.row.line
        for code, found, advice in oddities(raw):
            message = f"{_shown(question.text)} has {found}: {advice}"
            yield Finding("warning", code, message, (line,), (question.label,))


def _lengths(questions: Sequence[_Question], encoded: EncodedTask | None) -> Iterator[Finding]:
    for question in questions:
        line, text = (question.row.line,), question.text
        words = text.count(" ") + 1
        if encoded:
            count = len(encoded.ids(text))
            if count > QUESTION_ROOM:
                message = f"{_shown(text)} takes {count} tokens, room for {QUESTION_ROOM}"
                message += ": shorten it"
                yield Finding("error", "too-long", message, line, (question.label,))
        elif words > MOST_WORDS or len(text) > MOST_CHARS:
            message = f"{_shown(text)} has {words} words, {len(text)} characters"
            advice = f"shorten it, or count its tokens with --base (room for {QUESTION_ROOM})"
            yield Finding("warning", "long", f"{message}: {advice}", line, (question.label,))


# Label names and label tokens


def _names(task: Task) -> Iterator[Finding]:
    split = {label: _words(label) for label in task.labels}
    for one, two in combinations(task.labels, 2):
        reason = _similar(split[one], split[two])
        short, long = sorted((one, two), key=len)
        if reason:
            told = task.labels[one] and task.labels[two]
            message = f"{_listed((one, two))} {reason}: rename one, make them one label, or "
            message += "see that their descriptions differ" if told else "describe both"
            yield Finding("info" if told else "warning", "label-similar", message, (), (one, two))
        elif long.casefold().startswith(short.casefold()):
            yield Finding(
                "info",
                "label-prefix",
                f"{_shown(short)} begins {_shown(long)}: qcat tells them apart; a runtime without "
                "its grammar may stop after the short one: rename one if you use such",
                labels=(short, long),
            )


def _words(label: str) -> tuple[str, ...]:
    """The words of a name in camel, snake or any other case, without the s of a plural."""
    spaced = re.sub(r"(?<=[^\W\d_])(?=\d)|(?<=[a-z])(?=[A-Z])", " ", label)
    words = [word for word in re.split(r"[\W_]+", spaced.casefold()) if word]
    return tuple(_singular(word) for word in words) or (label.casefold(),)


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" else word


def _similar(one: Sequence[str], two: Sequence[str]) -> str | None:
    """Why two names could mean the same, if they could."""
    if sorted(one) == sorted(two) or "".join(one) == "".join(two):
        return "are the same words"
    shared, either = set(one) & set(two), set(one) | set(two)
    if len(shared) / len(either) > _OVERLAP:
        return "share most of their words"
    a, b = " ".join(one), " ".join(two)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    if _digits(a) == _digits(b) and all(bound() >= _LIKE for bound in bounds):
        return "are spelled nearly alike"
    return None


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def _tokens(encoded: EncodedTask) -> tuple[int, list[Finding]]:
    """Forward passes that a question costs, and what the label tokens say."""
    task, tokenizer, trie = encoded.task, encoded.tokenizer, encoded.trie
    answers = dict(zip(task.labels, task.answers, strict=True))
    # As `LabelTrie` has it: the question's own pass, and one more for all branches below the root
    passes = 1 + bool(trie.deep_branches)
    spaced = _collisions(
        {label: tokens[0] for label, tokens in zip(answers, trie.sequences, strict=True)}
    )
    unspaced = {label: tokenizer.encode(answer, special=False) for label, answer in answers.items()}
    bare = _collisions({label: tokens[0] for label, tokens in unspaced.items() if tokens})
    findings = [
        Finding(
            "info",
            "token-collision",
            f"{_listed(labels)} begin with the same token: told apart in a second pass",
            labels=labels,
        )
        for labels in spaced
    ]
    new = [labels for labels in bare if not any(set(labels) <= set(known) for known in spaced)]
    findings += [
        Finding(
            "info",
            "token-collision-bare",
            f"{_listed(labels)} begin with the same token where no space stands before them: "
            "qcat writes the space; other programs should too",
            labels=labels,
        )
        for labels in new
    ]
    if passes > 1:
        collided = sum(len(labels) for labels in spaced)
        message = (
            f"a question costs {passes} forward passes, as {collided} of {len(answers)} labels "
            "share their first token with another"
        )
        findings.append(Finding("info", "forward-passes", message + _codes(task, tokenizer)))
    return passes, findings


def _codes(task: Task, encoder: Encoder) -> str:
    """Advice to answer in codes, where the vocabulary has them."""
    try:
        codes = with_codes(task.replace(verbalizer="code", codes={}), encoder).codes
    except TaskError:
        return ": rename labels so that they begin differently"
    label, code = next(iter(codes.items()))
    return (
        f': verbalizer = "code" in the task makes it 1 ({code} = {label}, …), '
        "or rename labels so that they begin differently"
    )


def _collisions(first: Mapping[str, int]) -> list[tuple[str, ...]]:
    by_token: defaultdict[int, list[str]] = defaultdict(list)
    for label, token in first.items():
        by_token[token].append(label)
    return [tuple(labels) for labels in by_token.values() if len(labels) > 1]


# Words of messages


def _shown(text: str) -> str:
    """A text quoted and escaped, fit for one line of a terminal."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _listed(labels: Sequence[str]) -> str:
    shown = [_shown(label) for label in labels[:6]]
    if len(labels) > 6:
        return f"{', '.join(shown)} and {len(labels) - 6} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
