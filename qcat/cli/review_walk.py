"""The walk through a review queue in a terminal: what a key does, and what is on the screen.

Questions and labels are a stranger's text: what a terminal could obey is shown escaped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import click

from qcat.monitor.review import LABEL_KEYS, Entry

ENTER, ESCAPE, BACKSPACE, UP, DOWN, CLEAR = "enter", "esc", "back", "up", "down", "clear"
_NAMED = {
    "\r": ENTER, "\n": ENTER, "\x1b": ESCAPE, "\x7f": BACKSPACE, "\b": BACKSPACE, "\x15": CLEAR,
    "\x1b[A": UP, "\x1b[B": DOWN, "\x1bOA": UP, "\x1bOB": DOWN,
}  # fmt: skip
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|[\s\S]")
_JOINERS = "\u200c\u200d"  # they shape Persian and Hindi, and do nothing else
_HELP = "/ search   n none of these   s skip   u undo   q quit"
_SEARCH_HELP = "type to narrow   enter takes >   esc back"
_MIN_WIDTH, _MIN_HEIGHT = 20, 8


@dataclass(frozen=True)
class Answer:
    """To be written: the label of a question; None is none of them."""

    hash: str
    label: str | None


@dataclass(frozen=True)
class Withdraw:
    """To be written: the question has no answer any more."""

    hash: str


class Quit:
    """The person has had enough."""


Step = Answer | Withdraw | Quit


@dataclass
class Walk:
    """Where a person is in a queue. `press` moves it; the caller writes what `press` returns."""

    task: str
    labels: Sequence[str]
    entries: Sequence[Entry]
    at: int = 0
    """Index of the entry on the screen; their number when all have been gone through."""
    answered: int = 0
    query: str | None = None
    """What was typed after `/`; None where no search is on."""
    chosen: int = 0
    """Index of the label among those found that enter takes."""
    past: list[bool] = field(default_factory=list)
    """For each entry gone through, whether it was answered."""

    @property
    def entry(self) -> Entry | None:
        """The question on the screen; None at the end."""
        return self.entries[self.at] if self.at < len(self.entries) else None

    def found(self) -> list[str]:
        """The labels that the search finds: those that begin with what was typed come first."""
        typed = (self.query or "").strip().casefold()
        hits = [label for label in self.labels if typed in label.casefold()]
        return sorted(hits, key=lambda label: not label.casefold().startswith(typed))

    def press(self, key: str) -> Step | None:
        """What a key does, as `keys` names it; the walk has moved on when this returns."""
        if self.query is not None:
            return self._search(key)
        if key == "q":
            return Quit()
        if key == "u":
            return self._undo()
        if self.entry is None:
            return None
        if key in ("s", " "):
            self._go_on(answered=False)
        elif key == "n":
            return self._answer(None)
        elif key == "/":
            self.query, self.chosen = "", 0
        elif key in by_key(self.labels, self.entry):
            return self._answer(by_key(self.labels, self.entry)[key])
        return None

    def _search(self, key: str) -> Step | None:
        found = self.found()
        if key == ESCAPE:
            self.query = None
        elif key == ENTER and found:
            return self._answer(found[self.chosen])
        elif key in (UP, DOWN):
            step = 1 if key == DOWN else -1
            self.chosen = max(0, min(self.chosen + step, len(found) - 1))
        elif key in (BACKSPACE, CLEAR) or len(key) == 1:
            typed = self.query or ""
            self.query = {BACKSPACE: typed[:-1], CLEAR: ""}.get(key, typed + key)
            self.chosen = 0
        return None

    def _answer(self, label: str | None) -> Step:
        hash = self.entries[self.at].hash
        self._go_on(answered=True)
        return Answer(hash, label)

    def _go_on(self, *, answered: bool) -> None:
        self.past.append(answered)
        self.at += 1
        self.answered += answered
        self.query = None

    def _undo(self) -> Step | None:
        if not self.past:
            return None
        self.at -= 1
        if not self.past.pop():
            return None
        self.answered -= 1
        return Withdraw(self.entries[self.at].hash)


def by_key(labels: Sequence[str], entry: Entry) -> dict[str, str]:
    """The label of each key: digits for the model's best ones, letters for the first of all."""
    best = [label for label, _ in entry.top] or [entry.label]
    digits = {str(number): label for number, label in enumerate(best[:9], 1)}
    return digits | dict(zip(LABEL_KEYS, labels, strict=False))


def keys(read: str) -> Iterator[str]:
    """The keys in what a terminal sent at once: a character each, or one of the names above."""
    for key in _SEQUENCE.findall(read):
        if key in _NAMED:
            yield _NAMED[key]
        elif len(key) == 1 and (key.isprintable() or key in _JOINERS):
            yield key


def shown(text: str) -> str:
    """Text that a terminal will not obey: what cannot be seen is escaped as Python does it."""
    return "".join(
        char if char.isprintable() or char in _JOINERS else ascii(char)[1:-1] for char in text
    )


