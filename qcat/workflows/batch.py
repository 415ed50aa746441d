"""Adds answers to a table of questions; resumes where it was interrupted.

While the questions are asked, the answers are kept in a journal beside the output (`OUT.part`).
When all answers are there, the table is read again, written with them under another name, and
renamed.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qcat.classifier import WINDOW, Classifier
from qcat.data.columns import check_names, find_column, listed
from qcat.data.tables import (
    Kind,
    Table,
    Values,
    format_read,
    format_written,
    open_table,
    write_table,
)
from qcat.errors import DataError, QuestionError, ServerError
from qcat.files import PLAIN
from qcat.progress import Progress, silent
from qcat.version import __version__
from qcat.workflows.journal import Answer, Journal

COLUMNS: dict[str, Kind] = {
    "label": "text",
    "confidence": "real",
    "abstained": "bool",
    "reason": "text",
    "truncated": "bool",
    "error": "text",
}
"""The added columns: the fields of an `Answer`. If a row cannot be asked, `error` says why,
`abstained` is true, `truncated` is false, and the others are missing."""


@dataclass
class Summary:
    """What became of the rows."""

    rows: int
    before: int
    """How many of these were asked before an interruption."""
    answered: int = 0
    abstained: int = 0
    """Rows on which the model abstained."""
    failed: int = 0
    """Rows that could not be asked."""
    truncated: int = 0
    """Rows whose question was cut."""

    def count(self, answer: Answer) -> None:
        """Add a row."""
        self.failed += answer.error is not None
        self.abstained += answer.abstained and answer.error is None
        self.answered += not answer.abstained
        self.truncated += answer.truncated


def check_paths(source: Path, target: Path) -> None:
    """Check the input and output paths of a batch before any work starts.

    Raises:
        DataError: a path cannot be used; the message says which one and why.
    """
    format_read(source)
    format_written(target)
    try:
        with _explained(source, "read"):
            here = source.stat()
        same = False
        with _explained(target, "written"), suppress(FileNotFoundError):
            same = os.path.samestat(target.stat(), here)
        begun = os.path.exists(_part(_real(target)))
    except ValueError:  # a NUL or a lone surrogate
        raise DataError(f"{str(source)!r} or {str(target)!r}: no file can have this name") from None
    if not stat.S_ISREG(here.st_mode):
        raise DataError(f"{source}: is no file: name one, since it is read more than once")
    if same:
        raise DataError(f"{target}: is the input: name another output")
    if not begun:  # otherwise only the last step may be missing: the journal shows whether it is
        _check_absent(target)


def batch(
    classifier: Classifier,
    source: Path,
    target: Path,
    *,
    column: str = "text",
    prefix: str = "",
    progress: Progress = silent,
) -> Summary:
    """Ask a model each question of a table, and write the table with the answers.

    After a kill or an error, calling it again with the same model, input and options resumes the
    work. However many rows there are, only a few thousand are in memory at a time.

    Args:
        classifier: the model. No `Recorder` is used: after a kill a row would be counted twice.
        source: CSV, JSONL or Parquet, by suffix.
        target: likewise. It must not exist, and appears only when it is complete. Files left by a
            kill just after that are cleaned up.
        column: of the questions.
        prefix: put before the names of `COLUMNS`, for a table that already has such columns.
        progress: called as the work goes on.

    Raises:
        DataError: the input or one of its rows cannot be read, or the input changed meanwhile; the
            output exists or cannot be written; the unfinished work found belongs to another model,
            input or option; another process is working on it.
        ServerError: the server does not answer; names the row.
        ModuleNotFoundError: pyarrow is not installed and one of the files is Parquet.
    """
    check_paths(source, target)
    kind = format_written(target)
    target = _real(target)
    with Journal.open(_part(target)) as journal:
        half = target.with_name(f".{target.name}.new")  # no longer than the journal's name
        _remove(half)
        fingerprint = _digest(source)
        table = open_table(source, kind)
        names = {f"{prefix}{name}": values for name, values in COLUMNS.items()}
        column = _columns(table, column, tuple(names))
        about = _about(classifier, fingerprint, source.suffix.lower(), column)
        summary = Summary(table.count, journal.begin(about))
        if summary.before > table.count:  # the input had more rows while it was processed
            raise DataError(
                f"{journal.path}: has more answers than {source} has rows: delete it and give the "
                "same command again"
            )
        if summary.before < table.count:
            _check_absent(target)
        with _unchanged(source, fingerprint, journal):
            _ask(classifier, table, column, journal, summary.before, progress)
        try:
            with _unchanged(source, fingerprint, journal), _explained(target, "written"):
                _write(table, half, kind, names, journal, summary, progress)
            _publish(half, target)
        finally:
            _remove(half)
        journal.remove()
    return summary


def _about(classifier: Classifier, fingerprint: str, kind: str, column: str) -> dict[str, str]:
    """Everything that the answers depend on."""
    settings = [classifier.calibration.to_dict(), classifier.coverage, classifier.strict]
    said = json.dumps(settings, sort_keys=True).encode()
    return {
        "version of qcat": __version__,
        "input": f"{kind} {fingerprint}",
        "column": column,
        "model": classifier.identity,
        "threshold": hashlib.sha256(said).hexdigest(),
    }


def _real(target: Path) -> Path:
    """The file to write, with links resolved, so that a link still points to it."""
    return Path(os.path.realpath(target))


def _part(target: Path) -> Path:
    """The journal's path."""
    return target.with_name(f"{target.name}.part")


