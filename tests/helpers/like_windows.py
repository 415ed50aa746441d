"""What Windows does with files that are open, as far as Linux can show it."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EACCES
from pathlib import Path
from typing import Any

import pytest


def forbid_moving_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be deleted, renamed or replaced that this process has open or mapped."""
    for name, paths in (("unlink", 1), ("rename", 2), ("replace", 2)):
        monkeypatch.setattr(os, name, _careful(getattr(os, name), paths))


def _careful(function: Callable[..., Any], paths: int) -> Callable[..., Any]:
    def careful(*args: Any, **more: Any) -> Any:
        for path in args[:paths]:
            whole = os.path.realpath(path)
            if not more and any(at == whole or at.startswith(f"{whole}/") for at in _open_files()):
                raise PermissionError(EACCES, os.strerror(EACCES), str(path))
        return function(*args, **more)

    return careful


def _open_files() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    return found | {fields[5] for line in maps if len(fields := line.split(maxsplit=5)) == 6}
