"""Measures a model on this machine: cold start, latency, throughput, threads, memory.

All questions go through the public interface. Each question is new to the model: the questions
share only the prompt's prefix.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qcat.classifier import Classifier
from qcat.errors import ModelError
from qcat.gguf.bundle import Bundle
from qcat.progress import Count, Progress, uncounted
from qcat.threads import MAX_THREADS, cores, default_threads

BATCHES = (1, 2, 4, 8, 16)
COLD_STARTS = 5
_WARM_UP = 3
_SHAPES = (
    "What about the {}?",
    "When was the {} last seen to, and by whom?",
    "how much for the {}",
    "Is there anything that we should know about the {} before next week?",
)


@dataclass(frozen=True)
class Spread:
    """Milliseconds for one operation, measured several times."""

    median: float
    p95: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Build it from measurements in seconds."""
        return cls(median(seconds) * 1e3, float(np.percentile(seconds, 95)) * 1e3, len(seconds))


@dataclass(frozen=True)
class Measured:
    """All results of `measure`. Times are in milliseconds, sizes in bytes."""

    model: str
    bytes: int
    labels: int
    processor: str
    logical: int
    physical: int
    quota: float | None
    load: tuple[float, ...]
    """Load averages of the machine before measuring; other work distorts all other figures."""
    threads: int
    """Number of threads for everything except `by_threads`."""
    tokens: float
    """Median number of tokens of a question and the words after it."""
    cold: Spread
    """New `qcat ask` processes, after one that filled the caches."""
    peak_memory: int | None
    """Peak resident memory of such a process, including the mapped model; None if unknown."""
    warm: Spread
    """`Classifier.ask`."""
    by_batch: dict[int, float]
    """Time per question, by how many are given to `Classifier.ask_many` at once."""
    by_threads: dict[int, float]
    """Median of `Classifier.ask`, by the number of threads."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def questions_for(labels: Sequence[str], count: int) -> list[str]:
    """Questions of usual lengths that name a task's labels, used if there are no others."""
    return [
        _SHAPES[number // len(labels) % len(_SHAPES)].format(labels[number % len(labels)])
        for number in range(count)
    ]


def measure(model: Path, questions: Sequence[str], progress: Progress) -> Measured:
    """Measure a GGUF on this machine, one thing after another.

    Args:
        model: the GGUF file.
        questions: questions to ask, at least as many as there are in a batch.
        progress: called with what is measured, how much of it is done, and the total.

    Raises:
        BundleError, ModelError, QuestionError: as `Classifier.open` and `ask`.
    """
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    threads, machine = default_threads(), cores()
    bundle = Bundle.read(model)
    model, task = bundle.path, bundle.task
    cold, peak = _cold(model, questions[0], progress)
    with Classifier.open(model, threads=threads) as classifier:
        tokens = median(classifier.count_tokens(question) for question in questions)
        warm = _ask_all(classifier, questions, lambda d, n: progress("warm", d, n))
        by_batch = _by_batch(classifier, questions, progress)
    by_threads = {}
    powers = (2**n for n in range(12) if 2**n <= machine.logical)
    tried = sorted({min(count, MAX_THREADS) for count in (1, *powers, machine.physical)})
    for number, count in enumerate(tried, 1):
        with Classifier.open(model, threads=count) as classifier:
            few = questions[: max(10, len(questions) // 4)]
            by_threads[count] = _ask_all(classifier, few, uncounted).median
        progress("threads", number, len(tried))
    return Measured(
        model=str(model),
        bytes=model.stat().st_size,
        labels=len(task.labels),
        processor=processor(),
        logical=machine.logical,
        physical=machine.physical,
        quota=machine.quota,
        load=tuple(round(value, 2) for value in load),
        threads=threads,
        tokens=tokens,
        cold=cold,
        peak_memory=peak,
        warm=warm,
        by_batch=by_batch,
        by_threads=by_threads,
    )


def processor() -> str:
    """The processor's name, as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _ask_all(classifier: Classifier, questions: Sequence[str], progress: Count) -> Spread:
    for question in questions[:_WARM_UP]:
        classifier.ask(question)
    found = []
    for done, question in enumerate(questions, 1):
        start = time.perf_counter()
        classifier.ask(question)
        found.append(time.perf_counter() - start)
        progress(done, len(questions))
    return Spread.of(found)


def _by_batch(
    classifier: Classifier, questions: Sequence[str], progress: Progress
) -> dict[int, float]:
    """Median milliseconds a question; the sizes take turns, so a slowdown affects all of them."""
    found: dict[int, list[float]] = {size: [] for size in BATCHES}
    turns = max(3, len(questions) // max(BATCHES))
    for turn in range(turns):
        at = turn * max(BATCHES) % len(questions)
        chosen = (list(questions[at:]) + list(questions[:at]))[: max(BATCHES)]
        for size in BATCHES:
            start = time.perf_counter()
            for first in range(0, len(chosen), size):
                list(classifier.ask_many(chosen[first : first + size]))
            found[size].append((time.perf_counter() - start) * 1e3 / len(chosen))
        progress("batches", turn + 1, turns)
    return {size: median(times) for size, times in found.items()}


def _cold(model: Path, question: str, progress: Progress) -> tuple[Spread, int | None]:
    """Times of new processes of the command, run in sequence, and the peak memory of any of them.

    Linux also counts the memory of the starting process as that of the new one. So this is measured
    first, while this process uses little memory.
    """
    program = [sys.executable, "-m", "qcat"]
    command = [*program, "ask", "-m", str(model), "--threshold", "0", "--", question]
    environment = os.environ | {"QCAT_REVIEW": ""}  # the user's own is not touched
    seconds, peak = [], 0
    for turn in range(1 + COLD_STARTS):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        ) as process:
            assert process.stderr is not None
            said = process.stderr.read().decode("utf-8", "replace")
            peak = max(peak, _wait(process))
        if process.returncode:
            raise ModelError(f"{model}: `qcat ask` failed: {said.strip()[-300:]}")
        if turn:  # the first run loads the files into memory and fills the cache folder
            seconds.append(time.perf_counter() - start)
        progress("cold starts", turn + 1, 1 + COLD_STARTS)
    return Spread.of(seconds), peak or None


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return its peak resident memory in bytes, 0 if unknown."""
    if not hasattr(os, "wait4"):
        process.wait()
        return 0
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
