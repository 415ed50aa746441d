"""Questions that benchmarks on real weights train and measure on, the same ones each time.

The household questions come with qcat; CLINC150 and Banking77 are looked for under QCAT_SHARED.
A number after the name of a set (`banking77-10`) is how many questions a label has to train on;
`banking77-1000` has that many in all.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "base"))

from texts import reserved  # noqa: E402 (it lies beside the small base)

if TYPE_CHECKING:
    from qcat.data.dataset import Example
    from qcat.data.split import Split
    from qcat.task import Task

SHARED = Path(os.environ.get("QCAT_SHARED", ROOT.parent / "shared")) / "data"
LABELS, PER_LABEL, FEWER_PER_LABEL = 18, 45, 20
HELD_OUT = 1500
IN_ALL = 1000


def questions(data: str) -> tuple[Task, Split]:
    """A task, its training, validation and held-out questions: the same ones each time."""
    from qcat.data.split import Split

    task, parts = DATA_SETS[data]()
    return task, Split(*parts)


def household() -> tuple[Task, list[list[Example]]]:
    """The example questions: whole groups, 867 of them or a few more to train on."""
    task, parts = _household()
    return task, parts[:3]


def household_choice() -> tuple[Task, list[list[Example]]]:
    """The same to train on; other questions are held out, so that choices are not made on those."""
    task, (train, validation, _, choice) = _household()
    return task, [train, validation, choice]


def household_few(count: int) -> tuple[Task, list[list[Example]]]:
    """As `household`, with so many of each label's questions to train on, whole groups first."""
    task, (train, validation, held_out, _) = _household()
    few = [e for label in range(len(task.labels)) for e in _of(train, label)[:count]]
    return task, [few, validation, held_out]


def _household() -> tuple[Task, list[list[Example]]]:
    from qcat.data.dataset import read_examples
    from qcat.task import Task

    folder = ROOT / "examples" / "household"
    task = Task.read(folder / "task.toml")
    groups: dict[str, list[Example]] = {}
    for example in read_examples(folder / "questions.jsonl", task):
        groups.setdefault(str(example.group), []).append(example)
    names = sorted(groups)
    random.Random(0).shuffle(names)
    sizes = (867, 300, HELD_OUT, HELD_OUT)
    parts: list[list[Example]] = [[] for _ in sizes]
    for name in names:
        for part, size in zip(parts, sizes, strict=True):
            if len(part) < size:
                part += groups[name]
                break
    return task, parts


def _of(examples: Sequence[Example], label: int) -> list[Example]:
    return [example for example in examples if example.label == label]


def clinc150() -> tuple[Task, list[list[Example]]]:
    """18 intents, 45 questions of each to train on."""
    rows = [_rows("clinc150", part) for part in ("train", "valid", "test")]
    names = sorted(reserved(rows[0]))[:LABELS]
    task = _task("clinc150", names, "Classify the request to an assistant into exactly one")
    parts: list[list[Example]] = [[], [], []]
    for name in names:
        train, validation, test = ([r for r in part if r["label"] == name] for part in rows)
        random.Random(name).shuffle(train)
        for part, mine in zip(
            parts, (train[:PER_LABEL], validation, [*train[PER_LABEL:], *test]), strict=True
        ):
            part += _examples(task, mine)
    return task, parts


def banking77(count: int = FEWER_PER_LABEL) -> tuple[Task, list[list[Example]]]:
    """All 77 intents, so many questions of each to train on, or all but four of a rare one's."""
    train, test = (_rows("banking77", part) for part in ("train", "test"))
    names = sorted({row["label"] for row in train})
    task = _task("banking77", names, "Classify the bank customer's question into exactly one")
    parts: list[list[Example]] = [[], [], _examples(task, test[::2])]
    for name in names:
        mine = [row for row in train if row["label"] == name]
        random.Random(name).shuffle(mine)
        few = min(count, len(mine) - 4)
        parts[0] += _examples(task, mine[:few])
        parts[1] += _examples(task, mine[few : few + 4])
    return task, parts


def banking77_in_all() -> tuple[Task, list[list[Example]]]:
    """1,000 of Banking77's training questions at random, as few-shot papers draw them."""
    task, (train, validation, held_out) = banking77(count=10**6)
    return task, [random.Random(0).sample(train, IN_ALL), validation, held_out]


def clinc150_whole(count: int) -> tuple[Task, list[list[Example]]]:
    """All 150 intents, so many questions of each to train on; a third of the test is held out."""
    rows = [_rows("clinc150", part) for part in ("train", "valid", "test")]
    names = sorted({row["label"] for row in rows[0]})
    task = _task("clinc150", names, "Classify the request to an assistant into exactly one")
    train, validation, test = rows
    parts: list[list[Example]] = [[], _examples(task, validation[::10]), _examples(task, test[::3])]
    for name in names:
        mine = [row for row in train if row["label"] == name]
        random.Random(name).shuffle(mine)
        parts[0] += _examples(task, mine[:count])
    return task, parts


def _rows(data: str, part: str) -> list[dict[str, str]]:
    with (SHARED / data / f"{part}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _shown(label: str) -> str:
    return label.replace("_", " ").rstrip("?").lower()


def _task(name: str, labels: Sequence[str], instruction: str) -> Task:
    from qcat.task import Task

    shown = dict.fromkeys(sorted(map(_shown, labels)), "")
    return Task(name, shown, instruction=f"{instruction} category from the list below.")


def _examples(task: Task, rows: Sequence[dict[str, str]]) -> list[Example]:
    from qcat.data.dataset import Example
    from qcat.encoding.prompt import clean_question

    labels = list(task.labels)
    return [Example(clean_question(r["text"]), labels.index(_shown(r["label"])), 1) for r in rows]


DATA_SETS: dict[str, Callable[[], tuple[Task, list[list[Example]]]]] = {
    "household": household,
    "household-10": partial(household_few, 10),
    "household-choice": household_choice,
    "clinc150": clinc150,
    "clinc150-10": partial(clinc150_whole, 10),
    "clinc150-50": partial(clinc150_whole, 50),
    "banking77": banking77,
    "banking77-10": partial(banking77, 10),
    "banking77-50": partial(banking77, 50),
    "banking77-1000": banking77_in_all,
}
