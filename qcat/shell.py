"""Words in the commands that messages tell the user to run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys


def quoted(word: str | os.PathLike[str]) -> str:
    """A path or a name as it has to be typed for the system's shell to take it as one word."""
    text = os.fspath(word)
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)
