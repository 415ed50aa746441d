"""Review: gives the questions of a queue to people, and imports their answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qcat.files import write_whole
from qcat.monitor.review import ReviewQueue


def write_page(queue: ReviewQueue, path: Path) -> int:
    """Write a self-contained web page for answering; return its number of questions.

    Raises:
        QcatError: the page cannot be written.
    """
    from qcat.monitor.review_page import review_page

    entries = queue.pending()
    write_whole(path, review_page(queue.task, queue.labels, entries).encode())
    return len(entries)


def write_csv(queue: ReviewQueue, path: Path) -> int:
    """Write a CSV with a column to fill in; return its number of questions.

    Raises:
        QcatError: the file cannot be written.
    """
    from qcat.monitor.review_csv import questions_csv

    entries = queue.pending(unreadable=True)
    write_whole(path, questions_csv(entries))
    return len(entries)


def import_answers(queue: ReviewQueue, path: Path) -> int:
    """Import all answers from a saved page or a filled-in CSV, or none; return how many.

    Raises:
        DataError, ReviewError: the file cannot be read, or an answer does not fit the queue.
    """
    from qcat.monitor.review_import import read_answers

    answers = read_answers(path, queue)
    queue.answer_all(answers)
    return len(answers)


@dataclass(frozen=True)
class Exported:
    """How many answered questions were written."""

    labelled: int
    off_topic: int
    """Those that no label fits."""
    hashes: int
    """Those left out, since only their hashes are kept."""


def export_answers(queue: ReviewQueue, path: Path, *, off_topic: Path | None = None) -> Exported:
    """Write the answered questions with their labels as JSONL for `train`.

    Args:
        queue: the review queue.
        path: path of the JSONL.
        off_topic: path of a JSONL to write with the questions that no label fits.

    Raises:
        QcatError: a file cannot be written.
    """
    from qcat.monitor.review_rows import training_rows

    decided = queue.decided()
    rows = training_rows(decided, queue.texts())
    strangers = [one.text for one in decided if one.label is None and one.text is not None]
    write_whole(path, rows)
    if off_topic:
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in strangers]
        write_whole(off_topic, "".join(lines).encode())
    return Exported(
        len(rows.splitlines()), len(strangers), sum(one.text is None for one in decided)
    )
