"""All errors of qcat. Each message is one line: what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class QcatError(Exception):
    """Any error that a user of qcat can fix; the command line prints it in one line."""

    exit_status = 1
    """Exit status of a command that fails with this error."""


class ArgumentError(QcatError, ValueError):
    """Invalid arguments or options, or ones that contradict each other."""

    exit_status = 2


class TaskError(QcatError):
    """A task that cannot be used: a bad label, a missing key, an unreadable `task.toml`."""


class BundleError(QcatError):
    """A GGUF file that is damaged or contains no qcat task."""


class ModelError(QcatError):
    """A model that cannot be loaded, or that cannot spell the task's labels."""


class QuestionError(QcatError):
    """One question that cannot be asked: empty, or too long under `strict`."""


class DataError(QcatError):
    """A file of labelled questions that cannot be read."""


class ExportError(QcatError):
    """An export that is not possible, or whose verification failed."""


class NotPromotedError(ExportError):
    """A new model that is worse than the one it was to replace."""

    exit_status = 5


class TrainError(QcatError):
    """A training that cannot be started or resumed."""


class ServerError(QcatError):
    """An Ollama server that does not answer, rejects a request, or lacks the model."""


class ReviewError(QcatError):
    """A review queue that cannot be read or written, or an answer that does not fit it."""


class RecordError(QcatError):
    """An answer that could not be stored in the log, the review queue or both."""

    def __init__(self, errors: Sequence[QcatError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)
        """The causes, one for each place where it could not be stored."""
