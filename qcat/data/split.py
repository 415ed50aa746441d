"""Training, validation and test questions, with families of paraphrases kept on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path

from qcat.data.dataset import Example, jsonl_line, read_examples
from qcat.errors import DataError
from qcat.task import Task

FEWEST = 7
"""Groups, or different questions, that a label needs: one for validation, one for the test."""


@dataclass(frozen=True)
class Split:
    """Questions in parts, each in the order of the file."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    reviewed: list[Example] = field(default_factory=list)
    """More test questions, held back from those that `qcat retrain` was given."""

    @classmethod
    def read(cls, folder: Path, task: Task) -> Split:
        """Read what `write` wrote. Raises DataError for a file that is absent or damaged."""
        paths = [folder / f"{part.name}.jsonl" for part in fields(cls)]
        return cls(
            *(
                read_examples(path, task) if path.exists() or path.stem != "reviewed" else []
                for path in paths
            )
        )

    def files(self, task: Task) -> dict[str, bytes]:
        """The file contents of each part; empty for a part without questions."""
        labels = list(task.labels)
        return {
            part.name: b"".join(
                jsonl_line(e.text, labels[e.label], e.group) for e in getattr(self, part.name)
            )
            for part in fields(self)
        }

    def write(self, folder: Path, task: Task) -> None:
        """Write `train.jsonl` and so on; a part without questions has no file."""
        for name, data in self.files(task).items():
            path = folder / f"{name}.jsonl"
            if data:
                path.write_bytes(data)
            else:
                path.unlink(missing_ok=True)


def split_examples(examples: Sequence[Example], task: Task, *, seed: int) -> Split:
    """Split 70/15/15 by family, stratified by label (scikit-learn's StratifiedGroupKFold).

    A family consists of rows that are connected by the same group or the same text.

    Raises:
        DataError: a label has fewer than `FEWEST` families.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    families = find_families(examples)
    fewest = _fewest_families(families, examples, task)
    # 15/15/70 % is 3 + 3 + 14 of 20 folds; with fewer families some folds would lack the label
    folds, held = (20, 3) if fewest >= 20 else (FEWEST, 1)
    labels = [example.label for example in examples]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [part.tolist() for _, part in splitter.split(labels, labels, families)]
    chosen = (parts[2 * held :], parts[held : 2 * held], parts[:held])
    return Split(*([examples[i] for i in sorted(chain.from_iterable(folds))] for folds in chosen))


def find_families(examples: Sequence[Example], pairs: Sequence[tuple[int, int]] = ()) -> list[int]:
    """The number of each row's family: rows of one group or one text, and pairs of rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # A graph of rows, group names and texts; a row connects its group and its text.
    nodes: dict[tuple[str, str], int] = {}
    edges = []
    for number, example in enumerate(examples):
        keys = [("text", example.text.casefold())]
        if example.group:
            keys.append(("group", example.group))
        edges += [(number, len(examples) + nodes.setdefault(key, len(nodes))) for key in keys]
    edges += pairs
    rows, columns = zip(*edges, strict=True)
    size = len(examples) + len(nodes)
    graph = coo_array(([1] * len(edges), (rows, columns)), shape=(size, size))
    _, families = connected_components(graph, directed=False)
    return [int(family) for family in families[: len(examples)]]


def _fewest_families(families: Sequence[int], examples: Sequence[Example], task: Task) -> int:
    members: dict[int, set[int]] = {number: set() for number in range(len(task.labels))}
    for family, example in zip(families, examples, strict=True):
        members[example.label].add(family)
    for label, found in zip(task.labels, members.values(), strict=True):
        if len(found) < FEWEST:
            raise DataError(
                f"label {label!r} has {len(found)} groups of questions, and {FEWEST} are needed "
                "for training, validation and test: add questions (`qcat lint` names all such)"
            )
    return min(map(len, members.values()))
