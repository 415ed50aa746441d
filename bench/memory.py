"""How much memory a process and its children take together, by looking often (Linux).

What `/proc/PID/status` says: RssAnon is memory of their own, RssFile pages of mapped files, which
the system can drop and read again. Pages that two processes share are counted in both.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_SECONDS = 0.01


@dataclass(frozen=True)
class Peak:
    """The most at any one moment, in 10^6 bytes; the two need not be of one moment."""

    resident_mb: float = 0.0
    """Mapped files included."""
    anonymous_mb: float = 0.0


class Watch:
    """Looks from another thread until it is closed.

    Args:
        itself: whether to count this process, or its children alone.
    """

    def __init__(self, *, itself: bool = True) -> None:
        self._itself = itself
        self._lock = threading.Lock()
        self._peak = Peak()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def take(self) -> Peak:
        """The peak since the last call."""
        self._look()
        with self._lock:
            found, self._peak = self._peak, Peak()
        return found

    def _run(self) -> None:
        while not self._over.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        found = [sizes(pid) for pid in _family(os.getpid())[not self._itself :]]
        resident, anonymous = (
            sum(column) * 1024 / 1e6 for column in zip((0, 0), *found, strict=True)
        )
        with self._lock:
            self._peak = Peak(
                max(self._peak.resident_mb, resident), max(self._peak.anonymous_mb, anonymous)
            )


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    with suppress(OSError):  # it may end while it is looked at
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


def sizes(pid: int) -> tuple[int, int]:
    """Resident and anonymous kilobytes."""
    kilobytes = {"VmRSS": 0, "RssAnon": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in kilobytes:
                kilobytes[name] = int(value.split()[0])
    return kilobytes["VmRSS"], kilobytes["RssAnon"]
