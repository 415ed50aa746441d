"""`qcat review`: people answer what the model abstained on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
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


_queue = click.argument(
    "queue", metavar="[QUEUE]", type=_FILE, required=False, envvar="QCAT_REVIEW"
)
_model = click.option(
    "-m",
    "--model",
    envvar="QCAT_MODEL",
    metavar="MODEL",
    type=_FILE,
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
def answer(queue: Path | None, model: Path | None) -> None:
    """Answer in the terminal, one key a label.

    Each answer is on the disk at once: quit any time, with q or Ctrl-C.

    \b
    Example:
      qcat review answer house.db
    """
    with _opened(queue, model) as opened:
        _walk(opened)


@command.command()
@_queue
@_model
@_output("Self-contained web page")
def html(queue: Path | None, model: Path | None, output: Path) -> None:
    """Write a web page to answer in; it saves a file for `qcat review import`.

    \b
    Example:
      qcat review html house.db -o review.html
    """
    with _opened(queue, model) as opened:
        _page(opened, output)


@command.command()
@_queue
@_model
@_output("CSV")
def csv(queue: Path | None, model: Path | None, output: Path) -> None:
    """Write the questions for a spreadsheet: fill in the column label, and import it.

    `none of these` stands for a question that no label fits.

    \b
    Example:
      qcat review csv house.db -o house.csv
    """
    if output.suffix.lower() != ".csv":
        raise click.UsageError(f"{output}: CSV is written: name a file that ends in .csv")
    with _opened(queue, model) as opened:
        _sheet(opened, output)


@command.command("import")
@click.argument("answers", metavar="ANSWERS", type=_FILE)
@_queue
@_model
def take(answers: Path, queue: Path | None, model: Path | None) -> None:
    """Take answers back: what the page saved, or a CSV with label and hash or text.

    All of them are taken, or none.

    \b
    Example:
      qcat review import house.review.json house.db
    """
    with _opened(queue, model) as opened:
        _import(opened, answers)


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
def export(queue: Path | None, model: Path | None, output: Path, off_topic: Path | None) -> None:
    """Write the answered questions with their labels.

    \b
    Example:
      qcat review export house.db -o more.jsonl --off-topic strangers.jsonl
    """
    for path in (output, off_topic):
        if path and path.suffix.lower() in (".csv", ".parquet"):
            raise click.UsageError(f"{path}: JSONL is written: name a file that ends in .jsonl")
    with _opened(queue, model) as opened:
        _export(opened, output)
        if off_topic:
            _off_topic(opened, off_topic)


def _opened(queue: Path | None, model: Path | None) -> ReviewQueue:
    return ReviewQueue.existing(queue or _own_queue(model))


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
            "import a CSV with their text",
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
    click.echo(
        f"{path}: {len(entries)} questions: fill in the column label, and `qcat review import` it"
    )
    _tell_unreadable(queue)


def _tell_unreadable(queue: ReviewQueue) -> None:
    if unreadable := queue.counts().unreadable:
        click.echo(
            f"qcat: warning: {queue.path}: {unreadable} questions are kept as hashes only and "
            "cannot be read: import a CSV with text or hash, and label",
            err=True,
        )


def _walk(queue: ReviewQueue) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ReviewError(
            "this is no terminal: write a page with `qcat review html`, or a sheet with `qcat "
            "review csv`, and bring the answers with `qcat review import`"
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
    resized = getattr(signal, "SIGWINCH", None)  # Windows does not say so
    before = signal.signal(resized, lambda *_: _draw(walk)) if resized else None
    try:
        click.echo(_OTHER_SCREEN, nl=False)
        _draw(walk)
        yield
    finally:
        click.echo(_BACK, nl=False)
        if resized:
            signal.signal(resized, before)


def _draw(walk: Walk) -> None:
    size = shutil.get_terminal_size()
    # While a key is awaited the terminal is raw, and a line feed alone does not go to the left.
    lines = "\r\n".join(screen(walk, size.columns, size.lines))
    # Past Python's buffer, which a signal must not enter a second time.
    os.write(sys.stdout.fileno(), f"{_CLEAR}{lines}".encode(sys.stdout.encoding, "replace"))
