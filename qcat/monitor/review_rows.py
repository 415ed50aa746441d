"""Answered questions of a review queue as rows to train on. Needs scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

from qcat.data.dataset import jsonl_line
from qcat.data.near import near_groups
from qcat.monitor.review import Decided, question_hash


def training_rows(decided: Sequence[Decided], texts: Sequence[str]) -> bytes:
    """JSONL with `text`, `label` and `group`: all entries with a text and a label, in order.

    Near duplicates share a group, so that no split puts one of them into training and the other
    into the test. The group is named after the first question of its family that was added to the
    queue, answered or not. Answers do not change the name. Most later questions do not either, but
    a question that is near two families merges them under the name of the older one.

    Args:
        decided: the answered questions.
        texts: all texts of the queue, answered or not, in the order in which they were added.
    """
    named = dict(zip(texts, group_names(texts), strict=True))
    return b"".join(
        jsonl_line(one.text, one.label, named[one.text])
        for one in decided
        if one.text is not None and one.label is not None
    )


def group_names(texts: Sequence[str]) -> list[str]:
    """The group name of each text: near duplicates, and chains of them, share one name."""
    return [f"review-{question_hash(texts[first])[:16]}" for first in near_groups(texts)]
