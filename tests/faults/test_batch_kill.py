"""`qcat batch` killed at random moments and given again: nothing is lost, nothing comes twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

QCAT = Path(sys.executable).with_name("qcat")
KILLS = 4
QUESTIONS = [
    "who fixed the gate latch",
    "When was the pool pump replaced?",
    "the AC blows warm air",
]
# Rows without a question cost no forward pass: the work is killed while it is asked, as while it is
# read and written.
ROWS = [
    {"id": number, "text": QUESTIONS[number % 3] if number % 40 == 0 else ""}
    for number in range(20_000)
]


def kill(source, target, wait, writing=False):
    """Give the command; kill it some seconds after its journal has grown, or its output begun."""
    process = subprocess.Popen(
        [QCAT, "batch", source, "-o", target], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    grows = target.with_name(f".{target.name}.new") if writing else Path(f"{target}.part")
    before = 0 if writing else size(grows)
    while process.poll() is None and size(grows) <= before:
        time.sleep(0.002)
    time.sleep(wait)
    process.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error


def size(path):
    return path.stat().st_size if path.exists() else 0


def test_killed_again_and_again(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    chance = random.Random(7)
    for _ in range(KILLS):
        kill(source, target, chance.uniform(0, 0.05))
    kill(source, target, 0, writing=True)
    assert not target.exists()
    done = subprocess.run([QCAT, "batch", source, "-o", target], capture_output=True, text=True)
    assert "20000 rows, 20000 of them asked before: " in done.stdout, done.stderr
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(len(ROWS)))
    for row in found:
        if row["text"]:
            assert row["label"] == {"who": "fence", "Whe": "pool", "the": "hvac"}[row["text"][:3]]
            assert row["error"] is None
        else:
            assert (row["label"], row["abstained"]) == (None, True)
    assert not list(tmp_path.glob(".out*"))
