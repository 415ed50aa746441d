"""Forks of a process that has loaded llama.cpp: they can compute, but only with one thread.

GNU OpenMP's threads do not survive a fork, and a child that computes with several threads waits
forever for those of its parent. With one thread llama.cpp does not use OpenMP, and the results are
the same.

A lock that another thread holds during a fork would stay locked in the child, with the guarded work
half done. A fork made by Python therefore waits until nobody holds a lock made by `new_lock`.
"""

from __future__ import annotations

import os
import threading
from enum import IntEnum
from typing import Any
from weakref import WeakSet

_LOADED_BY = os.getpid()

opening = threading.RLock()
"""Held while models are loaded, while shared models are closed, and while a process forks. A thread
that acquires several locks acquires this one first, then those of `Guards` in order."""


class Guards(IntEnum):
    """What a lock guards, in the order in which threads acquire them."""

    CONTEXT = 0
    MODEL = 1


_locks: dict[Guards, WeakSet[Any]] = {what: WeakSet() for what in Guards}
_held: list[Any] = []  # by the thread that forks


def is_fork() -> bool:
    """Whether this process was forked from the one that loaded llama.cpp."""
    # Not detected by a hook as below, because uWSGI forks without Python's knowledge.
    return os.getpid() != _LOADED_BY


def new_lock(guards: Guards) -> Any:
    """A reentrant lock that is never left locked by a fork."""
    lock = threading.RLock()
    with opening:
        _locks[guards].add(lock)
    return lock


def _take_all() -> None:
    opening.acquire()
    _held.append(opening)
    for what in Guards:
        for lock in list(_locks[what]):
            lock.acquire()
            _held.append(lock)


def _give_back() -> None:
    while _held:  # the last is `opening`: until then no other thread may fork
        _held.pop().release()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(before=_take_all, after_in_parent=_give_back, after_in_child=_give_back)
