"""Records answers in a log, and abstained questions in a review queue.

Used together with a classifier, which itself writes no files. The key `review` in task.toml is only
a suggestion: nothing is recorded unless the caller asks for it here.
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
    """What a recorder needs to know about the classifier whose answers it stores."""

    task: Task
    identity: str
    rule: str


class Recorder:
    """Records answers. Close it, or use it in a `with` statement.

    Args:
        log: receives every answer.
        queue: receives the questions on which the model abstained.
        resources: closed together with the recorder.
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
        """Open the files, or create them.

        Args:
            model: the classifier.
            log: file to append each answer to, for `qcat drift`.
            log_text: also log the questions.
            review: file of the review queue; True selects the one in the user's data folder that
                `qcat review answer -m MODEL` opens.
            review_hash: store hashes instead of texts, even if the task suggests texts.

        Raises:
            ReviewError: the review queue cannot be used, or belongs to another task.
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
        """Record an answer in the log and, if the model abstained, in the queue.

        Raises:
            RecordError: writing to the log, the queue or both failed; both were tried.
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
        """Close the files. May be called more than once."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
