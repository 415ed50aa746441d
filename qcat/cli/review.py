"""`qcat review`: people answer what the model abstained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from qcat.cli.review_terminal import answer_in_terminal
from qcat.data.opened import FORMATS
from qcat.monitor.review import ReviewQueue, default_path
from qcat.workflows import review

_FILE = click.Path(path_type=Path)


_queue = click.argument(
    "queue", metavar="[QUEUE]", type=_FILE, required=False, envvar="QCAT_REVIEW"
)
_model = click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    help="Without QUEUE: the model whose queue in your data folder is meant; by default the one "
    "that comes with qcat.  [env: QCAT_MODEL]",
)


def _output(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "-o", "--output", required=True, metavar="FILE", type=_FILE, help=f"{what} to write."
    )


@click.group()
def command() -> None:
    """Decide the questions that `qcat ask --review QUEUE` could not answer.

    QUEUE may also be named by QCAT_REVIEW.

    A queue made with --review-hash, or of a task with review = "hash", holds no texts: there is
    nothing to read here. Bring its questions back with `qcat review import` and a CSV that has
    their text (its hash is looked up, and the queue has the text from then on), or the hash alone,
    as `qcat review csv` writes it.

    \b
    Examples:
      qcat review answer house.db
      qcat review html house.db -o review.html
      qcat review csv house.db -o house.csv
      qcat review import house.review.json house.db
      qcat review export house.db -o more.jsonl --off-topic strangers.jsonl
    """


@command.command()
@_queue
@_model
def answer(queue: Path | None, model: str | None) -> None:
    """Answer in the terminal, one key a label.

    Each answer is on the disk at once: quit any time, with q or Ctrl-C.

    \b
    Example:
      qcat review answer house.db
    """
    with _opened(queue, model) as opened:
        answer_in_terminal(opened)
        _tell_unreadable(opened)


@command.command()
@_queue
@_model
@_output("Self-contained web page")
def html(queue: Path | None, model: str | None, output: Path) -> None:
    """Write a web page to answer in; it saves a file for `qcat review import`.

    \b
    Example:
      qcat review html house.db -o review.html
    """
    with _opened(queue, model) as opened:
        count = review.write_page(opened, output)
        click.echo(f"{output}: {count} questions: open it in a browser")
        _tell_unreadable(opened)


@command.command()
@_queue
@_model
@_output("CSV")
def csv(queue: Path | None, model: str | None, output: Path) -> None:
    """Write the questions for a spreadsheet: fill in the column label, and import it.

    `none of these` stands for a question that no label fits.

    \b
    Example:
      qcat review csv house.db -o house.csv
    """
    if output.suffix.lower() != ".csv":
        raise click.UsageError(f"{output}: CSV is written: name a file that ends in .csv")
    with _opened(queue, model) as opened:
        count = review.write_csv(opened, output)
        click.echo(
            f"{output}: {count} questions: fill in the column label, and `qcat review import` it"
        )
        _tell_unreadable(opened)


@command.command("import")
@click.argument("answers", metavar="ANSWERS", type=_FILE)
@_queue
@_model
def take(answers: Path, queue: Path | None, model: str | None) -> None:
    """Take answers back: what the page saved, or a CSV with label and hash or text.

    All of them are taken, or none.

    \b
    Example:
      qcat review import house.review.json house.db
    """
    with _opened(queue, model) as opened:
        count = review.import_answers(opened, answers)
        click.echo(f"{answers}: {count} answers taken; {opened.counts().pending} questions wait")
        _tell_unreadable(opened)


@command.command()
@_queue
@_model
@_output("JSONL of the answered questions, which `qcat train` takes,")
@click.option(
    "--off-topic",
    metavar="FILE",
    type=_FILE,
    help="Write those that no label fits as JSONL that `qcat eval --off-topic` takes.",
)
def export(queue: Path | None, model: str | None, output: Path, off_topic: Path | None) -> None:
    """Write the answered questions with their labels.

    \b
    Example:
      qcat review export house.db -o more.jsonl --off-topic strangers.jsonl
    """
    for path in (output, off_topic):
        if path and FORMATS.get(path.suffix.lower(), ".jsonl") != ".jsonl":
            raise click.UsageError(f"{path}: JSONL is written: name a file that ends in .jsonl")
    with _opened(queue, model) as opened:
        done = review.export_answers(opened, output, off_topic=off_topic)
    click.echo(f"{output}: {done.labelled} questions with their labels")
    if done.hashes:
        click.echo(
            f"qcat: warning: {done.hashes} answered questions are kept as hashes only and left "
            "out: import a CSV with their text",
            err=True,
        )
    if off_topic:
        click.echo(f"{off_topic}: {done.off_topic} questions that no label fits")


def _opened(queue: Path | None, model: str | None) -> ReviewQueue:
    return ReviewQueue.existing(queue or _own_queue(model))


def _own_queue(model: str | None) -> Path:
    from qcat.classifier import DEFAULT_MODEL
    from qcat.opening import read_model

    return default_path(read_model(model or DEFAULT_MODEL).task.name)


def _tell_unreadable(queue: ReviewQueue) -> None:
    if unreadable := queue.counts().unreadable:
        click.echo(
            f"qcat: warning: {queue.path}: {unreadable} questions are kept as hashes only and "
            "cannot be read: import a CSV with text or hash, and label",
            err=True,
        )
