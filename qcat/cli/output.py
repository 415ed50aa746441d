"""What commands share in talking to a person: options, progress bars, tables, lines of JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from qcat.threads import MAX_THREADS

if TYPE_CHECKING:
    from tqdm import tqdm

ROWS = 10
"""Of a list, so many are shown."""
_CHARS = 70  # of a question
_MILESTONE = "epoch"  # how steps end of which each count is worth a line in a log


class Bars:
    """How far a step is, on stderr: a progress bar on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._step = ""
        self._log = None if sys.stderr is None or sys.stderr.isatty() else _Log()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar that is shown, so that lines can be printed; the next step begins another."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._step = ""

    def show(self, step: str, done: int, total: int, note: str = "") -> None:
        """Draw `done` of `total`; another step than before begins another bar.

        What is done when a step is first drawn does not count for the rate: it may be from before.
        """
        if self._log is not None:
            self._log.show(step, done, total, note)
            return
        if self._bar is None or self._step != step:
            from tqdm import tqdm

            self.__exit__()
            self._step = step
            self._bar = tqdm(desc=step, total=total, initial=done, file=sys.stderr, disable=None)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


class _Log:
    """Progress where there is no terminal: a line every half a minute, and for every epoch.

    Steps that are quicker leave nothing in the log.
    """

    SECONDS = 30.0

    def __init__(self) -> None:
        self._step = ""
        self._begun = self._said = time.monotonic()
        self._first = 0

    def show(self, step: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if step != self._step:
            self._step, self._begun, self._first = step, now, done
        if now - self._said < self.SECONDS and not step.endswith(_MILESTONE):
            return
        self._said = now
        line = f"{step} {done} of {total}"
        if self._first < done < total:
            left = (now - self._begun) / (done - self._first) * (total - done)
            line += f", {_duration(left)} left"
        click.echo(f"{line}: {note}" if note else line, err=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return (
        f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {minutes} min"
    )


class FloatRange(click.FloatRange):
    """As click's, which lets NaN through: NaN is on neither side of a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    help="Threads; by default $QCAT_THREADS, or the physical cores that this process may use (on "
    "Linux; elsewhere the logical processors).",
)

timeout_option = click.option(
    "--timeout",
    type=click.IntRange(1, 86_400),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long Ollama may keep silent on a request; the first one loads the model.",
)


def given(name: str) -> bool:
    """Whether an option of the running command stands on its command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def json_line(data: object) -> str:
    """Data as a line of JSON that can be printed: a lone surrogate becomes a question mark."""
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "replace").decode()


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def more(rows: Sequence[object], what: str = "") -> Iterator[str]:
    """The line that says how many rows are not shown, if there are such."""
    if len(rows) > ROWS:
        yield f"and {len(rows) - ROWS} more {what}".rstrip()


def shown(text: str) -> str:
    """A question fit for a line of a terminal."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= _CHARS else f"{text[: _CHARS - 1]}…"
