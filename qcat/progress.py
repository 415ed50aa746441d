"""How far a long piece of work is: the callbacks that all of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called as work goes on, with the name of a step and how much of it is done of how much."""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None: ...


Count = Callable[[int, int], None]
"""The same for one step: called with how much is done, and of how much."""


def silent(step: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that nobody looks at."""


def uncounted(done: int, total: int) -> None:
    """A `Count` that nobody looks at."""
