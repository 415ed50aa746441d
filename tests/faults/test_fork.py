"""Forks: workers that answer with what their parent opened, or with what they open themselves.

Each case is a program of its own, which a hang ends. Two threads, since only several hang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")

COMMON = """
import json, multiprocessing, os, sys, threading
from qcat import Classifier, Recorder
from qcat.errors import RecordError

QUESTION = "When was the pool pump replaced?"

def answers(classifier):
    one = classifier.ask(QUESTION)
    many = [p.label for p in classifier.ask_many([QUESTION, "The fence is down."] * 9)]
    return [one.label, one.confidence, many]

def in_child(function):
    read, write = os.pipe()
    if not os.fork():
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        return json.load(pipe)

def opened():
    with Classifier.open(threads=2) as classifier:
        return answers(classifier)
"""


def printed(program):
    """What a program prints, as JSON; it may take no longer than a hang can be told from work."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMON + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children too, which would hang for ever
        process.wait()
    assert process.returncode == 0, errors
    return json.loads(said)


def test_a_child_answers_with_its_parents_classifier():
    here, there, after = printed(
        "c = Classifier.open(threads=2)\n"
        "here = answers(c)\n"
        "there = in_child(lambda: answers(c))\n"
        "print(json.dumps([here, there, answers(c)]))\n"
    )
    assert here[0] == "pool"
    assert here == there == after


@pytest.mark.parametrize("closed", [False, True])
def test_a_child_opens_its_own_after_its_parent_has_computed(closed):
    here, there = printed(
        "c = Classifier.open(threads=2)\n"
        "here = answers(c)\n"
        f"{'c.close()' if closed else ''}\n"
        "print(json.dumps([here, in_child(opened)]))\n"
    )
    assert here == there


def test_a_pool_of_forked_processes():
    [one, *more] = printed(
        "c = Classifier.open(threads=2)\n"
        "c.ask(QUESTION)\n"
        "def work(_): return answers(c)\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    print(json.dumps([answers(c), *pool.map(work, range(4))]))\n"
    )
    assert more == [one] * 4


def test_forks_while_other_threads_ask_and_open():
    """Without care a child finds locks taken by threads that it does not have."""
    [one, *more] = printed(
        "c = Classifier.open(threads=2)\n"
        "going = True\n"
        "def busy():\n"
        "    while going: c.ask(QUESTION)\n"
        "def opening():\n"
        "    while going: opened()\n"
        "threads = [threading.Thread(target=work) for work in (busy, busy, opening)]\n"
        "for thread in threads: thread.start()\n"
        "found = [in_child(lambda: answers(c)) for _ in range(10)]\n"
        "going = False\n"
        "for thread in threads: thread.join()\n"
        "print(json.dumps([answers(c), *found]))\n"
    )
    assert more == [one] * 10


def test_a_child_of_a_parent_without_a_model_keeps_its_threads():
    threads = printed(
        "def threads():\n"
        "    import llama_cpp\n"
        "    c = Classifier.open(threads=2)\n"
        "    c.ask(QUESTION)\n"
        "    return llama_cpp.llama_n_threads(c._scorer._context)\n"
        "there = in_child(threads)\n"
        "c = Classifier.open(threads=2)\n"
        "c.ask(QUESTION)\n"
        "print(json.dumps([there, in_child(threads)]))\n"
    )
    assert threads == [2, 1]


def test_a_log_goes_on_in_a_child_and_a_review_queue_says_that_it_cannot(tmp_path):
    """SQLite keeps nobody apart on one connection."""
    log, queue = tmp_path / "log", tmp_path / "queue.db"
    said = printed(
        "c = Classifier.open(threshold=1)\n"
        f"recorder = Recorder.open(c, log={str(log)!r}, review={str(queue)!r})\n"
        "recorder.add(QUESTION, c.ask(QUESTION))\n"
        "def add():\n"
        "    try: recorder.add(QUESTION, c.ask(QUESTION))\n"
        "    except RecordError as error: return str(error)\n"
        "print(json.dumps(in_child(add)))\n"
    )
    assert said == f"{queue}: was opened before a fork: open it in the child"
    assert len(log.read_text().splitlines()) == 2
