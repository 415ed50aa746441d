"""The cells of the tables on real weights: what each trains, on what, and how.

A cell is one row of a table. Cells with the same training share it. Where a table has a row that
it is compared with, each other row changes one thing of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from bases import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "household"))

from recipe import RECIPE

FEW_RECIPE = RECIPE | {"epochs": 12, "batch": 16}
"""The small base on few questions: as many steps in all as four epochs of ten times as many."""


@dataclass(frozen=True)
class Cell:
    """One row of a table."""

    table: str
    model: str
    """As `bases.base_of` knows it."""
    data: str
    """As `data_sets.questions` knows it."""
    row: str
    """What is peculiar to it."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """Verbalizer and style, where not the default."""
    settings: Mapping[str, Any] | None = field(default_factory=dict)
    """Of the training, where not the default; None for the base as it is."""
    export: Mapping[str, Any] = field(default_factory=dict)
    """Of `qcat.workflows.export_job.Request`, where not the default."""
    free: bool = False
    """Whether it also answers without a grammar."""
    trust: bool = False
    """Whether promises and questions off the list are measured too."""

    @property
    def name(self) -> str:
        """Of its result."""
        row = self.row.replace(",", "").replace(" ", "_")
        return f"{self.table}-{self.model}-{self.data}-{row}"

    @property
    def run(self) -> str:
        """Name of its training: cells of the same training share one."""
        usual = {"verbalizer": "name", "style": "plain"}
        task = {key: value for key, value in self.task.items() if value != usual[key]}
        told = {"task": task, "settings": self.settings}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        data = self.data.removesuffix("-choice")  # they differ in what is held out alone
        return f"{self.model}-{data}-{digest}"


def cells() -> list[Cell]:
    """All cells, in the order in which they are worth having."""
    return [*_published(), *_defaults(), *_classics(), *_trust(), *_smaller()]


def _published() -> Iterator[Cell]:
    """Untrained and trained, names and codes, plain and chat style, free and under the grammar."""
    for model in ("gemma3", "smollm2"):
        for trained, verbalizer, style in product(
            (False, True), ("name", "code"), ("plain", "chat")
        ):
            yield Cell(
                "published",
                model,
                "household",
                f"{'trained' if trained else 'untrained'} {verbalizer} {style}",
                task={"verbalizer": verbalizer, "style": style},
                settings=TWO if trained else None,
                export={} if trained else {"quantization": "q8_0"},
                free=True,
            )


TWO, THREE = {"epochs": 2}, {"epochs": 3}
CHOICES: dict[str, dict[str, Any]] = {
    "epochs 3": THREE,
    "epochs 1": {"epochs": 1},
    "epochs 2": TWO,
    "epochs 5": {"epochs": 5},
    "word dropout 0.15": THREE | {"word_dropout": 0.15},
    "labels": THREE | {"objective": "labels"},
    "batch 16": THREE | {"batch": 16},
    "rate 1.5e-3": THREE | {"rate": 1.5e-3},
    "rate 6e-3": THREE | {"rate": 6e-3},
    "lora": THREE | {"method": "lora"},
    "lora, rate 1e-3": THREE | {"method": "lora", "rate": 1e-3},
    "lora, rate 2e-3": THREE | {"method": "lora", "rate": 2e-3},
    "lora, rate 1e-3, rank 4": THREE | {"method": "lora", "rate": 1e-3, "rank": 4},
    "lora, rate 1e-3, rank 64": THREE | {"method": "lora", "rate": 1e-3, "rank": 64},
    "seed 1": THREE | {"seed": 1},
    "seed 2": THREE | {"seed": 2},
}
"""Every choice, by its name. All but those of epochs change one thing of the first."""


def _defaults() -> Iterator[Cell]:
    for row, settings in CHOICES.items():
        export = {"quantization": "q8_0"} if settings.get("method") == "lora" else {}
        yield Cell("defaults", "gemma3", "household-choice", row, settings=settings, export=export)


def _classics() -> Iterator[Cell]:
    """Our rows of the comparison with the classics, which `classics.py` measures."""
    for data in ("household-10", "household", "banking77-10", "banking77-50", "banking77-1000",
                 "clinc150-10", "clinc150-50"):  # fmt: skip
        few = data.endswith("-10")
        settings = FEW_RECIPE if few else RECIPE
        yield Cell("classics", "small", data, "small base", settings=settings)
    for data in ("household-10", "banking77-10", "banking77-1000"):
        settings = {"epochs": 6} if data.endswith("-10") else TWO
        yield Cell("classics", "gemma3", data, "qcat", settings=settings)


def _trust() -> Iterator[Cell]:
    for data in ("household", "clinc150"):
        yield Cell("trust", "gemma3", data, "qcat", settings=TWO, trust=True)


def _smaller() -> Iterator[Cell]:
    for row, export in (("all", {}), ("vocabulary trimmed", {"merges": 4000})):
        yield Cell("smaller", "smollm2", "household", row, settings=TWO, export=export)
    for layers in (18, 12, 9):
        settings = TWO if layers == 18 else TWO | {"layers": layers}
        yield Cell("smaller", "gemma3", "household", f"{layers} layers", settings=settings)
