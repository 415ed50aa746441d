"""What commands share in talking to a person: progress bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from tqdm import tqdm


class Bars:
    """One progress bar a step on stderr; none where that is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._step = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, step: str, done: int, total: int, note: str = "") -> None:
        """Draw `done` of `total`; another step than before begins another bar."""
        if self._bar is None or self._step != step:
            self.__exit__()
            self._step = step
            self._bar = tqdm(desc=step, total=total, file=sys.stderr, disable=None)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one request to Ollama may take; the first one loads the model.",
)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
