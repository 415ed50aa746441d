"""Lint of a task by itself: label names that are alike, and labels in the tokens of a model."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from qcat.data.characters import oddities
from qcat.data.findings import Finding, listed, shown
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import Encoder, with_codes
from qcat.errors import TaskError
from qcat.task import Task

_NO_BREAK = re.compile("[\u00a0\u2007\u202f]")
# What programs write for no value; "none" is what people may call a label
_MISSING = ("NA", "<NA>", "N/A", "NaN", "nan", "None", "NULL", "null", "\\N")
_OVERLAP = 0.6  # words of two names that both have, over the words that either has
_LIKE = 0.88  # difflib's ratio of two names, about one letter in eight


def name_findings(task: Task) -> Iterator[Finding]:
    """Labels whose names could mean the same, begin one another, have odd characters, or may stand
    for none."""
    for label in task.labels:
        for code, what, advice in oddities(label):
            message = f"label {shown(label)} has {what}: {advice}"
            yield Finding("warning", code, message, labels=(label,))
        if label in _MISSING:
            message = f"label {shown(label)} may stand for none: leave out its rows, or rename it"
            yield Finding("warning", "label-missing", message, labels=(label,))
        if space := _NO_BREAK.search(label):
            message = f"label {shown(label)} has the no-break space U+{ord(space[0]):04X}"
            message += ": write a plain one"
            yield Finding("warning", "invisible-character", message, labels=(label,))
    split = {label: _words(label) for label in task.labels}
    for one, two in combinations(task.labels, 2):
        reason = _similar(split[one], split[two])
        short, long = sorted((one, two), key=len)
        if reason:
            told = task.labels[one] and task.labels[two]
            message = f"{listed((one, two))} {reason}: rename one, make them one label, or "
            message += "see that their descriptions differ" if told else "describe both"
            yield Finding("info" if told else "warning", "label-similar", message, (), (one, two))
        elif long.casefold().startswith(short.casefold()):
            yield Finding(
                "info",
                "label-prefix",
                f"{shown(short)} begins {shown(long)}: qcat tells them apart; a runtime without "
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


def token_findings(encoded: EncodedTask) -> tuple[int, list[Finding]]:
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
            f"{listed(labels)} begin with the same token: told apart in a second pass",
            labels=labels,
        )
        for labels in spaced
    ]
    new = [labels for labels in bare if not any(set(labels) <= set(known) for known in spaced)]
    findings += [
        Finding(
            "info",
            "token-collision-bare",
            f"{listed(labels)} begin with the same token where no space stands before them: "
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
