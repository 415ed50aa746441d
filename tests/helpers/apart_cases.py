"""Cases tried in a process of their own, which they may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run_apart(
    script: str, args: Sequence[object], cases: Sequence[object], *, seconds: float = 60
) -> list[Any]:
    """What a script printed for each case, as JSON; `{"died": how}` where its process did not live.

    Args:
        script: gets `args` on its command line and the cases on stdin, one JSON a line.
        args: the same for all cases.
        cases: anything that JSON can say.
        seconds: for all cases together; after that the case at work counts as hanging.
    """
    outcomes: list[Any] = []
    command = [sys.executable, "-X", "faulthandler", script, *(str(arg) for arg in args)]
    environment = os.environ | {
        "GGML_NO_BACKTRACE": "1",  # it would start a debugger
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    deaths = 0
    while len(outcomes) < len(cases):
        lines = "".join(json.dumps(case) + "\n" for case in cases[len(outcomes) :])
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        ) as process:
            try:
                out, err = process.communicate(lines, timeout=seconds)
                how = f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                how = f"nothing for {seconds:g} s"
        outcomes += [json.loads(line) for line in out.splitlines()]
        if len(outcomes) < len(cases):
            deaths += 1
            how += f": {err.strip()[-1500:]}"
            assert deaths < 40, f"too many cases kill the process; the last was {how}"
            outcomes.append({"died": how})
    return outcomes
