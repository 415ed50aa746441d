"""Answering a review queue in a terminal: keys in, answers written, the screen drawn."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from qcat.cli.review_walk import Answer, Quit, Walk, Withdraw, keys, screen
from qcat.errors import ReviewError
from qcat.monitor.review import ReviewQueue

_OTHER_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # and hide the cursor
_CLEAR = "\x1b[H\x1b[2J"


def answer_in_terminal(queue: ReviewQueue) -> None:
    """Let a person answer the questions of a queue, one key a label.

    Each answer is written at once, so the person may quit at any time.

    Raises:
        ReviewError: stdin or stdout is no terminal.
    """
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
