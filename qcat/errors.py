"""The one error family. Each message is one line: what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class QcatError(Exception):
    """Anything that a user of qcat can mend; the command line prints it in one line."""

    exit_status = 1
    """Of the command that it ends."""


class ArgumentError(QcatError, ValueError):
    """Arguments or options that make no sense, or do not go together."""

    exit_status = 2


class TaskError(QcatError):
    """A task that cannot be used: a bad label, a missing key, an unreadable `task.toml`."""


class BundleError(QcatError):
    """A GGUF file that is damaged, or that says nothing of a qcat task."""


class ModelError(QcatError):
    """A model that cannot be loaded, or that cannot spell the task's labels."""


class QuestionError(QcatError):
    """One question that cannot be asked: empty, or too long under `strict`."""


class DataError(QcatError):
    """A file of labelled questions that cannot be read."""


class ExportError(QcatError):
    """An export that cannot be made, or whose proof failed."""


class NotPromotedError(ExportError):
    """A new model that is worse than the one it was to replace."""

    exit_status = 5


class TrainError(QcatError):
    """A training that cannot be begun, or gone on with."""


class ServerError(QcatError):
    """An Ollama server that does not answer, refuses, or has no such model."""


class ReviewError(QcatError):
    """A review queue that cannot be read or written, or an answer that does not fit it."""


class RecordError(QcatError):
    """An answer that was given, but not kept in the log, the review queue or both."""

    def __init__(self, errors: Sequence[QcatError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)
        """Why, one for each place that did not take it."""
