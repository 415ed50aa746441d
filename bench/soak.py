"""Whether one process that answers for long keeps its memory and its open files.

    python bench/soak.py --plot soak.png

The shipped model answers the example questions, in rounds that are drawn by chance: one at a time,
many at once, from several Python threads, with a log and a review queue, closed and opened anew,
two at once, and questions that cannot be asked. Now and then it looks at its own resident memory,
descriptors and threads (Linux). Prints a table and one line of JSON; exit status 1 if something
grew, or a question got another label than the first time. 200,000 questions take about ten
minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the machine may have other work
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from memory import sizes

from qcat import Classifier, Prediction, Recorder
from qcat.cli.output import table
from qcat.data.dataset import read_texts
from qcat.errors import QuestionError

QUESTIONS = Path(__file__).resolve().parent.parent / "examples" / "household" / "questions.jsonl"
THREADS = 4
LOOKS = 40
CLOSE = 0.02
"""Two labels whose probabilities differ by less may change places with the shape of a batch."""
GROWTH_MB = 2.0
"""What counts as growth between the second and the last quarter of a run: medians of resident
memory. The first quarter fills the allocator's pools."""
LONG = "pool " * 2000
"""A context is made larger when the first such question comes: here at once, so that each look
finds the process in the same state."""
BAD = ("", "   ", "\t\n", "\0", LONG, "x" * 30_000, "\ud800 pool", "<|im_end|> pool")


@dataclass(frozen=True)
class Look:
    """What a process holds at one moment."""

    questions: int
    seconds: float
    resident_mb: float
    anonymous_mb: float
    descriptors: int
    threads: int


