"""The review queue under processes that are killed while they write."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from qcat.monitor.review import ReviewQueue

WRITERS, KILLS = 4, 50


WRITER = """
import os, sys
from predictions import LABELS, prediction
from qcat.monitor.review import ReviewQueue
file, said, name = sys.argv[1:]
said = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
with ReviewQueue.open(file, task="sorts", labels=LABELS) as queue:
    for number in range(1_000_000):
        question = f"shared {number % 7}" if number % 2 else f"{name} {number}"
        queue.add(question, prediction())
        os.write(said, f"{question}\\n".encode())
"""
"""Adds questions until it is killed, and says of each when it has been added."""


MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path):
    """In memory where there is such a disk: a kill, unlike a power cut, loses no write."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


class Writer:
    """A process that adds questions."""

    def __init__(self, folder: Path, number: int) -> None:
        self._said = folder / f"{number}.said"
        args = [folder / "queue.db", self._said, f"writer {number}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, *map(str, args)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def at_work(self) -> bool:
        """Whether it has added something: a kill while Python starts tells nothing."""
        assert self.process.poll() is None
        return self._said.exists() and self._said.stat().st_size > 0

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_what_was_added_outlives_any_kill(folder):
    draw = random.Random(0)
    writers = [Writer(folder, number) for number in range(WRITERS)]
    try:
        for started in range(WRITERS, WRITERS + KILLS):
            until = time.monotonic() + 60
            while not (ready := [at for at in range(WRITERS) if writers[at].at_work()]):
                assert time.monotonic() < until
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            at = draw.choice(ready)
            writers[at].kill()
            writers[at] = Writer(folder, started)
    finally:
        for writer in writers:
            writer.kill()

    said = Counter(line for path in folder.glob("*.said") for line in path.read_text().splitlines())
    with ReviewQueue.existing(folder / "queue.db") as queue:
        seen = {entry.text: entry.seen for entry in queue.pending()}
    assert len(said) > KILLS
    for question, count in said.items():
        assert seen.get(question, 0) >= count, question
    # Killed between the commit and the word of it: at most one question a writer.
    assert sum(seen.values()) - said.total() <= WRITERS + KILLS
    database = sqlite3.connect(folder / "queue.db")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
