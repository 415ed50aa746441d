"""How often `qcat drift` is wrong without drift, and how soon it sees one.

    python bench/drift.py

The shipped model answers the validation and test questions of seed 0, which it never saw, in
their own words and with slips, and the questions off the list. Then answers are drawn
from these: for a reference as many whole families of paraphrases as validation has, of which it
keeps one answer each; for windows single answers, as users ask. Prints tables and one line of JSON.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the machine may have other work
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from qcat import Classifier, Prediction
from qcat.cli.output import table
from qcat.data.dataset import Example, read_examples, read_texts
from qcat.data.split import find_families, split_examples
from qcat.monitor.drift import LEVEL, Reference, compare
from qcat.task import Task

ROOT = Path(__file__).resolve().parent.parent
HOUSEHOLD = ROOT / "examples" / "household"
THRESHOLD = 0.5
WINDOWS = 1000
WINDOW = 500
EVERY = 50  # questions between two looks at a rolling window
REPEATS = 40
LONGEST = 3000  # questions after which an alarm counts as missed
DAYS, PER_DAY, YEARS = 365, 100, 40
STRICT = 0.001  # a level for daily looks

Answers = Sequence[Prediction]
Families = Sequence[Answers]


def main() -> None:
    """Ask, draw, print."""
    (validation, test), (slips, off) = ask()
    pool = [*validation, *test]

    def drawn_reference(rng: random.Random) -> Reference:
        return quiet(rng.choices(pool, k=len(validation)))

    def every_paraphrase(rng: random.Random) -> Reference:
        return summed([a for family in rng.choices(pool, k=len(validation)) for a in family])

    alarms = [
        {
            "window": size,
            "drawn reference": rate(drawn_reference, pool, size),
            "had it kept all paraphrases": rate(every_paraphrase, pool, size),
            "validation as reference": rate(lambda _: quiet(validation), test, size),
        }
        for size in (100, 200, 500)
    ]
    one_label = [answer for family in pool for answer in family if answer.label == "pool"]
    shifts: dict[str, Answers] = {
        "to one label": one_label,
        "slips": slips,
        "off the list": off,
    }
    delays = [
        {"shift": name, "share": share, **delay(pool, other, share)}
        for name, other in shifts.items()
        for share in (0.1, 0.2, 0.5, 1.0)
    ]
    yearly = years(pool)
    print(f"{WINDOWS} windows without drift, level {LEVEL}: share called drifted")
    show(alarms)
    print(f"\nno drift, {YEARS} years of daily looks at the last {WINDOW}, {PER_DAY} asked a day")
    show(yearly)
    print(f"\nquestions from a shift to the alarm, level {LEVEL}, a look every {EVERY}")
    show(delays)
    print(json.dumps({"level": LEVEL, "alarms": alarms, "years": yearly, "delays": delays}))


def ask() -> tuple[list[Families], list[Answers]]:
    """Answers to validation and test; to test with slips, and off the list."""
    sys.path.insert(0, str(ROOT / "tools"))
    from slips import slipped

    task = Task.read(HOUSEHOLD / "task.toml")
    split = split_examples(read_examples(HOUSEHOLD / "questions.jsonl", task), task, seed=0)
    test = [example.text for example in split.test]
    others = [
        [slipped(text) for text in test],
        read_texts(HOUSEHOLD / "off_topic.jsonl"),
    ]
    with Classifier.open(threshold=THRESHOLD) as house:
        return (
            [_families(house, part) for part in (split.validation, split.test)],
            [list(house.ask_many(part)) for part in others],
        )


def _families(house: Classifier, examples: Sequence[Example]) -> Families:
    answers = house.ask_many(example.text for example in examples)
    found: dict[int, list[Prediction]] = defaultdict(list)
    for family, answer in zip(find_families(examples), answers, strict=True):
        found[family].append(answer)
    return list(found.values())


def summed(answers: Answers) -> Reference:
    """Answers, each on its own, summed up as `qcat drift` does it with a log."""
    return Reference.of(answers, rule="")


def quiet(families: Families) -> Reference:
    """Families, summed up as `qcat calibrate` does it."""
    rows = [(number, answer) for number, family in enumerate(families) for answer in family]
    groups, answers = zip(*rows, strict=True)
    return Reference.of(answers, rule="", groups=groups)


def users(families: Families, count: int, rng: random.Random) -> list[Prediction]:
    """So many answers to questions that have nothing to do with each other."""
    return [rng.choice(family) for family in rng.choices(families, k=count)]


def rate(reference: Callable[[random.Random], Reference], pool: Families, size: int) -> float:
    """Share of windows, drawn from a pool without drift, that are called drifted."""
    rng = random.Random(size)
    drawn = (compare(reference(rng), summed(users(pool, size, rng))) for _ in range(WINDOWS))
    return sum(bool(drift.drifted) for drift in drawn) / WINDOWS


def years(pool: Families) -> list[dict[str, float]]:
    """Daily looks at the last `WINDOW` questions, without drift, with a reference a year.

    A reference that is unlike the rest by chance makes many alarms, and most make none.
    """
    rng = random.Random(0)
    alarms: dict[float, list[int]] = {LEVEL: [], STRICT: []}
    for _ in range(YEARS):
        reference = quiet(rng.choices(pool, k=len(pool) // 2))
        stream = users(pool, WINDOW + DAYS * PER_DAY, rng)
        ends = range(WINDOW, len(stream), PER_DAY)
        windows = (summed(stream[end - WINDOW : end]) for end in ends)
        looks = [compare(reference, window).drifted for window in windows]
        for level, found in alarms.items():
            found.append(sum(any(s.p_value <= level for s in signals) for signals in looks))
    return [
        {
            "level": level,
            "alarms a look": sum(found) / (YEARS * DAYS),
            "years with an alarm": sum(map(bool, found)) / YEARS,
            "in the worst year": max(found) / DAYS,
        }
        for level, found in alarms.items()
    ]


def delay(pool: Families, other: Answers, share: float) -> dict[str, Any]:
    """Questions from the moment that a share of them comes from elsewhere to the alarm."""
    rng = random.Random(0)
    found = [_delay(pool, other, share, rng) for _ in range(REPEATS)]
    seen = [questions for questions in found if questions is not None]
    return {
        "seen": len(seen) / REPEATS,
        "median": median(seen) if seen else None,
        "90th percentile": quantiles(seen, n=10)[-1] if len(seen) > 1 else None,
    }


def _delay(pool: Families, other: Answers, share: float, rng: random.Random) -> int | None:
    reference = quiet(rng.choices(pool, k=len(pool) // 2))
    window = users(pool, WINDOW, rng)
    for asked in range(EVERY, LONGEST + 1, EVERY):
        fresh = [
            rng.choice(other if rng.random() < share else rng.choice(pool)) for _ in range(EVERY)
        ]
        window = [*window[EVERY:], *fresh]
        if compare(reference, summed(window)).drifted:
            return asked
    return None


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    print("\n".join(table([list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)])))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
