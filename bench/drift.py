"""How often `qcat drift` is wrong without drift, and how soon it sees one.

    python bench/drift.py

The shipped model answers the validation and test questions of seed 0, which it never saw, in
their own words, in capitals and with slips, and the questions off the list. Then answers are drawn
from these: a reference of as many as validation has, and windows. Prints tables and one line of
JSON.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the machine may have other work
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from qcat import Classifier, Prediction
from qcat.cli.output import table
from qcat.learn.dataset import read_examples, read_texts
from qcat.learn.split import split_examples
from qcat.task import Task
from qcat.trust.drift import LEVEL, Drift, Reference, compare

HOUSEHOLD = Path(__file__).resolve().parent.parent / "examples" / "household"
THRESHOLD = 0.5
WINDOWS = 1000
WINDOW = 500
EVERY = 50  # questions between two looks at a rolling window
REPEATS = 40
LONGEST = 3000  # questions after which an alarm counts as missed
DAYS, PER_DAY, YEARS = 365, 100, 10

Answers = Sequence[Prediction]


def main() -> None:
    """Ask, draw, print."""
    validation, test, capitals, slips, off = ask()
    pool = [*validation, *test]
    alarms = [
        {
            "window": size,
            "drawn reference": rate(lambda rng: rng.choices(pool, k=len(validation)), pool, size),
            "validation as reference": rate(lambda _: validation, test, size),
        }
        for size in (100, 200, 500)
    ]
    one_label = [answer for answer in pool if answer.label == "pool"]
    shifts: dict[str, Answers] = {
        "to one label": one_label,
        "capitals": capitals,
        "slips": slips,
        "off the list": off,
    }
    delays = [
        {"shift": name, "share": share, **delay(pool, other, share)}
        for name, other in shifts.items()
        for share in (0.1, 0.2, 0.5, 1.0)
    ]
    years = [{"level": level, **year(pool, level)} for level in (LEVEL, 0.001)]
    print(f"{WINDOWS} windows without drift, level {LEVEL}: share called drifted")
    show(alarms)
    print(f"\nno drift, {YEARS} years of daily looks at the last {WINDOW}, {PER_DAY} asked a day")
    show(years)
    print(f"\nquestions from a shift to the alarm, level {LEVEL}, a look every {EVERY}")
    show(delays)
    print(json.dumps({"level": LEVEL, "alarms": alarms, "years": years, "delays": delays}))


def ask() -> list[Answers]:
    """Answers to validation, test, the test questions in capitals and with slips, and off-topic."""
    task = Task.read(HOUSEHOLD / "task.toml")
    split = split_examples(read_examples(HOUSEHOLD / "questions.jsonl", task), task, seed=0)
    test = [example.text for example in split.test]
    texts = [
        [example.text for example in split.validation],
        test,
        [text.upper() for text in test],
        [slipped(text, random.Random(text)) for text in test],
        read_texts(HOUSEHOLD / "off_topic.jsonl"),
    ]
    with Classifier.open(threshold=THRESHOLD) as house:
        return [list(house.ask_many(part)) for part in texts]


def slipped(text: str, random: random.Random) -> str:
    """The text with two neighbouring letters swapped in every second word or so."""
    words = text.split()
    for number, word in enumerate(words):
        if len(word) > 3 and random.random() < 0.5:
            at = random.randrange(1, len(word) - 2)
            words[number] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def judged(reference: Answers, window: Answers, level: float = LEVEL) -> Drift:
    """One run of `qcat drift`."""
    quiet, now = (Reference.of(side, rule="") for side in (reference, window))
    return compare(quiet, now, level=level)


def rate(reference: Callable[[random.Random], Answers], pool: Answers, size: int) -> float:
    """Share of windows, drawn from a pool without drift, that are called drifted."""
    rng = random.Random(size)
    drawn = (judged(reference(rng), rng.choices(pool, k=size)) for _ in range(WINDOWS))
    return sum(bool(drift.drifted) for drift in drawn) / WINDOWS


def year(pool: Answers, level: float) -> dict[str, float]:
    """Daily looks at the last `WINDOW` questions, without drift: alarms a look, and a year."""
    rng = random.Random(0)
    alarms = []
    for _ in range(YEARS):
        reference = rng.choices(pool, k=len(pool) // 2)
        stream = rng.choices(pool, k=WINDOW + DAYS * PER_DAY)
        ends = range(WINDOW, len(stream), PER_DAY)
        looks = (judged(reference, stream[end - WINDOW : end], level) for end in ends)
        alarms.append(sum(bool(drift.drifted) for drift in looks))
    return {
        "alarms a look": sum(alarms) / (YEARS * DAYS),
        "years with an alarm": sum(map(bool, alarms)) / YEARS,
    }


def delay(pool: Answers, other: Answers, share: float) -> dict[str, Any]:
    """Questions from the moment that a share of them comes from elsewhere to the alarm."""
    rng = random.Random(0)
    found = [_delay(pool, other, share, rng) for _ in range(REPEATS)]
    seen = [questions for questions in found if questions is not None]
    return {
        "seen": len(seen) / REPEATS,
        "median": median(seen) if seen else None,
        "90th percentile": quantiles(seen, n=10)[-1] if len(seen) > 1 else None,
    }


def _delay(pool: Answers, other: Answers, share: float, rng: random.Random) -> int | None:
    reference = rng.choices(pool, k=len(pool) // 2)
    window = rng.choices(pool, k=WINDOW)
    for asked in range(EVERY, LONGEST + 1, EVERY):
        fresh = [rng.choice(other if rng.random() < share else pool) for _ in range(EVERY)]
        window = [*window[EVERY:], *fresh]
        if judged(reference, window).drifted:
            return asked
    return None


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    print("\n".join(table([list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)])))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
