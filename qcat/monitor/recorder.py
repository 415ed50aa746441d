"""Answers kept as they are given: in a log, and abstentions in a review queue.

Used beside a classifier, which itself writes nothing. What a task says of a review queue
(`review` in task.toml) is a suggestion: nothing is kept unless the caller asks for it here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Protocol, Self

from qcat.errors import DataError, QcatError, RecordError, ReviewError
from qcat.monitor.log import PredictionLog
from qcat.monitor.review import ReviewQueue, open_for
from qcat.prediction import Prediction
from qcat.task import Task


class Model(Protocol):
    """What has to be known of the classifier whose answers are kept."""

    task: Task
    identity: str
    rule: str


class Recorder:
    """Keeps answers. Close it, or use it in a `with` statement.

    Args:
        log: takes every answer.
        queue: takes the questions on which the model abstained.
        resources: closed with it.
    """

    def __init__(
        self, log: PredictionLog | None, queue: ReviewQueue | None, resources: ExitStack
    ) -> None:
        self._log, self._queue, self._resources = log, queue, resources

    @classmethod
    def open(
        cls,
        model: Model,
        *,
        log: str | os.PathLike[str] | None = None,
        log_text: bool = False,
        review: str | os.PathLike[str] | bool | None = None,
        review_hash: bool = False,
    ) -> Self:
        """Open the files, or make them.

        Args:
            model: the classifier.
            log: file to append each answer to, for `qcat drift`.
            log_text: log the questions too.
            review: file of the review queue; True is the one in the user's data folder that
                `qcat review answer -m MODEL` opens.
            review_hash: keep hashes in the queue and no texts, even if the task suggests texts.

        Raises:
            ReviewError: the review queue cannot be used, or is another task's.
            DataError: the log cannot be opened.
        """
        with ExitStack() as stack:
            kept = queue = None
            if review is not None and review is not False:
                path = None if review is True else review
                queue = stack.enter_context(open_for(model.task, path, review_hash))
            if log is not None:
                kept = stack.enter_context(
                    PredictionLog(log, model=model.identity, rule=model.rule, text=log_text)
                )
            return cls(kept, queue, stack.pop_all())

    def add(self, question: str, prediction: Prediction) -> None:
        """Keep an answer, in the log and, where the model abstained, in the queue.

        Raises:
            RecordError: one of them, or both, did not take it; each was tried.
        """
        errors: list[QcatError] = []
        if self._log:
            try:
                self._log.add(question, prediction)
            except DataError as error:
                errors.append(error)
        if self._queue and prediction.abstained:
            try:
                self._queue.add(question, prediction)
            except ReviewError as error:
                errors.append(error)
        if errors:
            raise RecordError(errors)

    def close(self) -> None:
        """Close the files. Harmless a second time."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
