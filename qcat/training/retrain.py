"""Retraining with more questions: which to train on, and whether the new model may be used.

A question stays in its part. Questions that a model was trained on can no longer measure it, and
questions used for measuring must never be trained on. Otherwise comparing the old and the new model
would prove nothing.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcat.data.dataset import Example
from qcat.data.near import near_texts
from qcat.data.split import Split, find_families
from qcat.errors import DataError, TrainError
from qcat.evaluation.results import Comparison
from qcat.task import Task
from qcat.training.settings import Settings

HELD_BACK = 5
"""One in this many new families is held back, to measure what was learned about such questions."""


@dataclass(frozen=True)
class Run:
    """The inputs of a training."""

    task: Task
    """With its codes, if it uses them."""
    settings: Settings
    split: Split

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a finished run.

        Raises:
            TrainError: the folder holds no finished run, or its record is damaged.
            TaskError, DataError: its task or its questions are absent or damaged.
        """
        if not folder.is_dir():
            raise TrainError(f"{folder}: no such folder: name one that `qcat train` made")
        path = folder / "run.json"
        if not path.is_file():
            if (folder / "plan.json").is_file():
                raise TrainError(
                    f"{folder}: its training is unfinished: rerun the same `qcat train`"
                )
            raise TrainError(f"{folder}: holds no run.json: name a folder that `qcat train` made")
        try:
            said = json.loads(path.read_text("utf-8"))["settings"]
            settings = Settings(**{"method": "lora"} | said)  # the only one before it was recorded
            adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            # By its absolute path: `settings.base` may be relative to the folder of that time.
            settings = replace(settings, base=str(adapter["base_model_name_or_path"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise TrainError(
                f"{folder}: its run.json or adapter_config.json is not what `qcat train` writes: "
                "train it again"
            ) from None
        task = Task.read(folder / "task.toml")
        return cls(task, settings, Split.read(folder, task))

    def is_in(self, folder: Path) -> bool:
        """Whether the folder holds this same run, finished."""
        if not (folder / "run.json").is_file():
            return False
        there = Run.read(folder)
        return (there.task, there.settings, there.split.files(there.task)) == (
            self.task,
            self.settings,
            self.split.files(self.task),
        )


@dataclass(frozen=True)
class Addition:
    """What happens to added questions. Each is in one of the first four lists."""

    joined: list[Example]
    """Questions that are now trained on."""
    held_back: list[Example]
    """New test questions."""
    left_out: list[Example]
    """Not used: they, or others of their family, are connected to a question that measures."""
    known: list[Example]
    """Not used: they are already in the run, or earlier in the same file, with the same label."""
    contradicting: list[Example]
    """Of those left out, the ones that contradict the label of a question that measures."""
    replaced: list[Example]
    """Questions trained on so far to which `joined` gives another label: no longer trained on."""
    split: Split
    """The old split with these changes."""


def add_questions(old: Split, added: Sequence[Example], *, seed: int, name: str) -> Addition:
    """Decide by family what to do with added questions.

    A family consists of added rows that are connected by the same group, the same text, or nearly
    the same text (`qcat.data.near`) and the same label. A family that is connected in this way to a
    validation, test or reviewed question is left out; one connected to training questions joins
    them. Of the others, one in `HELD_BACK` is held back, if possible from each label. Validation
    and test questions do not change.

    Args:
        old: the questions of the run.
        added: the added questions.
        seed: seed for drawing.
        name: name of the file with the added questions, for messages.

    Raises:
        DataError: the file has one question under two labels, or nothing new to train on.
    """
    measuring = [*old.validation, *old.test, *old.reviewed]
    is_new = _new([*old.train, *measuring], added, name)
    families, measured, trained = _ties(added, measuring, old.train)
    free = [family for family in dict.fromkeys(families) if family not in measured | trained]
    drawn = set(_draw(free, added, families, seed))

    def of(chosen: set[int]) -> list[Example]:
        rows = zip(added, families, is_new, strict=True)
        return [example for example, family, new in rows if new and family in chosen]

    left_out, held_back = of(measured), of(drawn)
    joined = of(set(families) - measured - drawn)
    known = [example for example, new in zip(added, is_new, strict=True) if not new]
    if not joined:
        raise DataError(
            f"{name}: none of its {len(added)} questions can be trained on ({len(known)} known, "
            f"{len(left_out)} like questions that measure, {len(held_back)} held back): add others"
        )
    anew = {_key(example): example.label for example in joined}
    kept = [example for example in old.train if _key(example) not in anew]
    measuring_labels = {_key(example): example.label for example in measuring}
    return Addition(
        joined=joined,
        held_back=held_back,
        left_out=left_out,
        known=known,
        contradicting=[e for e in left_out if measuring_labels.get(_key(e), e.label) != e.label],
        replaced=[e for e in old.train if anew.get(_key(e), e.label) != e.label],
        split=replace(old, train=kept + joined, reviewed=old.reviewed + held_back),
    )


def refusal(what: str, found: Comparison, questions: int, max_loss: float = 0.0) -> str | None:
    """Why a new model may not replace the old one; None if it is not worse.

    Args:
        what: kind of the questions, for the message.
        found: comparison of the new model with the old one.
        questions: how many questions both were asked.
        max_loss: the share of them by which it may get more wrong than the old one.
    """
    lost = found.broken - found.fixed
    if lost / questions <= max_loss:
        return None
    allowed = f", {max_loss:.2%} allowed" if max_loss else ""
    return f"{lost} more of {questions} {what} questions wrong ({lost / questions:.2%}{allowed})"


def _key(example: Example) -> str:
    return example.text.casefold()


def _new(there: Sequence[Example], added: Sequence[Example], name: str) -> list[bool]:
    """Whether each added question is new, compared with the run and the rows before it."""
    labels: defaultdict[str, set[int]] = defaultdict(set)
    for example in there:
        labels[_key(example)].add(example.label)
    seen: dict[str, Example] = {}
    found = []
    for example in added:
        first = seen.setdefault(_key(example), example)
        if first.label != example.label:
            raise DataError(
                f"{name}:{example.line}: the question of line {first.line} under another label: "
                "mend one of them"
            )
        found.append(first is example and labels[_key(example)] != {example.label})
    return found


def _ties(
    added: Sequence[Example], measuring: Sequence[Example], train: Sequence[Example]
) -> tuple[list[int], set[int], set[int]]:
    """The family of each added question; the families connected to questions that measure; and
    those connected to questions trained on.
    """
    rows = [*added, *measuring, *train]
    near = near_texts([e.text for e in added], [e.text for e in rows[len(added) :]])
    # Nearly the same text with another label is not a paraphrase: the difference matters.
    near = [
        [number for number in found if rows[number].label == example.label]
        for example, found in zip(added, near, strict=True)
    ]
    pairs = [(one, two) for one, found in enumerate(near) for two in found if two < len(added)]
    families = find_families(added, pairs)
    named: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for number, example in enumerate(rows[len(added) :], len(added)):
        for name in _names(example):
            named[name].append(number)
    first_trained = len(added) + len(measuring)
    measured, trained = set(), set()
    for example, family, found in zip(added, families, near, strict=True):
        tied = [number for name in _names(example) for number in named.get(name, ())]
        tied += [number for number in found if number >= len(added)]
        measured |= {family for number in tied if number < first_trained}
        trained |= {family for number in tied if number >= first_trained}
    return families, measured, trained


def _names(example: Example) -> list[tuple[str, str]]:
    """The keys that connect an example to others that share one."""
    group = [("group", example.group)] if example.group else []
    return [("text", _key(example)), *group]


def _draw(
    free: Sequence[int], added: Sequence[Example], families: Sequence[int], seed: int
) -> list[int]:
    """One in `HELD_BACK` of the free families: of all in order of label, else mixed, every such."""
    label = {family: e.label for e, family in zip(added, families, strict=True)}
    mixed = random.Random(seed).sample(free, len(free))
    return sorted(mixed, key=lambda family: label[family])[HELD_BACK - 1 :: HELD_BACK]