def width(text: str) -> int:
    """The columns that printable text takes in a terminal."""
    return sum(_columns(char) for char in text)


def wrap(text: str, columns: int) -> list[str]:
    """Printable text in lines of at most so many columns, broken at spaces where there are any."""
    lines, line, room = [], "", columns
    for word in text.split(" "):
        if line and width(word) > room - 1:
            lines.append(line)
            line, room = "", columns
        elif line:
            line, room = f"{line} ", room - 1
        for char in word:
            if _columns(char) > room:
                lines.append(line)
                line, room = "", columns
            line, room = line + char, room - _columns(char)
    return [*lines, line]


def screen(walk: Walk, columns: int, rows: int) -> list[str]:
    """The lines of the screen, styled; none is wider, and there are no more, than a terminal has.

    In a terminal of less than 20 columns or 8 rows the lines do not fit.
    """
    columns, rows = max(columns, _MIN_WIDTH), max(rows, _MIN_HEIGHT)
    place = f"{min(walk.at + 1, len(walk.entries))} of {len(walk.entries)}"
    head = _cut(f"{place}   {walk.answered} answered   {shown(walk.task)}", columns)
    entry = walk.entry
    if entry is None:
        foot = _foot("u undo   q quit", columns, rows)
        return [click.style(head, dim=True), "", "That was the last one.", "", *foot]
    best = [(label, f"{share:.3f}") for label, share in entry.top] or [(entry.label, "")]
    reason = f"   {entry.reason.replace('_', ' ')}" if entry.reason else ""
    note = f"seen {entry.seen} times{reason}" if entry.seen > 1 else reason.strip()
    foot = _foot(_HELP if walk.query is None else _SEARCH_HELP, columns, rows)
    above = [click.style(head, dim=True), ""]
    # The question may have half of what the model's labels and the help leave free.
    free = rows - len(above) - len(foot) - 3
    body = _cut_lines(wrap(shown(entry.text or ""), columns), max(1, (free - len(best)) // 2))
    above += [click.style(line, bold=True) for line in body]
    above += [click.style(_cut(shown(note), columns), dim=True), ""]
    room = rows - len(above) - len(foot) - 1
    if walk.query is None:
        digits = [
            f"{i} {_cell(label, share, columns - 2)}" for i, (label, share) in enumerate(best, 1)
        ]
        below = digits[:room]
        if room - len(below) > 1:
            below += ["", *_grid(walk.labels, columns, room - len(below) - 1)]
    else:
        below = _finder(walk, columns, room)
    return [*above, *below, "", *foot]


def _finder(walk: Walk, columns: int, rows: int) -> list[str]:
    found = walk.found()
    typed = _cut(f"/{shown(walk.query or '')}", columns - 1, from_end=True)
    # The window of labels follows the chosen one.
    first = max(0, walk.chosen - (rows - 2))
    lines = []
    for number, label in enumerate(found[first : first + rows - 1], first):
        mark = ">" if number == walk.chosen else " "
        line = _cut(f"{mark} {shown(label)}", columns)
        lines.append(click.style(line, reverse=True) if mark == ">" else line)
    return [f"{typed}_", *(lines or ["no such label"][: rows - 1])]


def _grid(labels: Sequence[str], columns: int, rows: int) -> list[str]:
    """The labels that have a letter, down the columns, as many as there is room for."""
    cells = [f"{key} {shown(label)}" for key, label in zip(LABEL_KEYS, labels, strict=False)]
    wide = min(columns, max(map(width, cells)) + 2)
    across = max(1, columns // wide)
    lacking = len(cells) > across * rows or len(labels) > len(cells)
    high = min(-(-len(cells) // across), rows - lacking)
    lines = []
    for row in range(high):
        line = "".join(_padded(_cut(cell, wide - 1), wide) for cell in cells[row::high][:across])
        lines.append(line.rstrip())
    more = len(labels) - min(len(cells), across * high)
    return [*lines, _cut(f"and {more} more: / finds them", columns)] if lacking else lines


def _cell(label: str, share: str, columns: int) -> str:
    """A label with its probability, not further apart than the eye can follow."""
    wide = min(columns - 7, 40)
    return f"{_padded(_cut(shown(label), wide), wide)}  {share}".rstrip()


def _foot(help: str, columns: int, rows: int) -> list[str]:
    """What the keys do, in as many lines as a small terminal can spare."""
    lines = [""]
    for item in help.split("   "):
        joined = f"{lines[-1]}   {item}" if lines[-1] else item
        lines = [*lines[:-1], joined] if len(joined) <= columns else [*lines, item]
    return [click.style(_cut(line, columns), dim=True) for line in lines[: rows // 6]]


def _cut_lines(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]


def _cut(text: str, columns: int, *, from_end: bool = False) -> str:
    """Printable text, cut at its end, or at its beginning, to so many columns."""
    if width(text) <= columns:
        return text
    while width(text) > columns - 1:
        text = text[1:] if from_end else text[:-1]
    return f"…{text}" if from_end else f"{text}…"


def _padded(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