class Soak:
    """The process's classifiers and what it has asked of them.

    Args:
        texts: the questions.
        seed: of the rounds.
        folder: for the log and the review queue.
    """

    def __init__(self, texts: Sequence[str], seed: int, folder: Path) -> None:
        self._rng = random.Random(seed)
        self._texts, self._folder = texts, folder
        self._classifier = self._opened()
        self._labels: dict[str, str] = {}
        self._lock = threading.Lock()  # of the counts
        self.asked = self.changed = 0
        self.rounds: Counter[str] = Counter()
        self._ways = {
            "ask": self._ask,
            "ask_many": self._ask_many,
            "threads": self._in_threads,
            "recorded": self._recorded,
            "bad": self._bad,
            "reopened": self._reopen,
            "two at once": self._two,
        }

    def round(self) -> None:
        """One way of asking, with some dozens of questions."""
        name = self._rng.choices(list(self._ways), (30, 30, 20, 5, 5, 5, 5))[0]
        self.rounds[name] += 1
        self._ways[name]()

    def close(self) -> None:
        """Close the classifier."""
        self._classifier.close()

    def _drawn(self, count: int) -> list[str]:
        return self._rng.choices(self._texts, k=count)

    def _note(self, texts: Sequence[str], answers: Sequence[Prediction]) -> None:
        with self._lock:
            self.asked += len(texts)
            for text, answer in zip(texts, answers, strict=True):
                first = self._labels.setdefault(text, answer.label)
                close = answer.margin is not None and answer.margin < CLOSE
                self.changed += first != answer.label and not close

    def _ask(self) -> None:
        texts = self._drawn(60)
        self._note(texts, [self._classifier.ask(text) for text in texts])

    def _ask_many(self) -> None:
        texts = self._drawn(self._rng.randrange(1, 200))
        self._note(texts, list(self._classifier.ask_many(texts)))

    def _in_threads(self) -> None:
        def work(texts: Sequence[str]) -> None:
            self._note(texts, [self._classifier.ask(text) for text in texts])

        threads = [threading.Thread(target=work, args=(self._drawn(25),)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _recorded(self) -> None:
        log, queue = self._folder / "log.jsonl", self._folder / "queue.db"
        texts = self._drawn(20)
        with Recorder.open(self._classifier, log=log, log_text=True, review=queue) as recorder:
            for text in texts:
                answer = self._classifier.ask(text)
                recorder.add(text, answer)
                self._note([text], [answer])
        log.unlink()

    def _bad(self) -> None:
        texts = [self._rng.choice(BAD) for _ in range(20)]
        for text in texts[:10]:
            try:
                self._classifier.ask(text)
            except QuestionError:
                continue
        for _ in self._classifier.ask_each(texts[10:]):
            pass
        self.asked += len(texts)

    def _reopen(self) -> None:
        self._classifier.close()
        self._classifier = self._opened()
        self._ask()

    def _two(self) -> None:
        texts = self._drawn(30)
        quick = self._rng.random() < 0.5
        with Classifier.open(threshold=0.5, quick_start=quick) as other:
            self._note(texts, list(other.ask_many(texts)))
            self._ask()

    @staticmethod
    def _opened() -> Classifier:
        classifier = Classifier.open()
        classifier.ask(LONG)
        return classifier


def main() -> None:
    """Ask, look, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as PNG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcat-soak-") as folder:
        soak = Soak(read_texts(QUESTIONS), options.seed, Path(folder))
        looks = watched(soak, options.questions)
        soak.close()
    quarter = len(looks) // 4
    early, late = looks[quarter : 2 * quarter], looks[-quarter:]
    growth = median(look.resident_mb for look in late) - median(look.resident_mb for look in early)
    held = [max(look.descriptors for look in part) for part in (early, late)]
    running = [max(look.threads for look in part) for part in (early, late)]
    print_table(looks, soak.rounds)
    found = {
        "questions": soak.asked,
        "rounds": dict(soak.rounds),
        "seconds": round(looks[-1].seconds, 1),
        "resident_mb_growth": round(growth, 2),
        "descriptors": held,
        "threads": running,
        "labels_changed": soak.changed,
        "looks": [asdict(look) for look in looks],
    }
    print(json.dumps(found))
    if options.plot:
        options.plot.write_bytes(picture(looks))
    flat = growth < GROWTH_MB and held[1] <= held[0] and running[1] <= running[0]
    sys.exit(0 if flat and not soak.changed else 1)


def watched(soak: Soak, questions: int) -> list[Look]:
    """Ask so many questions; look `LOOKS` times on the way."""
    start, looks = time.perf_counter(), []
    for number in range(LOOKS + 1):
        while soak.asked < questions * number / LOOKS:
            soak.round()
        gc.collect()
        resident, anonymous = (kilobytes * 1024 / 1e6 for kilobytes in sizes(os.getpid()))
        looks.append(
            Look(
                soak.asked,
                time.perf_counter() - start,
                resident,
                anonymous,
                len(os.listdir("/proc/self/fd")) - 1,  # less that of the listing
                len(os.listdir("/proc/self/task")),
            )
        )
    return looks


def print_table(looks: Sequence[Look], rounds: Counter[str]) -> None:
    """Every fourth look, and how often each way of asking was taken."""
    head = ("questions", "seconds", "resident MB", "anonymous MB", "descriptors", "threads")
    rows = [
        (
            f"{look.questions:,}",
            f"{look.seconds:.0f}",
            f"{look.resident_mb:.1f}",
            f"{look.anonymous_mb:.1f}",
            str(look.descriptors),
            str(look.threads),
        )
        for look in looks[:: LOOKS // 10]
    ]
    for line in table([head, *rows]):
        print(line)
    print(", ".join(f"{name} {count}" for name, count in sorted(rounds.items())), "rounds")


def picture(looks: Sequence[Look]) -> bytes:
    """Memory and descriptors over questions, as a PNG."""
    from matplotlib.figure import Figure

    from qcat.report.plot import BLUE, GREY, ORANGE, bare, png

    figure = Figure(figsize=(7, 5))
    memory, counts = figure.subplots(2, 1, sharex=True)
    at = [look.questions for look in looks]
    memory.plot(at, [look.resident_mb for look in looks], color=BLUE, label="resident")
    memory.plot(at, [look.anonymous_mb for look in looks], color=GREY, label="without files")
    memory.set_ylabel("memory, MB")
    counts.plot(at, [look.descriptors for look in looks], color=BLUE, label="descriptors")
    counts.plot(at, [look.threads for look in looks], color=ORANGE, label="threads")
    counts.set_xlabel("questions")
    for axes in (memory, counts):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        bare(axes)
    return png(figure)


if __name__ == "__main__":
    main()
