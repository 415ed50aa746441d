"""`qcat review`: a person decides what the model left open."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from qcat.cli.review_walk import Answer, Quit, Walk, Withdraw, keys, screen
from qcat.errors import ReviewError
from qcat.files import write_whole
from qcat.monitor.review import ReviewQueue, default_path

_FILE = click.Path(path_type=Path)
_OTHER_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # and hide the cursor
_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@click.argument("queue", metavar="[FILE]", type=_FILE, required=False, envvar="QCAT_REVIEW")
@click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    type=_FILE,
    help="Without FILE: the GGUF whose own queue is meant; by default the model that comes with "
    "qcat.  [env: QCAT_MODEL]",
)
@click.option("--html", metavar="FILE", type=_FILE, help="Write a web page to review in instead.")
@click.option(
    "--csv",
    "sheet",
    metavar="FILE",
    type=_FILE,
    help="Write the questions that wait for a spreadsheet instead: fill in the column label, with "
    "`none of these` where none fits, and --import it.",
)
@click.option(
    "--import",
    "answers",
    metavar="FILE",
    type=_FILE,
    help="Take answers back: what the page saved, or a CSV with label and hash or text. All of "
    "them or none.",
)
@click.option(
    "--export",
    metavar="FILE",
    type=_FILE,
    help="Write the answered questions as JSONL that `qcat train` takes.",
)
@click.option(
    "--off-topic",
    metavar="FILE",
    type=_FILE,
    help="Write those that no label fits as JSONL that `qcat eval --off-topic` takes.",
)
def command(
    queue: Path | None,
    model: Path | None,
    html: Path | None,
    sheet: Path | None,
    answers: Path | None,
    export: Path | None,
    off_topic: Path | None,
) -> None:
    """Answer the questions that `qcat ask --review FILE` left to a person, one key each.

    Each answer is on the disk at once: quit any time, with q or Ctrl-C. FILE may also be named by
    QCAT_REVIEW.

    A queue made with --review-hash, or by a task with review = "hash", holds no texts: there is
    nothing to read here. Bring its questions back with --import and a CSV that has their text (its
    hash is looked up, and the queue has the text from then on), or the hash alone, as --csv
    writes it.

    \b
    Examples:
      qcat review house.db
      qcat review house.db --html review.html
      qcat review house.db --import household.review.json
      qcat review house.db --csv house.csv
      qcat review house.db --export more.jsonl --off-topic strangers.jsonl
    """
    for path in (export, off_topic):
        if path and path.suffix.lower() in (".csv", ".parquet"):
            raise click.UsageError(f"{path}: JSONL is written: name a file that ends in .jsonl")
    if sheet and sheet.suffix.lower() != ".csv":
        raise click.UsageError(f"{sheet}: CSV is written: name a file that ends in .csv")
    with ReviewQueue.existing(queue or _own_queue(model)) as opened:
        if answers:
            _import(opened, answers)
        if export:
            _export(opened, export)
        if off_topic:
            _off_topic(opened, off_topic)
        if html:
            _page(opened, html)
        if sheet:
            _sheet(opened, sheet)
        if not (answers or export or off_topic or html or sheet):
            _walk(opened)


def _own_queue(model: Path | None) -> Path:
    from qcat.classifier import DEFAULT_MODEL, OLLAMA
    from qcat.gguf.bundle import Bundle

    if model and str(model).startswith(OLLAMA):
        raise click.UsageError(f"{model} is on a server: name the queue's FILE")
    return default_path(Bundle.read(model or DEFAULT_MODEL).task.name)


def _import(queue: ReviewQueue, path: Path) -> None:
    from qcat.monitor.review_import import read_answers

    answers = read_answers(path, queue)
    queue.answer_all(answers)
    counts = queue.counts()
    click.echo(f"{path}: {len(answers)} answers taken; {counts.pending} questions wait")
    _tell_unreadable(queue)


def _export(queue: ReviewQueue, path: Path) -> None:
    from qcat.monitor.review_rows import training_rows

    decided = queue.decided()
    rows = training_rows(decided, queue.texts())
    write_whole(path, rows)
    click.echo(f"{path}: {len(rows.splitlines())} questions with their labels")
    if lacking := sum(one.text is None for one in decided):
        click.echo(
            f"qcat: warning: {lacking} answered questions are kept as hashes only and left out: "
            "--import a CSV with their text",
            err=True,
        )


def _off_topic(queue: ReviewQueue, path: Path) -> None:
    import json

    texts = [one.text for one in queue.decided() if one.label is None and one.text is not None]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    write_whole(path, "".join(lines).encode())
    click.echo(f"{path}: {len(texts)} questions that no label fits")


def _page(queue: ReviewQueue, path: Path) -> None:
    from qcat.monitor.review_page import review_page

    entries = queue.pending()
    write_whole(path, review_page(queue.task, queue.labels, entries).encode())
    click.echo(f"{path}: {len(entries)} questions: open it in a browser")
    _tell_unreadable(queue)


def _sheet(queue: ReviewQueue, path: Path) -> None:
    from qcat.monitor.review_csv import questions_csv

    entries = queue.pending(unreadable=True)
    write_whole(path, questions_csv(entries))
    click.echo(f"{path}: {len(entries)} questions: fill in the column label, and --import it")
    _tell_unreadable(queue)


def _tell_unreadable(queue: ReviewQueue) -> None:
    if unreadable := queue.counts().unreadable:
        click.echo(
            f"qcat: warning: {queue.path}: {unreadable} questions are kept as hashes only and "
            "cannot be read: --import a CSV with text or hash, and label",
            err=True,
        )


def _walk(queue: ReviewQueue) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ReviewError(
            "this is no terminal: write a page with --html, or a sheet with --csv, and bring the "
            "answers with --import"
        )
    walk = Walk(queue.task, queue.labels, queue.pending())
    if walk.entries:
        # Ctrl-C quits at any moment: outside `getchar` the terminal sends it as a signal.
        with suppress(KeyboardInterrupt, EOFError), _drawn(walk):
            _answer(queue, walk)
        click.echo(f"{walk.answered} answered now.")
    counts = queue.counts()
    click.echo(
        f"{queue.path}: {counts.answered} of {counts.total} questions are answered, "
        f"{counts.pending} wait."
    )
    _tell_unreadable(queue)


def _answer(queue: ReviewQueue, walk: Walk) -> None:
    """Read keys and write answers until the person quits; Ctrl-C and Ctrl-D are errors here."""
    while True:
        for key in keys(click.getchar()):
            step = walk.press(key)
            if isinstance(step, Answer):
                queue.answer(step.hash, step.label)
            elif isinstance(step, Withdraw):
                queue.withdraw(step.hash)
            elif isinstance(step, Quit):
                return
        _draw(walk)


@contextmanager
def _drawn(walk: Walk) -> Iterator[None]:
    """The walk on the terminal's other screen, drawn anew when its size changes."""
    before = signal.signal(signal.SIGWINCH, lambda *_: _draw(walk))
    try:
        click.echo(_OTHER_SCREEN, nl=False)
        _draw(walk)
        yield
    finally:
        click.echo(_BACK, nl=False)
        signal.signal(signal.SIGWINCH, before)


def _draw(walk: Walk) -> None:
    size = shutil.get_terminal_size()
    # While a key is awaited the terminal is raw, and a line feed alone does not go to the left.
    lines = "\r\n".join(screen(walk, size.columns, size.lines))
    # Past Python's buffer, which a signal must not enter a second time.
    os.write(sys.stdout.fileno(), f"{_CLEAR}{lines}".encode(sys.stdout.encoding, "replace"))
