"""The log under four writers that are killed fifty times: nothing that was acknowledged is lost.

Run as a program this file is the supervisor: it forks, so it must have no threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from predictions import prediction

from qcat.monitor.log import PredictionLog, read_log

WRITERS, KILLS = 4, 50
PAGES = "x" * 9000  # a kill may end a write between two pages of memory


def test_nothing_acknowledged_is_lost(tmp_path):
    log = tmp_path / "log.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, log], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    acknowledged = json.loads(done.stdout)
    assert len(acknowledged) == KILLS + WRITERS

    found = defaultdict(list)
    skipped = 0
    # The supervisor renamed the log half way, as logrotate does.
    for part in (tmp_path / "log.jsonl.1", log):
        window = read_log(part)
        assert window.records
        skipped += window.skipped
        for record in window.records:
            writer, number, padding = record.text.split(":")
            assert padding == PAGES[: len(padding)]
            assert len(padding) == length(writer, int(number))
            found[writer].append(int(number))
    for writer, count in acknowledged.items():
        # The last record may be in the file though its writer did not live to say so.
        assert found[writer] in (list(range(count)), list(range(count + 1)))
    assert skipped <= KILLS + WRITERS  # lines torn by a kill, never two by one
    assert sum(acknowledged.values()) > 10 * KILLS


def length(writer, number):
    """How long the padding of a record is."""
    return random.Random(f"{writer} {number}").randrange(len(PAGES))


def write(path, writer, pipe):
    """Log for ever; acknowledge each record with one byte."""
    with PredictionLog(path, model="m", rule="r", text=True) as log:
        number = 0
        while True:
            log.add(f"{writer}:{number}:{PAGES[: length(writer, number)]}", prediction())
            os.write(pipe, b".")
            number += 1


def start(path, writer):
    """Fork a writer; its process and the pipe it acknowledges to."""
    read, ack = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        try:
            write(path, writer, ack)
        finally:
            os._exit(1)
    os.close(ack)
    return process, read


def kill(process, pipe):
    """Kill a writer that has begun; how many records it acknowledged."""
    count = len(os.read(pipe, 1))
    time.sleep(random.uniform(0, 0.02))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    while more := os.read(pipe, 1 << 16):
        count += len(more)
    os.close(pipe)
    return count


def supervise(path):
    """Keep four writers running through all kills; acknowledged records by writer."""
    running = [(str(number), *start(path, str(number))) for number in range(WRITERS)]
    acknowledged = {}
    for number in range(WRITERS, WRITERS + KILLS):
        name, process, pipe = running.pop(0)
        acknowledged[name] = kill(process, pipe)
        running.append((str(number), *start(path, str(number))))
        if number == KILLS // 2:
            path.rename(f"{path}.1")
    return acknowledged | {name: kill(process, pipe) for name, process, pipe in running}


if __name__ == "__main__":
    print(json.dumps(supervise(Path(sys.argv[1]))))
