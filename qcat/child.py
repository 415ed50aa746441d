"""A Python process of its own, for work that may end badly: in a crash, or never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_module(
    name: str, data: bytes, *, seconds: float
) -> subprocess.CompletedProcess[bytes] | None:
    """Run a module of ours as a program, with data on stdin, and wait for it.

    The current folder is not searched for modules, whatever lies there.

    Args:
        name: of the module, as for `python -m`.
        data: for its stdin.
        seconds: after which it is killed.

    Returns:
        None where there is no interpreter to start: in a frozen program, or embedded in another.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    interpreter = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
    if getattr(sys, "frozen", False) or not interpreter:
        return None
    path = os.pathsep.join(place for place in sys.path if place)
    return subprocess.run(
        [sys.executable, "-P", "-m", name],
        input=data,
        capture_output=True,
        timeout=seconds,
        env=os.environ | {"PYTHONPATH": path},
    )
