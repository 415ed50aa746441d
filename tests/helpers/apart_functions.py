"""What the tests run in another process: in a module of its own, which loads quickly."""

from __future__ import annotations

import os

from qcat.errors import DataError


def doubled(number, progress):
    progress(1, 2)
    return 2 * number


def refused(text, progress):
    raise DataError(text)


class OddError(Exception):
    """Does not survive pickling."""

    def __init__(self, one, two):
        super().__init__(one + two)


def broken(text, progress):
    raise OddError(text, "!")


def killed(_, progress):
    os.kill(os.getpid(), 9)


def nothing():
    pass


def unprepared():
    raise ImportError("no such library")


def ended():
    os._exit(3)