@contextmanager
def _unchanged(source: Path, fingerprint: str, journal: Journal) -> Iterator[None]:
    """Report a change of the input itself instead of an error that follows from it."""

    def check() -> None:
        if _digest(source) != fingerprint:
            raise DataError(
                f"{source}: was changed while it was worked on: delete {journal.path} and give "
                "the same command again"
            )

    try:
        yield
    except Exception:
        check()
        raise
    check()


def _check_absent(path: Path) -> None:
    if os.path.lexists(path) and (path.exists() or not path.is_symlink()):
        raise DataError(f"{path}: exists already: move it away, or name another output")


def _columns(table: Table, column: str, names: tuple[str, ...]) -> str:
    """The name of the question column in the table.

    Raises:
        DataError: there is none, or columns with the names of the answer columns exist.
    """
    try:
        found = find_column(table.columns, column)
    except DataError as error:
        raise DataError(f"{table.path}: {error}") from None
    if found is None:
        raise DataError(
            f"{table.path}: no column {column!r}: name that of the questions with --column; there "
            f"are {listed(table.columns)}"
        )
    taken = [name for name in names if name in table.columns]
    if taken:
        raise DataError(
            f"{table.path}: has a column {taken[0]!r} already: give those of the answers other "
            "names with --prefix, as in --prefix qcat_"
        )
    check_names(str(table.path), names)
    return found


def _ask(
    classifier: Classifier,
    table: Table,
    column: str,
    journal: Journal,
    done: int,
    progress: Progress,
) -> None:
    """Ask the remaining questions and add their answers to the journal."""
    progress("questions", done, table.count)
    # The other questions of a batch affect rounding: batches are the same after a restart.
    again = done % WINDOW if done < table.count else 0
    asked = islice(table.values(column), done - again, None)
    try:
        for answer in islice(classifier.ask_each(asked), again, None):
            if isinstance(answer, QuestionError):
                journal.add(Answer(None, None, True, None, False, str(answer)))
            else:
                journal.add(
                    Answer(
                        answer.label,
                        answer.confidence,
                        answer.abstained,
                        answer.reason,
                        answer.truncated,
                        None,
                    )
                )
            done += 1
            progress("questions", done, table.count)
    except ServerError as error:
        raise ServerError(
            f"{table.path}: row {done + 1}: {error}: then rerun the command to resume"
        ) from None
    journal.sync()


def _write(
    table: Table,
    path: Path,
    kind: str,
    names: dict[str, Kind],
    journal: Journal,
    summary: Summary,
    progress: Progress,
) -> None:
    """Write the table with the answers to the disk. Raises OSError if that fails."""

    def values() -> Iterator[Values]:
        for number, answer in enumerate(journal.answers(), 1):
            summary.count(answer)
            progress("writing", number, table.count)
            yield tuple(answer)

    with path.open("wb") as file:
        write_table(table, file, kind, names, values())
        file.flush()
        os.fsync(file.fileno())


def _publish(half: Path, target: Path) -> None:
    """Rename the written file to its final name, and sync the folder before returning."""
    with _explained(target, "read"):
        # It is already there if a kill came between the rename and the journal's removal.
        if target.exists() and filecmp.cmp(half, target, shallow=False):
            return
    _check_absent(target)
    with _explained(target, "written"):
        half.replace(target)
    with suppress(OSError):  # the file exists, whether or not its folder can be synced
        folder = os.open(target.parent, os.O_RDONLY | PLAIN)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    with _explained(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(path: Path, done: str) -> Iterator[None]:
    """The system's error for a file, as a message of ours."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "make room and rerun the command"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "mend that, or name another"
        raise DataError(f"{path}: cannot be {done}: {reason}: {advice}") from None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
