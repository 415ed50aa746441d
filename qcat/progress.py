"""Progress of long work: the callback types used everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called during the work with a step's name, how much of it is done, and the total."""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None: ...


Count = Callable[[int, int], None]
"""The same for one step: called with how much is done, and the total."""


def silent(step: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that does nothing."""


def uncounted(done: int, total: int) -> None:
    """A `Count` that does nothing."""
