"""Quoting for commands that messages suggest."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys


def quoted(word: str | os.PathLike[str]) -> str:
    """A path or name, quoted so that the system's shell reads it as one word."""
    text = os.fspath(word)
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)
