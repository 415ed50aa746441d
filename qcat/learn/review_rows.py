"""Answered questions of a review queue as rows to train on. Needs scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

from qcat.learn.dataset import jsonl_line
from qcat.learn.near import near_pairs
from qcat.trust.review import Decided, question_hash


def training_rows(decided: Sequence[Decided], texts: Sequence[str]) -> bytes:
    """JSONL with `text`, `label` and `group`: what has a text and a label, in order.

    Near duplicates share a group, so that no split puts one of them into training and the other
    into the test. The group is named after the first question of its family that the queue got,
    answered or not: later questions and answers leave the name as it is.

    Args:
        decided: the answered questions.
        texts: all texts of the queue, answered or not, in the order in which they came.
    """
    named = dict(zip(map(question_hash, texts), group_names(texts), strict=True))
    return b"".join(
        jsonl_line(one.text, one.label, named[one.hash])
        for one in decided
        if one.text is not None and one.label is not None
    )


def group_names(texts: Sequence[str]) -> list[str]:
    """The name of each text's group: near duplicates, and chains of them, have the same."""
    groups = list(range(len(texts)))  # each text's group: the least index in it
    folded = [text.casefold() for text in texts]  # which near_pairs would mind
    # It gives each text only its closest one of another group, so until there is none.
    while pairs := near_pairs(folded, [0] * len(texts), groups):
        for one, two, _ in pairs:
            kept, gone = sorted((groups[one], groups[two]))
            groups = [kept if group == gone else group for group in groups]
    return [f"review-{question_hash(texts[group])[:16]}" for group in groups]
